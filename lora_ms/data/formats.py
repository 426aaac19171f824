"""What one row may look like, and what it becomes: dict -> Example, Completion or TokenRow."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_ms.data.example import IGNORE_INDEX, Completion, Example, Message, TokenRow
from lora_ms.data.fields import RowFault, filled, int_array, list_of, quoted, text_of
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
Row = Example | Completion | TokenRow


@dataclass(frozen=True)
class Reading:
    """How the rows of a file are read."""

    format: str = "auto"  # or a key of PARSERS
    columns: Mapping[str, str] = field(default_factory=dict)  # our name of a column -> the file's
    fill: Mapping[str, str] = field(default_factory=dict)  # what stands for {{KEY}} in every text
    accept: Callable[[Mapping[str, Any]], bool] | None = None  # asked before a row is parsed; False: leave it out
    keep: Callable[[Row], Row | None] | None = None  # the last word on a parsed row; None: leave it out
    on_fault: Callable[[str, RowFault], None] | None = None  # called for a row that cannot be used; None: an error


def parse_rows(rows: Iterable[tuple[str, Any]], reading: Reading) -> Iterator[Row]:
    """Parse (where, row) pairs of one file. The first row decides the format, and every row must have it.

    A RowFault in place of a row stands for one that could not even be read.
    Raises LoraMsError naming up to five faulty rows in one line, after a look at all of them.
    """
    faults: list[tuple[str, RowFault]] = []
    count, first = 0, None if reading.format == "auto" else reading.format
    for where, row in rows:
        try:
            if isinstance(row, RowFault):
                raise row
            row = _renamed(row, reading.columns)
            if reading.accept is not None and isinstance(row, Mapping) and not reading.accept(row):
                continue
            name = recognise(row, reading.format)
            first = first or name
            if name != first:
                raise RowFault(f"the format is {name}, but the first row's is {first}", "keep one format in one file")
            read = PARSERS[name](where, row, reading.fill)
            parsed = read if reading.keep is None else reading.keep(read)
        except RowFault as fault:
            if reading.on_fault is not None:
                reading.on_fault(where, fault)
                continue
            count += 1
            faults = [*faults, (where, fault)][:FAULTS_SHOWN]
        else:
            if parsed is not None and not faults:
                yield parsed
    if faults:
        raise LoraMsError(_one_line(faults, count))


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    if not columns or not isinstance(row, Mapping):
        return row
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        names = ", ".join(quoted(key) for key in row)
        raise RowFault(f"there is no column {quoted(missing[0])}, which columns asks for", f"columns here: {names}")
    rest = {key: value for key, value in row.items() if key not in columns.values()}
    return rest | {ours: row[theirs] for ours, theirs in columns.items()}


def recognise(row: Any, asked: str = "auto") -> str:
    """Name the format of a row, a key of PARSERS; `asked` is it, unless it is "auto"."""
    if not isinstance(row, Mapping):
        raise RowFault(f"a row must be an object with keys, not {type(row).__name__}", f"known formats: {FORMATS}")
    for name, sets in KEYS.items():
        if asked in ("auto", name) and any(all(row.get(key) is not None for key in keys) for keys in sets):
            return name
    for name, sets in KEYS.items():  # a null is no value, but it may show what was meant
        if asked in ("auto", name) and any(all(key in row for key in keys) for keys in sets):
            return name
    keys = ", ".join(quoted(key) for key in row) or "(none)"
    if row.keys() - {"system", "id"} == {"prompt"} and asked in ("auto", "prompt"):
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
    instruction, extra = text_of(row, "instruction", fill), text_of(row, "input", fill)
    system, output = text_of(row, "system", fill), text_of(row, "output", fill)
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
    prompt, completion = text_of(row, "prompt", fill), text_of(row, "completion", fill)
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


def _one_line(faults: list[tuple[str, RowFault]], count: int) -> str:
    parts = [f"{where}: {fault.text}" for where, fault in faults]
    if count > len(faults):
        parts.append(f"and {count - len(faults)} more such rows")
    return "; ".join([*parts, *dict.fromkeys(fault.advice for _, fault in faults)])
