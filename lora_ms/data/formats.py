"""What one row may look like, and what it becomes: dict -> Example or TokenRow."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.example import IGNORE_INDEX, Example, Message, TokenRow
from lora_ms.errors import LoraMsError

FORMATS = (
    "instruction + output (optional: input, system, history), messages (a list of role + content), "
    "input_ids + labels, input_ids + prompt_len"
)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
FAULTS_SHOWN = 5
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
NO_ANSWER_ADVICE = "write the answer or remove the row"


class RowFault(Exception):
    """A row that cannot be used: `text` says what is wrong with it, `advice` what to do."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.text = text
        self.advice = advice


def parse_rows(rows: Iterable[tuple[str, Any]], fill: Mapping[str, str]) -> list[Example | TokenRow]:
    """Parse (where, row) pairs of one file. The first row decides the format, and every row must have it.

    Raises LoraMsError naming up to five faulty rows in one line.
    """
    parsed: list[Example | TokenRow] = []
    faults: list[tuple[str, RowFault]] = []
    first = None
    for where, row in rows:
        try:
            name = recognise(row)
            first = first or name
            if name != first:
                raise RowFault(f"the format is {name}, but the first row's is {first}", "keep one format in one file")
            parsed.append(_PARSERS[name](where, row, fill))
        except RowFault as fault:
            faults.append((where, fault))
    if faults:
        raise LoraMsError(_one_line(faults))
    return parsed


def recognise(row: Any) -> str:
    """Name the format of a row: "alpaca", "messages" or "tokens"."""
    if not isinstance(row, Mapping):
        raise RowFault(f"a row must be an object with keys, not {type(row).__name__}", f"known formats: {FORMATS}")
    if "messages" in row:
        return "messages"
    if "instruction" in row:
        return "alpaca"
    if "input_ids" in row and ("labels" in row or "prompt_len" in row):
        return "tokens"
    keys = ", ".join(_quoted(key) for key in row) or "(none)"
    raise RowFault(f"keys {keys} fit no format", f"known formats: {FORMATS}")


def token_row(where: str, input_ids: Any, labels: Any) -> TokenRow:
    """Check token ids and unshifted labels, and make them int32."""
    ids = _int_array("input_ids", input_ids)
    targets = _int_array("labels", labels)
    if ids.size == 0:
        raise RowFault("input_ids is empty", "remove the row")
    if len(targets) != len(ids):
        raise RowFault(f"labels has {len(targets)} entries, input_ids {len(ids)}", "give one label for each token")
    if ids.min() < 0:
        raise RowFault(f"input_ids holds {ids.min()}", "token ids are 0 or more")
    if targets[targets != IGNORE_INDEX].min(initial=0) < 0:
        wrong = targets[(targets < 0) & (targets != IGNORE_INDEX)][0]
        raise RowFault(f"labels holds {wrong}", f"a label is a token id, or {IGNORE_INDEX} where nothing is learnt")
    learnt = np.flatnonzero(targets[:-1] != IGNORE_INDEX)
    shifted = np.array_equal(targets[learnt], ids[learnt + 1])
    if len(learnt) > 1 and shifted and not np.array_equal(targets[learnt], ids[learnt]):
        raise RowFault(
            "labels are already shifted by one token", "give labels in line with input_ids; training shifts them"
        )
    return TokenRow(where, ids.astype(np.int32), targets.astype(np.int32))


def _parse_alpaca(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> Example:
    instruction, extra = _text(row, "instruction", fill), _text(row, "input", fill)
    system, output = _text(row, "system", fill), _text(row, "output", fill)
    if not output.strip():
        raise RowFault(f'no answer: "output" is {"empty" if "output" in row else "missing"}', NO_ANSWER_ADVICE)
    if not (instruction + extra).strip():
        raise RowFault('no question: "instruction" is empty', "write the question or remove the row")
    messages = [Message("system", system)] if system else []
    for turn, pair in enumerate(_list(row, "history"), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RowFault(f'turn {turn} of "history" is no [question, answer] pair of texts', "correct the row")
        if not pair[1].strip():
            raise RowFault(f'no answer: turn {turn} of "history" is empty', NO_ANSWER_ADVICE)
        messages += [Message("user", _filled(pair[0], fill)), Message("assistant", _filled(pair[1], fill))]
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    messages += [Message("user", question), Message("assistant", output)]
    return Example(where, tuple(messages), input=extra if instruction else "")


def _parse_messages(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> Example:
    messages = []
    for number, turn in enumerate(_list(row, "messages"), start=1):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise RowFault(f"message {number} is no object with role and content", "correct the row")
        role = ROLES.get(turn["role"]) if isinstance(turn["role"], str) else None
        if role is None:
            raise RowFault(
                f"message {number} has the unknown role {_quoted(turn['role'])}", f"known roles: {', '.join(ROLES)}"
            )
        content = _text(turn, "content", fill, name=f"content of message {number}")
        if role == "assistant" and not content.strip():
            raise RowFault(f"no answer: the content of message {number} is empty", NO_ANSWER_ADVICE)
        messages.append(Message(role, content))
    if not messages:
        raise RowFault('no answer: "messages" is empty', NO_ANSWER_ADVICE)
    if messages[-1].role != "assistant":
        raise RowFault(f"no answer: the last message is the {messages[-1].role}'s", "end every row with an assistant")
    if messages[0].role == "assistant":
        raise RowFault("the first message is the assistant's", "begin every row with a system or user message")
    return Example(where, tuple(messages))


def _parse_tokens(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> TokenRow:
    if "prompt_len" not in row:
        return token_row(where, row["input_ids"], row["labels"])
    if "labels" in row:
        raise RowFault("both labels and prompt_len are given", "give one of them")
    prompt_len = row["prompt_len"]
    labels = _int_array("input_ids", row["input_ids"]).copy()
    if isinstance(prompt_len, bool) or not isinstance(prompt_len, int | np.integer) or prompt_len < 0:
        raise RowFault(f"prompt_len is {prompt_len!r}", "it is the number of prompt tokens, 0 or more")
    if prompt_len >= len(labels):
        raise RowFault(f"no answer: prompt_len is {prompt_len} of {len(labels)} tokens", NO_ANSWER_ADVICE)
    labels[:prompt_len] = IGNORE_INDEX
    return token_row(where, row["input_ids"], labels)


_PARSERS: dict[str, Callable[[str, Mapping[str, Any], Mapping[str, str]], Example | TokenRow]] = {
    "alpaca": _parse_alpaca,
    "messages": _parse_messages,
    "tokens": _parse_tokens,
}


def _text(row: Mapping[str, Any], key: str, fill: Mapping[str, str], name: str | None = None) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault(f"{name or _quoted(key)} is {type(value).__name__}, not text", "put it in quotation marks")
    return _filled(value, fill)


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise RowFault(f'"{key}" is {type(value).__name__}, not a list', "correct the row")
    return list(value)


def _filled(text: str, fill: Mapping[str, str]) -> str:
    # One pass, so that a text about templates keeps its own braces with fill {"name": "{{name}}"}.
    def replace(match: re.Match[str]) -> str:
        key = match[1]
        if key not in fill:
            raise RowFault(f"the placeholder {match[0]} is not filled", f"add --fill {key}=VALUE")
        return str(fill[key])  # an override such as AGE=5 arrives as a number

    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair, which no tokenizer takes
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowFault(f"the text holds {half}, half of a character", "remove it") from error
    return PLACEHOLDER.sub(replace, text)


def _int_array(name: str, values: Any) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError:  # a ragged list of lists
        array = np.asarray([None])
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RowFault(f"{name} is no list of whole numbers", "give a flat list of token ids")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise RowFault(f"{name} holds a number beyond 32 bits", "give a flat list of token ids")
    return array.astype(np.int64)


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _one_line(faults: list[tuple[str, RowFault]]) -> str:
    shown = faults[:FAULTS_SHOWN]
    parts = [f"{where}: {fault.text}" for where, fault in shown]
    if len(faults) > len(shown):
        parts.append(f"and {len(faults) - len(shown)} more such rows")
    return "; ".join([*parts, *dict.fromkeys(fault.advice for _, fault in shown)])
