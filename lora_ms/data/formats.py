"""What one row may look like, and what it becomes: RawRow -> Example, Completion or TokenRow."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.example import IGNORE_INDEX, Completion, Example, Message, RawRow, Row, RowFault, TokenRow
from lora_ms.errors import LoraMsError

FORMATS = (
    "instruction + output (optional: input, system, history), messages (a list of role + content), conversations "
    "(a list of from + value), prompt + completion, text, input_ids + labels, input_ids + prompt_len"
)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
FAULTS_SHOWN = 5
NO_ANSWER_ADVICE = "write the answer or remove the row"
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def rename_columns(rows: Iterable[RawRow], columns: Mapping[str, str]) -> Iterator[RawRow]:
    """The rows with the columns under our names; columns: our name of a column -> the file's."""
    for row in rows:
        if columns and isinstance(row.value, Mapping):
            row = row._replace(value=_renamed(row.value, columns))
        yield row


def _renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any] | RowFault:
    missing = [theirs for theirs in columns.values() if theirs not in value]
    if missing:
        names = ", ".join(quoted(key) for key in value)
        return RowFault(f"there is no column {quoted(missing[0])}, which columns asks for", f"columns here: {names}")
    rest = {key: item for key, item in value.items() if key not in columns.values()}
    return rest | {ours: value[theirs] for ours, theirs in columns.items()}


def parse_rows(
    rows: Iterable[RawRow],
    format: str = "auto",
    fill: Mapping[str, str] | None = None,
    on_fault: Callable[[RowFault], None] | None = None,
) -> Iterator[Row]:
    """Parse rows. The first row of a file decides the file's format, and every row of it must have it.

    format: a key of PARSERS, or "auto".
    fill: what stands for {{KEY}} in every text.
    on_fault: called for a row that cannot be used, which is then left out; None: such a row is an error.

    Raises LoraMsError naming up to five faulty rows of a file in one line, after a look at all of them.
    """
    faults = _Faults()
    file = None
    file_format = None
    for row in rows:
        if row.file != file:
            faults.raise_any()
            file = row.file
            file_format = None if format == "auto" else format
        try:
            if isinstance(row.value, RowFault):
                raise row.value
            name = recognise(row.value, format)
            file_format = file_format or name
            if name != file_format:
                text = f"the format is {name}, but the first row's is {file_format}"
                raise RowFault(text, "keep one format in one file")
            parsed = PARSERS[name](row.where, row.value, fill or {})
        except RowFault as fault:
            if on_fault is None:
                faults.add(row.where, fault)
            else:
                on_fault(fault)
        else:
            if not faults.count:
                yield parsed
    faults.raise_any()


class _Faults:
    """The faulty rows of a file."""

    def __init__(self) -> None:
        self.first: list[tuple[str, RowFault]] = []
        self.count = 0

    def add(self, where: str, fault: RowFault) -> None:
        self.count += 1
        if self.count <= FAULTS_SHOWN:
            self.first.append((where, fault))

    def raise_any(self) -> None:
        """Raises LoraMsError where there are any."""
        if not self.count:
            return
        parts = [f"{where}: {fault.text}" for where, fault in self.first]
        if self.count > len(self.first):
            parts.append(f"and {self.count - len(self.first)} more such rows")
        advice = dict.fromkeys(fault.advice for _, fault in self.first)
        raise LoraMsError("; ".join([*parts, *advice]))


def recognise(value: Any, asked: str = "auto") -> str:
    """Name the format of a row, a key of PARSERS; `asked` is it, unless it is "auto"."""
    if not isinstance(value, Mapping):
        raise RowFault(f"a row must be an object with keys, not {type(value).__name__}", f"known formats: {FORMATS}")
    for name, sets in KEYS.items():
        if asked in ("auto", name) and any(all(value.get(key) is not None for key in keys) for keys in sets):
            return name
    for name, sets in KEYS.items():  # a null is no value, but it may show what was meant
        if asked in ("auto", name) and any(all(key in value for key in keys) for keys in sets):
            return name
    keys = ", ".join(quoted(key) for key in value) or "(none)"
    if value.keys() - {"system", "id"} == {"prompt"} and asked in ("auto", "prompt"):
        raise RowFault('no answer: "completion" is missing', NO_ANSWER_ADVICE)
    text = f"keys {keys} fit no format" if asked == "auto" else f"keys {keys} do not fit the format {asked}"
    raise RowFault(text, f"known formats: {FORMATS}")


def token_row(where: str, input_ids: Any, labels: Any) -> TokenRow:
    """Check token ids and unshifted labels, and make them int32."""
    ids = int_array("input_ids", input_ids)
    targets = int_array("labels", labels)
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
    instruction = text_of(row, "instruction", fill)
    extra = text_of(row, "input", fill)
    system = text_of(row, "system", fill)
    output = text_of(row, "output", fill)
    if not output.strip():
        raise RowFault(f'no answer: "output" is {"empty" if "output" in row else "missing"}', NO_ANSWER_ADVICE)
    if not (instruction + extra).strip():
        raise RowFault('no question: "instruction" is empty', "write the question or remove the row")
    messages = [Message("system", system)] if system else []
    for turn, pair in enumerate(list_of(row, "history"), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RowFault(f'turn {turn} of "history" is no [question, answer] pair of texts', "correct the row")
        if not pair[1].strip():
            raise RowFault(f'no answer: turn {turn} of "history" is empty', NO_ANSWER_ADVICE)
        messages += [Message("user", filled(pair[0], fill)), Message("assistant", filled(pair[1], fill))]
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    messages += [Message("user", question), Message("assistant", output)]
    return Example(where, tuple(messages), input=extra if instruction else "")


def _parse_messages(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> Example:
    return _conversation(where, row, "messages", "role", "content", fill)


def _parse_sharegpt(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> Example:
    return _conversation(where, row, "conversations", "from", "value", fill)


def _conversation(
    where: str, row: Mapping[str, Any], key: str, role_key: str, text_key: str, fill: Mapping[str, str]
) -> Example:
    messages = []
    for number, turn in enumerate(list_of(row, key), start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or not {text_key, "tool_calls"} & set(turn):
            raise RowFault(f"message {number} is no object with {role_key} and {text_key}", "correct the row")
        name = turn[role_key]
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowFault(f"message {number} has the unknown role {quoted(name)}", f"known roles: {', '.join(ROLES)}")
        content = text_of(_joined(turn, text_key), text_key, fill, name=f"{text_key} of message {number}")
        if turn.get("tool_calls"):
            content += quoted(turn["tool_calls"])
        if role == "assistant" and not content.strip():
            raise RowFault(f"no answer: the {text_key} of message {number} is empty", NO_ANSWER_ADVICE)
        messages.append(Message(role, content))
    if not messages:
        raise RowFault(f'no answer: "{key}" is empty', NO_ANSWER_ADVICE)
    if messages[0].role != "system":
        system = text_of(row, "system", fill)
        messages = [Message("system", system)] * bool(system) + messages
    if row.get("tools"):
        tools = row["tools"] if isinstance(row["tools"], str) else quoted(row["tools"])
        system = messages.pop(0).content if messages[0].role == "system" else ""
        messages.insert(0, Message("system", f"{system}\n\n{tools}".strip()))
    _check_order(messages)
    return Example(where, tuple(messages))


def _check_order(messages: list[Message]) -> None:
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        raise RowFault(f"no answer: the last message is the {roles[-1]}'s", "end every row with an assistant")
    if roles[0] == "assistant":
        raise RowFault("the first message is the assistant's", "begin every row with a system or user message")
    for number, (before, role) in enumerate(zip(roles, roles[1:], strict=False), start=2):
        if role == "system" or (role == before and role != "tool") or (before == "system" and role != "user"):
            raise RowFault(
                f"message {number}, the {role}'s, follows the {before}'s", "let user and assistant alternate"
            )


def _joined(turn: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A turn whose content is a list of text parts, with their texts as its content."""
    parts = turn.get(key)
    if not isinstance(parts, list) or not parts:
        return turn
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    return {**turn, key: "".join(strings)} if len(strings) == len(texts) else turn


def _parse_prompt(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> Completion | Example:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _parse_messages(where, {**row, "messages": [*row["prompt"], *row["completion"]]}, fill)
    prompt = text_of(row, "prompt", fill)
    completion = text_of(row, "completion", fill)
    if not completion.strip():
        raise RowFault('no answer: "completion" is empty', NO_ANSWER_ADVICE)
    if not prompt.strip():
        raise RowFault('no question: "prompt" is empty', 'write the question, or name the column "text"')
    return Completion(where, prompt, completion)


def _parse_text(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> Completion:
    text = text_of(row, "text", fill)
    if not text.strip():
        raise RowFault('"text" is empty', "remove the row")
    return Completion(where, "", text)


def _parse_tokens(where: str, row: Mapping[str, Any], fill: Mapping[str, str]) -> TokenRow:
    if "prompt_len" not in row:
        return token_row(where, row["input_ids"], row["labels"])
    if "labels" in row:
        raise RowFault("both labels and prompt_len are given", "give one of them")
    prompt_len = row["prompt_len"]
    labels = int_array("input_ids", row["input_ids"]).copy()
    if isinstance(prompt_len, bool) or not isinstance(prompt_len, int | np.integer) or prompt_len < 0:
        raise RowFault(f"prompt_len is {prompt_len!r}", "it is the number of prompt tokens, 0 or more")
    if prompt_len >= len(labels):
        raise RowFault(f"no answer: prompt_len is {prompt_len} of {len(labels)} tokens", NO_ANSWER_ADVICE)
    labels[:prompt_len] = IGNORE_INDEX
    return token_row(where, row["input_ids"], labels)


# format -> sets of keys of which a row has one
KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction",),),
    "tokens": (("input_ids", "labels"), ("input_ids", "prompt_len")),
    "prompt": (("prompt", "completion"),),
    "text": (("text",),),
}
PARSERS: dict[str, Callable[[str, Mapping[str, Any], Mapping[str, str]], Row]] = {
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "messages": _parse_messages,
    "prompt": _parse_prompt,
    "text": _parse_text,
    "tokens": _parse_tokens,
}


def text_of(row: Mapping[str, Any], key: str, fill: Mapping[str, str], name: str | None = None) -> str:
    """The text of a column, filled in; "" where it is missing or null. name: of the column, in error messages."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault(f"{name or quoted(key)} is {type(value).__name__}, not text", "put it in quotation marks")
    return filled(value, fill)


def list_of(row: Mapping[str, Any], key: str) -> list[Any]:
    """The list in a column, perhaps written as JSON; [] where it is missing, null or empty."""
    value = _from_json(row.get(key))
    if value is None or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise RowFault(f'"{key}" is {type(value).__name__}, not a list', "correct the row")
    return list(value)


def filled(text: str, fill: Mapping[str, str]) -> str:
    """The text with `fill` in place of its placeholders."""

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


def int_array(name: str, values: Any) -> NDArray[np.int64]:
    """A flat list of whole numbers of at most 32 bits, perhaps written as JSON, as an array [n]."""
    try:
        array = np.asarray(_from_json(values))
    except ValueError:  # a ragged list of lists
        array = np.asarray([None])
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RowFault(f"{name} is no list of whole numbers", "give a flat list of token ids")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise RowFault(f"{name} holds a number beyond 32 bits", "give a flat list of token ids")
    return array.astype(np.int64)


def _from_json(value: Any) -> Any:
    """A list that a CSV file holds as JSON; all else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return value


def quoted(value: Any) -> str:
    """The value as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)
