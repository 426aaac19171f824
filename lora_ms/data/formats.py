"""What one row may look like, and what it becomes: RawRow -> Example, Completion or TokenRow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.columns import QUESTION, as_flag, from_json, quoted, turns_of
from lora_ms.data.example import (
    END_THINK,
    IGNORE_INDEX,
    MOST_BYTES,
    REASONING,
    THINK,
    Completion,
    Example,
    Message,
    RawRow,
    Row,
    RowFault,
    TokenRow,
    ToolData,
    function_of,
    shown_name,
    too_long,
)
from lora_ms.data.preferences import Preferences, answers_of, joined
from lora_ms.data.tables import separator_advice
from lora_ms.errors import LoraMsError
from lora_ms.reading import reason as reason_of

FORMATS = (
    "instruction + output (optional: input, system, history), messages (a list of role + content), conversations "
    "(a list of from + value), prompt + completion, text, input_ids + labels, input_ids + prompt_len"
)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALL_ROLES = ("function_call", "tool_call")  # roles whose text is a call of a tool, as JSON

# other names under which datasets have the columns of Alpaca's format, ours first; QUESTION is another
EXTRA = ("input", "context")
ANSWER = ("output", "response", "answer")
# keys of an assistant's turn that say whether it is learnt; the second kind says it the other way round
LEARNT = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale", "loss_mask")
NOT_LEARNT = ("masked",)
ROW_LEARNT = ("weight", "train", "training", "trainable")  # the same of a whole row
# columns that only data of preferences has: answers that are wanted, and that are not
PREFERENCES = (
    *("chosen", "rejected", "chosen_response", "rejected_response", "chosen_responses", "rejected_responses"),
    *("rejected_messages", "rejected_images", "rejected_output", "rejected_answer", "kto_tag"),
)
BOTH_LEARNT = "objectives: dpo, orpo or simpo learn from both; or"
# names that are only suggested: what they hold is not sure enough to read it
LIKE_QUESTION = (*QUESTION, "prompt", "input", "problem", "user", "human", "sentence", "text", "问题", "提问")
LIKE_ANSWER = (
    *(*ANSWER, "completion", "target", "solution", "assistant", "label", "summary", "translation"),
    *("答案", "回答"),
)
LIKE_TEXT = ("content", "body", "sentence", "document", "article", "passage", "code")

FAULTS_SHOWN = 5
NO_ANSWER_ADVICE = "write the answer or remove the row"
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Placeholders:
    """What stands for {{KEY}} in every text."""

    values: Mapping[str, str] = field(default_factory=dict)
    keep_others: bool = False  # leave a {{KEY}} without a value as it is; False: it is an error
    kept: Counter[str] = field(default_factory=Counter)  # those left: key -> times

    def fill(self, text: str) -> str:
        """The text with the values in place of its placeholders."""

        # One pass, so that a text about templates keeps its own braces with values {"name": "{{name}}"}.
        def replace(match: re.Match[str]) -> str:
            key = match[1]
            if key in self.values:
                return str(self.values[key])  # an override such as AGE=5 arrives as a number
            if self.keep_others:
                self.kept[key] += 1
                return match[0]
            raise RowFault(
                f"the placeholder {match[0]} is not filled",
                f"add --fill {key}=VALUE; or leave all such braces as they are with train_dataset.fill: False",
            )

        check_characters(text)
        return PLACEHOLDER.sub(replace, text)


@dataclass
class ParserNotes:
    """What the parser did that the user should know."""

    read_as: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> the file's name of a column -> ours
    unused: dict[str, Counter[str]] = field(default_factory=dict)  # file -> key -> rows or messages that have it
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> rows

    def add(self, file: str, used: Iterable[tuple[str, str]], unused: Iterable[str]) -> None:
        """Of one row: pairs of the file's name and ours, where they differ; and keys without effect."""
        for theirs, ours in used:
            self.read_as.setdefault(file, {})[theirs] = ours
        for key in unused:
            self.unused.setdefault(file, Counter())[key] += 1


class Fields:
    """The keys of a row or of a message, read strictly. It remembers which keys were read."""

    def __init__(self, values: Mapping[str, Any], placeholders: Placeholders, of: str = "") -> None:
        self.values = values
        self.placeholders = placeholders
        self.of = of  # " of message 2", for error messages
        self.read: set[str] = set()
        self.read_as: list[tuple[str, str]] = []  # the file's name of a column, and ours
        self.unused_inside: list[str] = []  # keys of messages that were not read

    def get(self, key: str) -> Any:
        """The value of a key; None where it is missing or null."""
        self.read.add(key)
        return self.values.get(key)

    def has(self, *keys: str) -> bool:
        """Whether one of the keys has a value."""
        return any(self.values.get(key) is not None for key in keys)

    def text(self, key: str) -> str:
        """The text of a key, filled in; "" where it is missing or null."""
        value = self.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            name = f"{key}{self.of}" if self.of else quoted(key)
            raise RowFault(f"{name} is {type(value).__name__}, not text", "put it in quotation marks")
        return self.placeholders.fill(value)

    def text_of_any(self, names: tuple[str, ...]) -> str:
        """The text of the first of `names` that is there; the first is our own name of the column."""
        if self.has(names[0]):
            return self.text(names[0])
        for name in names[1:]:
            if isinstance(self.values.get(name), str):
                self.read_as.append((name, names[0]))
                return self.text(name)
        return self.text(names[0])

    def items(self, key: str) -> list[Any]:
        """The list of a key, perhaps written as JSON; [] where it is missing, null or empty."""
        value = from_json(self.get(key))
        if value is None or value == "":
            return []
        if not isinstance(value, list | tuple):
            raise RowFault(f'"{key}" is {type(value).__name__}, not a list', "correct the row")
        return list(value)

    def unused(self) -> list[str]:
        """Keys with a value that nobody has read."""
        empty = (str, list, tuple, dict)
        own = [
            str(key)
            for key, value in self.values.items()
            if key not in self.read and value is not None and not (isinstance(value, empty) and not value)
        ]
        return [*own, *self.unused_inside]


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
    chooses = set(columns.values()) & set(PREFERENCES) and "rejected" not in columns
    if chooses:  # the user has said which of the answers are learnt
        rest = {key: item for key, item in rest.items() if key not in PREFERENCES}
    return rest | {ours: value[theirs] for ours, theirs in columns.items()}


def parse_rows(
    rows: Iterable[RawRow],
    format: str = "auto",
    placeholders: Placeholders | None = None,
    notes: ParserNotes | None = None,
    on_fault: Callable[[RowFault], None] | None = None,
    preferences: Preferences = "none",
) -> Iterator[Row]:
    """Parse rows. The first row of a file decides the file's format, and every row of it must have it.

    format: a key of PARSERS, or "auto".
    notes: gets what was done without being asked: columns without effect, or read under other names; rows left out.
    on_fault: called for a row that cannot be used, which is then left out; None: such a row is an error.
    preferences: whether rows have two answers, or a label.

    Raises LoraMsError naming up to five faulty rows of a file in one line, after a look at all of them.
    """
    placeholders = placeholders or Placeholders()
    notes = notes or ParserNotes()
    faults = _Faults()
    file: Path | None = None
    asked = None if format == "auto" else format
    file_format = asked
    for row in rows:
        if row.file != file:
            faults.raise_any()
            file = row.file
            file_format = asked
        try:
            if isinstance(row.value, RowFault):
                raise row.value
            answers = answers_of(row.value, preferences)
            name = recognise(answers[0].value, format, preferences)
            file_format = file_format or name
            if name != file_format:
                text = f"the format is {name}, but the first row's is {file_format}"
                raise RowFault(text, "keep one format in one file")
            fields = Fields(answers[0].value, placeholders)
            reason = _not_to_learn(fields)
            parsed = None if reason else PARSERS[name](row.where, fields)
            if isinstance(parsed, Example) and not any(_learnt_turns(parsed)):
                reason = "every assistant turn is marked as not to be learnt"
            if parsed is not None and preferences != "none":
                others = [PARSERS[name](row.where, Fields(answer.value, placeholders)) for answer in answers[1:]]
                parsed = joined([parsed, *others], answers)
        except RowFault as fault:
            if on_fault is None:
                faults.add(row.where, fault)
            else:
                on_fault(fault)
        except LoraMsError:
            raise
        except Exception as fault:  # of a row in a shape that nobody thought of
            raise LoraMsError(f"{row.where}: not readable as a row ({reason_of(fault)})") from fault
        else:
            if reason:
                notes.left_out[reason] += 1
                continue
            notes.add(shown_name(row.file) if row.file else "the dataset", fields.read_as, fields.unused())
            if parsed is not None and not faults.count:
                yield parsed
    faults.raise_any()


def _not_to_learn(row: Fields) -> str:
    """Why a row is left out that says itself that it is not to be learnt; "" where it does not say so."""
    for key in ROW_LEARNT:
        flag = as_flag(row.values.get(key))
        if flag is not None:
            row.read.add(key)
        if flag is False:
            return f"{key} is {row.values[key]!r}"
    return ""


def _learnt_turns(row: Example) -> Iterator[bool]:
    return (message.learnt for message in row.messages if message.role == "assistant")


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
        places: dict[str, list[str]] = {}
        for where, fault in self.first:
            places.setdefault(fault.text, []).append(where)
        parts = [f"{', '.join(found)}: {text}" for text, found in places.items()]
        if self.count > len(self.first):
            parts.append(f"and {self.count - len(self.first)} more such rows")
        advice = dict.fromkeys(part for _, fault in self.first for part in fault.advice.split("; "))
        ordered = sorted(advice, key=lambda part: part.startswith("or "))  # other ways out come last
        raise LoraMsError("; ".join([*parts, *ordered]))


def recognise(value: Any, asked: str = "auto", preferences: Preferences = "none") -> str:
    """Name the format of a row, a key of PARSERS; `asked` is it, unless it is "auto"; preferences: see `parse_rows`."""
    if not isinstance(value, Mapping):
        raise RowFault(f"a row must be an object with keys, not {type(value).__name__}", f"known formats: {FORMATS}")
    if asked == "auto" and preferences == "none":
        _check_preferences(value)
    for name, sets in KEYS:
        if asked in ("auto", name) and any(all(value.get(key) is not None for key in keys) for keys in sets):
            return name
    for name, sets in KEYS:  # a null is no value, but it may show what was meant
        if asked in ("auto", name) and any(all(key in value for key in keys) for keys in sets):
            return name
    keys = ", ".join(quoted(key) for key in value) or "(none)"
    if value.keys() - {"system", "id"} == {"prompt"} and asked in ("auto", "prompt"):
        raise RowFault('no answer: "completion" is missing', NO_ANSWER_ADVICE)
    text = f"keys {keys} fit no format" if asked == "auto" else f"keys {keys} do not fit the format {asked}"
    raise RowFault(text, f"{_suggestion(value)}known formats: {FORMATS}")


def _check_preferences(value: Mapping[str, Any]) -> None:
    """Raises RowFault for rows that say which answers are liked: learnt as they stand, the others would be, too."""
    key = next((key for key in PREFERENCES if value.get(key) is not None), None)
    keys = ("messages", "conversations", "instruction", "completion", *ANSWER)
    conversation = any(value.get(key) is not None for key in keys)
    if key is None and conversation and as_flag(value.get("label")) is not None:
        key = "label"  # KTO's: true for an answer that is liked
    if key is None:
        return
    advice = (
        "objectives: dpo, orpo, simpo or kto learn from it; or give rows with the liked answers alone; or name their "
        "format (format: …) to learn all rows as they stand"
    )
    if isinstance(value.get("chosen"), str):
        question = next((name for name in LIKE_QUESTION if isinstance(value.get(name), str)), None)
        asked = "" if question is None or question in QUESTION else f"instruction: {question}, "
        advice = f"{BOTH_LEARNT}, to learn the chosen answers, name their column (columns: {{{asked}output: chosen}})"
    elif "chosen" in value:
        advice = f"{BOTH_LEARNT}, to learn the chosen conversations, name their column (columns: {{messages: chosen}})"
    raise RowFault(f"preference data (column {quoted(key)}) cannot be learnt as answers", advice)


def _suggestion(value: Mapping[str, Any]) -> str:
    """Which `columns` would make a row of another naming fit, ending in "; "; "" where none is to be seen."""
    for key, names in NAMES.items():
        if names.role in value and names.text in value:
            return f'if these are the messages of one row, write {{"{key}": [...]}}; '
    lists = {key: from_json(item) for key, item in value.items()}
    for key, item in lists.items():
        if isinstance(item, list) and item and isinstance(item[0], Mapping):
            if item[0].keys() & {"role", "from"}:
                return f"if {quoted(key)} is the conversation, set {_columns(messages=key)}; "
            if len(value) == 1:
                return f"if the rows are the list under {quoted(key)}, write that list as the file; "
    texts = {str(key).lower(): key for key, item in value.items() if isinstance(item, str)}
    question = next((texts[name] for name in LIKE_QUESTION if name in texts), None)
    answer = next((texts[name] for name in LIKE_ANSWER if name in texts and texts[name] != question), None)
    if question is not None and answer is not None:
        columns = _columns(instruction=question, output=answer)
        return f"if {quoted(question)} is the question and {quoted(answer)} the answer, set {columns}; "
    text = next((texts[name] for name in LIKE_TEXT if name in texts), None)
    if text is not None:
        return f"if {quoted(text)} is a text to learn as it stands, set {_columns(text=text)}; "
    if len(value) == 1:
        (key, item), *_ = lists.items()
        if isinstance(item, Mapping) and any(item.keys() >= set(keys) for _, sets in KEYS for keys in sets):
            return f"if the rows are the objects under {quoted(key)}, write these alone; "
        if advice := separator_advice(str(key)):
            return f"{advice}; "
    return ""


def _columns(**names: str) -> str:
    """The flag that says which of the file's columns ours are."""
    return f'--train_dataset.columns "{{{", ".join(f"{ours}: {name}" for ours, name in names.items())}}}"'


def _parse_alpaca(where: str, row: Fields) -> Example:
    instruction = row.text_of_any(QUESTION)
    extra = row.text_of_any(EXTRA)
    output = row.text_of_any(ANSWER)
    system = row.text("system")
    if not output.strip():
        raise RowFault(f'no answer: "output" is {"empty" if "output" in row.values else "missing"}', NO_ANSWER_ADVICE)
    if not (instruction + extra).strip():
        raise RowFault('no question: "instruction" is empty', "write the question or remove the row")
    messages = [Message("system", system)] if system else []
    for turn, pair in enumerate(row.items("history"), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RowFault(f'turn {turn} of "history" is no [question, answer] pair of texts', "correct the row")
        if not pair[1].strip():
            raise RowFault(f'no answer: turn {turn} of "history" is empty', NO_ANSWER_ADVICE)
        messages.append(Message("user", row.placeholders.fill(pair[0])))
        messages.append(Message("assistant", row.placeholders.fill(pair[1])))
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    reasoning = _reasoning(row, output)
    messages.append(Message("user", question))
    messages.append(Message("assistant", output, reasoning))
    return Example(where, tuple(messages), input=extra if instruction else "", tools=_tools(row))


def _parse_prompt(where: str, row: Fields) -> Completion | Example:
    prompt = turns_of(row.get("prompt"))
    completion = turns_of(row.get("completion"))
    if prompt is not None and completion is not None:
        return _conversation(where, row, [*prompt, *completion], "completion", NAMES["messages"])
    prompt_text = row.text("prompt")
    completion_text = row.text("completion")
    if not completion_text.strip():
        raise RowFault('no answer: "completion" is empty', NO_ANSWER_ADVICE)
    if not prompt_text.strip():
        raise RowFault('no question: "prompt" is empty', 'write the question, or name the column "text"')
    return Completion(where, prompt_text, completion_text)


def _parse_text(where: str, row: Fields) -> Completion:
    text = row.text("text")
    if not text.strip():
        raise RowFault('"text" is empty', "remove the row")
    return Completion(where, "", text)


def _parse_tokens(where: str, row: Fields) -> TokenRow:
    input_ids = row.get("input_ids")
    if "prompt_len" not in row.values:
        return token_row(where, input_ids, row.get("labels"))
    if "labels" in row.values:
        raise RowFault("both labels and prompt_len are given", "give one of them")
    prompt_len = row.get("prompt_len")
    labels = int_array("input_ids", input_ids).copy()
    if isinstance(prompt_len, bool) or not isinstance(prompt_len, int | np.integer) or prompt_len < 0:
        raise RowFault(f"prompt_len is {prompt_len!r}", "it is the number of prompt tokens, 0 or more")
    if prompt_len >= len(labels):
        raise RowFault(f"no answer: prompt_len is {prompt_len} of {len(labels)} tokens", NO_ANSWER_ADVICE)
    labels[:prompt_len] = IGNORE_INDEX
    return token_row(where, input_ids, labels)


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


# Conversations.


class TurnNames(NamedTuple):
    """The keys of a turn: of its role and of its text."""

    role: str
    text: str


NAMES = {"messages": TurnNames("role", "content"), "conversations": TurnNames("from", "value")}


def _parse_messages(where: str, row: Fields) -> Example:
    return _conversation(where, row, row.items("messages"), "messages", NAMES["messages"])


def _parse_sharegpt(where: str, row: Fields) -> Example:
    return _conversation(where, row, row.items("conversations"), "conversations", NAMES["conversations"])


def _conversation(where: str, row: Fields, turns: list[Any], key: str, names: TurnNames) -> Example:
    """key: of the list of turns; names: of the keys of a turn, in error messages. Either pair of names is read."""
    messages: list[Message] = []
    tools = _tools(row)
    for number, turn in enumerate(turns, start=1):
        found = next(
            (pair for pair in (names, *NAMES.values()) if isinstance(turn, Mapping) and pair.role in turn), None
        )
        if found is None or not {found.text, "tool_calls", "function_call"} & set(turn):
            raise RowFault(f"message {number} is no object with {names.role} and {names.text}", "correct the row")
        fields = Fields(turn, row.placeholders, f" of message {number}")
        message = _message(fields, number, found)
        if message.role == "system":
            tools = tools or _tools(fields)  # as ChatGLM's data has them
        if messages and _continues_calls(messages[-1], message, turns[number - 2], turn, found.role):
            message = _with_more_calls(messages.pop(), message)
        messages.append(message)
        row.unused_inside += [f"{key}[].{unused}" for unused in fields.unused()]
    if not messages:
        raise RowFault(f'no answer: "{key}" is empty', NO_ANSWER_ADVICE)
    if messages[0].role != "system":
        system = row.text("system")
        messages = [Message("system", system)] * bool(system) + messages
    _check_order(messages)
    return Example(where, tuple(messages), tools=tools)


def _message(turn: Fields, number: int, names: TurnNames) -> Message:
    role_name = turn.get(names.role)
    role = ROLES.get(role_name.lower()) if isinstance(role_name, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise RowFault(f"message {number} has the unknown role {quoted(role_name)}", f"known roles: {known}")
    content, reasoning = _content(turn, names.text)
    if role != "assistant":
        for key in (*LEARNT, *NOT_LEARNT):  # no other turn is learnt: only a wish that it were is worth a note
            if as_flag(turn.values.get(key)) is (key in NOT_LEARNT):
                turn.read.add(key)
        name = turn.text("name") if role == "tool" else ""
        call_id = turn.text("tool_call_id") if role == "tool" else ""
        return Message(role, content, name=name, tool_call_id=call_id)
    calls = _tool_calls(turn)
    if calls is None and str(role_name).lower() in CALL_ROLES:
        thought, end, after = content.rpartition(END_THINK)
        calls = _as_calls(after)
        if calls is not None:
            content = ""
            reasoning = reasoning or thought.replace(THINK, "", 1).strip() if end else reasoning
    if not content.strip() and calls is None:
        raise RowFault(f"no answer: the {names.text} of message {number} is empty", NO_ANSWER_ADVICE)
    reasoning = reasoning or _reasoning(turn, content)
    return Message(role, content, reasoning, calls, learnt=_is_learnt(turn, number))


def _content(turn: Fields, key: str) -> tuple[str, str]:
    """Text and reasoning of a turn whose content is a text or a list of parts."""
    parts = turn.values.get(key)
    if not isinstance(parts, list) or not parts:
        return turn.text(key), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("thinking")) if isinstance(part, Mapping) else part
        if kind not in ("text", "thinking", "reasoning", None) or not isinstance(text, str):
            return turn.text(key), ""  # which says that it is no text
        (thoughts if kind in ("thinking", "reasoning") else texts).append(turn.placeholders.fill(text))
    turn.read.add(key)
    return "".join(texts), "\n".join(thoughts)


def _reasoning(fields: Fields, answer: str) -> str:
    """What an assistant thought, from a key of its own; "" where there is none, or the answer holds it already."""
    found = {key: fields.text(key) for key in REASONING if isinstance(fields.values.get(key), str)}
    texts = list(dict.fromkeys(text.strip("\n") for text in found.values() if text.strip()))
    if not texts:
        return ""
    if len(texts) > 1:
        raise RowFault(f"{' and '.join(found)}{fields.of} differ", "keep one of them")
    if "</think>" in answer:
        if "".join(texts[0].split()) in "".join(answer.split()):
            return ""
        raise RowFault(
            f"{next(iter(found))}{fields.of} and a <think> block in the answer are both given", "keep one of them"
        )
    return texts[0]


def _is_learnt(turn: Fields, number: int) -> bool:
    said: dict[str, bool] = {}
    for key in (*LEARNT, *NOT_LEARNT):
        value = turn.get(key)
        if value is None:
            continue
        flag = as_flag(value)
        if flag is None:
            raise RowFault(
                f"{key} of message {number} is {value!r}", "a turn is learnt or not: give 1 or 0, true or false"
            )
        said[key] = flag is not (key in NOT_LEARNT)
    if len(set(said.values())) > 1:
        raise RowFault(f"{' and '.join(said)} of message {number} contradict each other", "keep one of them")
    return all(said.values())


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


# Tools and calls of them, which datasets hold as lists, or as JSON in a text, or both.


def _tools(fields: Fields) -> ToolData | None:
    """The tools of a row; None where there are none."""
    for key in ("tools", "functions"):
        value = fields.get(key)
        items = _parsed_items(value)
        if items:
            return _tool_data(items, value)
        if isinstance(value, str) and value.strip() and isinstance(from_json(value), str):  # in words
            return _tool_data([], value)
    return None


def _tool_data(items: list[Any], value: Any) -> ToolData:
    text = value if isinstance(value, str) else quoted(value)
    check_characters(text)
    return ToolData(items, text)


def _tool_calls(turn: Fields) -> ToolData | None:
    """The calls of an assistant's turn; None where there are none."""
    for key in ("tool_calls", "function_call"):
        value = turn.get(key)
        if value is None:
            continue
        calls = _as_calls(value)
        if calls is not None:
            return calls
        if from_json(value) not in ([], {}, "", None):
            raise RowFault(
                f"{key}{turn.of} holds no call with a name", "give calls as {name, arguments}, or as OpenAI does"
            )
    return None


def _as_calls(value: Any) -> ToolData | None:
    """Calls from a list or an object, perhaps as JSON; None where it holds none, or something else."""
    items = _parsed_items(value)
    if not items or not all(isinstance(item, Mapping) and function_of(item).get("name") for item in items):
        return None
    return _tool_data(items, value)


def _parsed_items(value: Any) -> list[Any]:
    """The entries of a list, or one object as a list, each perhaps written as JSON."""
    value = from_json(value)
    if isinstance(value, Mapping):
        return [value] if value else []
    if not isinstance(value, list | tuple):
        return []
    return [item for item in map(from_json, value) if item]


def _continues_calls(last: Message, message: Message, last_turn: Any, turn: Any, role_key: str) -> bool:
    """Whether a turn is one more call beside the last turn's: some datasets give parallel calls a turn each."""
    roles = [str(one.get(role_key)).lower() for one in (last_turn, turn)]
    both = last.tool_calls is not None and message.tool_calls is not None
    return both and set(roles) <= set(CALL_ROLES) and last.learnt == message.learnt


def _with_more_calls(last: Message, message: Message) -> Message:
    assert last.tool_calls is not None and message.tool_calls is not None
    calls = ToolData(
        [*last.tool_calls.items, *message.tool_calls.items], f"{last.tool_calls.text}\n{message.tool_calls.text}"
    )
    return last._replace(tool_calls=calls)


# format, and sets of keys of which a row of it has one; the first that fits is taken
KEYS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("messages", (("messages",),)),
    ("sharegpt", (("conversations",),)),
    ("alpaca", (("instruction",),)),
    ("tokens", (("input_ids", "labels"), ("input_ids", "prompt_len"))),
    ("prompt", (("prompt", "completion"),)),
    ("text", (("text",),)),
    ("alpaca", tuple((question, answer) for question in QUESTION[1:] for answer in ANSWER)),
)
PARSERS: dict[str, Callable[[str, Fields], Row]] = {
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "messages": _parse_messages,
    "prompt": _parse_prompt,
    "text": _parse_text,
    "tokens": _parse_tokens,
}


def int_array(name: str, values: Any) -> NDArray[np.int64]:
    """A flat list of whole numbers of at most 32 bits, perhaps written as JSON, as an array [n]."""
    try:
        array = np.asarray(from_json(values))
    except ValueError:  # a ragged list of lists
        array = np.asarray([None])
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RowFault(f"{name} is no list of whole numbers", "give a flat list of token ids")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise RowFault(f"{name} holds a number beyond 32 bits", "give a flat list of token ids")
    return array.astype(np.int64)


def check_characters(text: str) -> None:
    """Raises RowFault for a text that is too long, or holds what no tokenizer takes."""
    if len(text) > MOST_BYTES:
        raise too_long()
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair, which no tokenizer takes
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowFault(f"the text holds {half}, half of a character", "remove it") from error
