"""From messages to tokens and labels, with the tokenizer's chat template or else the Alpaca prompt:
Example or Completion -> TokenRow.

What is learnt of an assistant's turn is what a model would have to write there: the text that follows the prompt which
`encode_prompt` makes of the messages before it. Some templates show a past turn otherwise than it was written (Qwen3
and DeepSeek-R1 leave its reasoning out) or put something else before the last question (Mistral its tools). Then one
text cannot hold all turns as they are to be written, and a conversation becomes several rows, each with those turns
labelled that its text shows so.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lora_ms.data.example import (
    END_THINK,
    IGNORE_INDEX,
    REASONING,
    THINK,
    Completion,
    Example,
    Message,
    TokenRow,
    ToolData,
    function_of,
)
from lora_ms.data.templates import ALPACA_PREAMBLE_WITH_INPUT, INPUT_HEADING, TEMPLATES
from lora_ms.errors import LoraMsError
from lora_ms.limits import MEMORY, limited
from lora_ms.reading import read_text, readable
from lora_ms.text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what is counted of assistant turns that are not learnt, or not as a whole
SAID_SO = "assistant turns not learnt, as the data says (weight: 0 and the like)"
ONLY_LAST = "assistant turns not learnt, as label_turns is last"
NOT_MARKED = "assistant turns not learnt: they are outside the {% generation %} marks of the chat template"
NO_REASONING = "assistant turns learnt without their reasoning, which the chat template does not show"
IN_PART = "assistant turns learnt in part: the chat template leaves some of them out of its {% generation %} marks"

GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
MARKS = ("\ue0f5<generation>\ue0f5", "\ue0f5</generation>\ue0f5")  # no text of a user holds these
MARK = re.compile(f"{MARKS[0]}|{MARKS[1]}")


class Encoded(NamedTuple):
    """What became of one Example or Completion."""

    rows: list[TokenRow]
    turns: int  # of the assistant, in all; 0 for a Completion
    notes: Counter[str]  # what was not learnt -> turns


class Turn(NamedTuple):
    """An assistant's turn as the last one of a conversation. Positions are of characters in `text`."""

    text: str  # the whole conversation, this turn included
    start: int  # of the turn: the prompt's length
    end: int  # of the turn, its end token included
    spans: list[tuple[int, int]]  # what is learnt of it, as ranges [start, end)
    ended: bool  # it closes with an end token

    @property
    def edges(self) -> list[int]:
        """Where tokens must not reach over."""
        return sorted({self.start, *(edge for span in self.spans for edge in span), self.end})


class Labelled(NamedTuple):
    """A text, the places at which it is tokenised in parts, and its ranges [start, end) that are learnt."""

    text: str
    edges: list[int]
    spans: list[tuple[int, int]]
    append_end: bool  # with the tokenizer's end token after it, to be learnt


def template_of(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None = None) -> str:
    """The tokenizer's own template; Alpaca's for one without. Of several, "tool_use" for `tools`, else "default".

    Raises LoraMsError where there are several and none of that name.
    """
    if not tokenizer.chat_template:
        return TEMPLATES["alpaca"]
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise LoraMsError(
            f"the tokenizer has chat templates and no default: give --chat_template one of {names}"
        ) from None


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the template `name`: one of ours, of its own, in a file, or Jinja itself; it is saved with the
    tokenizer.

    A named template begins with the tokenizer's begin token where the tokenizer puts it before every text.

    Raises LoraMsError for an unknown name.
    """
    if name in TEMPLATES:
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + TEMPLATES[name]
        return
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in named:
        tokenizer.chat_template = named[name]
        return
    if "{{" in name or "{%" in name:
        tokenizer.chat_template = name
        return
    if not Path(name).is_file():
        known = ", ".join((*TEMPLATES, *sorted(named)))
        raise LoraMsError(f"chat_template {name}: no such file, and none of {known}")
    tokenizer.chat_template = read_text(Path(name))


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its begin token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def encode(
    tokenizer: PreTrainedTokenizerBase, row: Example | Completion, turns: Literal["all", "last"] = "all"
) -> list[TokenRow]:
    """Tokens and labels of one row; see `encode_rows`."""
    return encode_rows(tokenizer, [row], turns)[0].rows


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example | Completion], turns: Literal["all", "last"] = "all"
) -> list[Encoded]:
    """Tokens of conversations, with labels on every assistant turn (or the last), and the end token that closes it.

    The text after that end token (ChatML's newline) has no label. A last turn that the template leaves open gets
    tokenizer.eos_token_id, with a label: a model that never learnt to stop does not stop.

    A template with {% generation %} marks says itself what is learnt of a turn; an end token right after it is, too.
    Of a template without, or whose turn does not go on from its own prompt, it is all that follows the prompt.

    All rows are tokenised in a few calls, which the tokenizers library spreads over the cores.
    Raises LoraMsError where the template refuses the messages, or no end token exists.
    """
    formats: dict[bool, ChatFormat] = {}  # by whether a conversation has tools
    texts: list[list[Labelled]] = []
    encoded = []
    with limited("the chat template", memory=MEMORY) as again:
        for row in rows:
            again()
            notes: Counter[str] = Counter()
            if isinstance(row, Completion):
                texts.append([_completion(tokenizer, row)])
                count = 0
            else:
                with_tools = _has_list(row.tools)
                if with_tools not in formats:
                    formats[with_tools] = ChatFormat.of(tokenizer, with_tools)
                texts.append(_conversation(formats[with_tools], row, turns, notes))
                count = sum(message.role == "assistant" for message in row.messages)
            encoded.append(Encoded([], count, notes))
    flat = [labelled for group in texts for labelled in group]
    tokens = iter(_tokenise_all(tokenizer, flat))
    for row, group, result in zip(rows, texts, encoded, strict=True):
        for labelled in group:
            ids, positions = next(tokens)
            result.rows.append(_token_row(tokenizer, row, labelled, ids, positions))
    return encoded


def _has_list(tools: ToolData | None) -> bool:
    return tools is not None and bool(tools.items)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], input: str = "", tools: ToolData | None = None
) -> list[int]:
    """Tokens of the prompt for the assistant's next turn after `messages`, which end with a user's or a tool's.

    input: the tail of the last user message that the Alpaca prompt sets apart; a chat template does not.
    """
    edges: set[int] = set()
    with limited("the chat template", memory=MEMORY):
        chat = ChatFormat.of(tokenizer, _has_list(tools))
        row = chat.prepared(Example("the prompt", tuple(messages), input, tools), Counter())
        text = chat.render(row, len(row.messages), prompt=True)
        for number, message in enumerate(row.messages):
            if message.role == "assistant":
                turn = chat.turn(row, number)
                if text.startswith(
                    turn.text[: turn.end]
                ):  # split where training splits it: past turns have their tokens
                    edges.update(turn.edges)
    return [*_default_bos(tokenizer), *_tokenise(tokenizer, text, sorted(edges))[0]]


def encode_text(tokenizer: PreTrainedTokenizerBase, instruction: str, system: str | None = None) -> list[int]:
    """Tokens of the prompt for one question, with a system message if given."""
    first = [Message("system", system)] if system else []
    return encode_prompt(tokenizer, [*first, Message("user", instruction)])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a model trained here learns to end its turn with."""
    rows = encode(tokenizer, Example("a turn", (Message("user", "a"), Message("assistant", "b"))))
    return int(rows[-1].labels[rows[-1].learnt[-1]])


def _completion(tokenizer: PreTrainedTokenizerBase, row: Completion) -> Labelled:
    whole = row.prompt + row.completion
    span = (len(row.prompt), len(whole))
    ended = tokenizer.eos_token is not None and whole.rstrip().endswith(tokenizer.eos_token)
    return Labelled(whole, list(span), [span], append_end=not ended)


def _conversation(chat: ChatFormat, row: Example, turns: Literal["all", "last"], notes: Counter[str]) -> list[Labelled]:
    """The texts of a conversation, in the order of their last turns, in which every turn to be learnt is labelled."""
    row = chat.prepared(row, notes)
    numbers = [number for number, message in enumerate(row.messages) if message.role == "assistant"]
    wanted = set()
    for number in numbers:
        if not row.messages[number].learnt:
            notes[SAID_SO] += 1
        elif turns == "last" and number != numbers[-1]:
            notes[ONLY_LAST] += 1
        else:
            wanted.add(number)
    as_written = {number: chat.turn(row, number) for number in numbers}
    for number in wanted:
        turn = as_written[number]
        if not turn.spans:
            notes[NOT_MARKED] += 1
        elif not _shows("".join(turn.text[first:last] for first, last in turn.spans), row.messages[number]):
            notes[IN_PART] += 1
    texts: list[Labelled] = []
    missing = set(wanted)
    for number in reversed(numbers):
        last = as_written[number]
        # turns that this text shows as they were written
        inside = [n for n in numbers if n <= number and last.text.startswith(as_written[n].text[: as_written[n].end])]
        if wanted and not missing & set(inside):
            continue
        labelled = [n for n in inside if n in missing]
        missing -= set(labelled)
        edges = sorted({edge for n in inside for edge in as_written[n].edges})
        spans = [span for n in labelled for span in as_written[n].spans]
        append_end = not last.ended and number in labelled and bool(last.spans)
        texts.append(Labelled(last.text, edges, spans, append_end))
        if not missing:
            break
    return texts[::-1]


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template shows, found out by rendering a conversation made up for it."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    end_tokens: tuple[str, ...]  # that may close a turn
    closing: str = ""  # the end token that closes an assistant's turn; "": none does
    takes_tools: bool = False  # as `tools`, a list; else they are written into the system message
    reasoning_key: str = ""  # under which it takes a turn's reasoning; "": it has none, and reasoning goes into <think>
    calls: CallStyle | None = None  # how it takes calls of tools; None: they are written into the content

    @property
    def marked(self) -> bool:
        """Whether it marks what is learnt, with {% generation %}."""
        return GENERATION.search(self.template) is not None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, with_tools: bool = False) -> ChatFormat:
        """The format of a tokenizer; with_tools: for conversations that have a list of tools."""
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        end_tokens = tuple(token for token in [tokenizer.eos_token, *special] if token)
        chat = cls(tokenizer, template_of(tokenizer, [PROBE_TOOL] if with_tools else None), end_tokens)
        question = {"role": "user", "content": "question"}
        answer = {"role": "assistant", "content": "answer"}
        plain = chat.probe([question, answer]).rstrip()
        takes_tools = with_tools and PROBE in chat.probe([question], [PROBE_TOOL])
        call = {"id": "probe0001", "name": "call", "arguments": {PROBE: 1}}
        calls = None
        for style in CALL_STYLES:
            if PROBE in chat.probe([question, style.message("", [call])]):
                calls = style
                break
        return cls(
            tokenizer,
            chat.template,
            end_tokens,
            closing=next((token for token in end_tokens if plain.endswith(token)), ""),
            takes_tools=takes_tools,
            reasoning_key=next(
                (key for key in REASONING if PROBE in chat.probe([question, {**answer, key: PROBE}])), ""
            ),
            calls=calls,
        )

    def probe(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """The text of messages; "" where the template refuses them."""
        try:
            return self._apply(messages, tools, False)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # the template is a program of the model's author: it may raise anything
            return ""

    def _apply(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, template: str | None = None
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template or self.template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        return str(text)

    def prepared(self, row: Example, notes: Counter[str]) -> Example:
        """The row as the template can show it: what it does not take by itself is written into the texts."""
        messages = [self._shown(message, notes) for message in row.messages]
        tools = row.tools
        if tools is not None and not self.takes_tools:
            system = messages.pop(0).content if messages[0].role == "system" else ""
            messages.insert(0, Message("system", f"{system}\n\n{tools.text}".strip()))
            tools = None
        return Example(row.where, tuple(self._with_input(messages, row.input)), tools=tools)

    def _shown(self, message: Message, notes: Counter[str]) -> Message:
        if message.role != "assistant":
            return message
        content = _without_end(message.content, (self.tokenizer.eos_token or "", self.closing))
        reasoning = message.reasoning
        if reasoning and not self.reasoning_key and (self.marked or END_THINK not in self.template):
            notes[NO_REASONING] += message.learnt
            reasoning = ""
        calls = message.tool_calls
        if calls is not None and self.calls is None:
            content += calls.text
            calls = None
        return message._replace(content=content, reasoning=reasoning, tool_calls=calls)

    def _with_input(self, messages: list[Message], input: str) -> list[Message]:
        """For templates that know Alpaca's "input": it goes under its heading, with the preamble that announces it."""
        if not input or "### Instruction:" not in self.template:
            return messages
        last = max(index for index, message in enumerate(messages) if message.role == "user")
        instruction = messages[last].content.removesuffix(f"\n{input}")
        messages[last] = messages[last]._replace(content=f"{instruction}{INPUT_HEADING}{input}")
        if messages[0].role == "system" or "### Input:" in self.template:
            return messages
        return [Message("system", ALPACA_PREAMBLE_WITH_INPUT), *messages]

    def render(self, row: Example, count: int, prompt: bool, template: str | None = None) -> str:
        """The text of the first `count` messages of a prepared row; prompt: up to where the assistant begins to write.

        Raises LoraMsError where the template refuses them.
        """
        messages = [self._as_dict(message) for message in row.messages[:count]]
        tools = None if row.tools is None else [_as_openai_tool(tool) for tool in row.tools.items]
        try:
            return self._apply(messages, tools, prompt, template)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the template is a program of the model's author: it may raise anything
            reason = shortened(" ".join(str(error).split()), 300)
            raise LoraMsError(f"{row.where}: the chat template refuses the messages: {reason}") from error

    def _as_dict(self, message: Message) -> dict[str, Any]:
        if message.tool_calls is not None and self.calls is not None:
            shown = self.calls.message(message.content, message.tool_calls.items)
        else:
            shown = {"role": message.role, "content": message.content}
        if message.reasoning and self.reasoning_key:
            shown[self.reasoning_key] = message.reasoning
        if message.name:
            shown["name"] = message.name
        if message.tool_call_id:
            shown["tool_call_id"] = message.tool_call_id
        return shown

    def turn(self, row: Example, number: int) -> Turn:
        """The assistant's message of that number as it is to be written after the messages before it."""
        message = row.messages[number]
        prompt = self.render(row, number, prompt=True)
        text, marks = self._with_marks(row, number + 1)
        start = len(prompt)
        if self.marked and text.startswith(prompt):
            spans = [self._with_end_token(text, (max(first, start), last)) for first, last in marks if last > start]
        else:
            if not (text.startswith(prompt) and _shows(text[start:], message)):
                text = self._as_written(message, prompt, text)
            spans = [(start, self._end(text))]
        end = max([self._end(text), *(last for _, last in spans)])
        return Turn(text, start, end, spans, ended=text[:end].endswith(self.end_tokens))

    def _with_marks(self, row: Example, count: int) -> tuple[str, list[tuple[int, int]]]:
        """The text of the first `count` messages, and its ranges between {% generation %} and {% endgeneration %}."""
        template = GENERATION.sub(_mark, self.template)
        pieces = MARK.split(self.render(row, count, prompt=False, template=template))
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return "".join(pieces), list(zip(ends[:-1:2], ends[1::2], strict=True))

    def _with_end_token(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        first, last = span
        after = text[last:]
        blank = len(after) - len(after.lstrip())
        token = next((token for token in self.end_tokens if after[blank:].startswith(token)), "")
        if not token or text[:last].endswith(self.end_tokens):
            return span
        return first, last + blank + len(token)

    def _end(self, text: str) -> int:
        """Where the last turn of a text ends: after its end token, or at the end of the text."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self.end_tokens) else len(text)

    def _as_written(self, message: Message, prompt: str, text: str) -> str:
        """`prompt` and what the assistant writes after it, where the template's own `text` does not go on from it.

        A prompt that opens <think> (DeepSeek-R1's) has it closed by the answer. Reasoning that the template leaves out
        of every turn is put back before the answer.
        """
        reasoning, answer = _split_reasoning(message)
        opened = prompt.rstrip().endswith(THINK)
        heading = prompt[: prompt.rindex(THINK)] if opened else prompt
        written = text[len(heading) :]  # the turn, as the template has it
        if not (text.startswith(heading) and END_THINK not in written and _shows(written, answer)):
            closing = next((token for token in self.end_tokens if text.rstrip().endswith(token)), "")
            calls = "" if answer.tool_calls is None else answer.tool_calls.text
            written = answer.content + calls + closing
        if opened:
            inside = reasoning.lstrip().removeprefix(THINK).lstrip("\n") if reasoning else f"\n{END_THINK}\n\n"
            return prompt + inside + written.lstrip()
        return prompt + (reasoning + written.lstrip() if reasoning else written)


class CallStyle(NamedTuple):
    """One of the ways in which chat templates take a turn with calls of tools; all have OpenAI's names."""

    arguments_as_text: bool  # JSON, as OpenAI sends it; else an object
    empty_content: str | None  # the content where there is no text

    def message(self, content: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The message for the template."""
        shown = [self._call(call) for call in calls]
        return {"role": "assistant", "content": content or self.empty_content, "tool_calls": shown}

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = function_of(call)
        arguments = function.get("arguments", function.get("parameters", {}))
        if self.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.arguments_as_text and isinstance(arguments, str):
            arguments = _object(arguments)
        named = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        return {"id": call["id"], **named} if call.get("id") is not None else named


# tried in this order
CALL_STYLES = (CallStyle(False, ""), CallStyle(False, None), CallStyle(True, ""), CallStyle(True, None))
PROBE = "lora_ms_probe"
PROBE_TOOL = {
    "type": "function",
    "function": {"name": PROBE, "description": "", "parameters": {"type": "object", "properties": {}}},
}


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _as_openai_tool(tool: Any) -> Any:
    """A tool as OpenAI's interface sends it, and so as templates meet it in use: {type: function, function: …}."""
    if isinstance(tool, Mapping) and "name" in tool and "function" not in tool:
        return {"type": "function", "function": dict(tool)}
    return tool


def _mark(tag: re.Match[str]) -> str:
    # in an if, so that white space around it is handled as around any other tag
    return f"{{%{tag[1]} if true %}}{MARKS[bool(tag[2])]}{{% endif {tag[3]}%}}"


def _without_end(content: str, end_tokens: Sequence[str]) -> str:
    """The content without an end token that the template writes after it, too."""
    stripped = content.rstrip()
    for token in end_tokens:
        if token and stripped.endswith(token) and stripped != token:
            return stripped.removesuffix(token)
    return content


def _split_reasoning(message: Message) -> tuple[str, Message]:
    """A turn's reasoning, in <think> and with the white space after it, and the turn without it."""
    if message.reasoning:
        return f"{THINK}\n{message.reasoning}\n{END_THINK}\n\n", message._replace(reasoning="")
    before, tag, after = message.content.rpartition(END_THINK)
    if not tag:
        return "", message
    answer = after.lstrip()
    return before + tag + after[: len(after) - len(answer)], message._replace(content=answer)


def _shows(turn: str, message: Message) -> bool:
    """Whether a text has all that a turn has. Templates strip and re-space it; what counts is that no word is gone."""
    reasoning, answer = _split_reasoning(message)
    squeezed = _squeezed(turn)
    place = 0
    for part in (reasoning, answer.content):  # one after the other
        place = squeezed.find(_squeezed(part), place)
        if place < 0:
            return False
        place += len(_squeezed(part))
    calls = () if message.tool_calls is None else message.tool_calls.items
    return all(_squeezed(str(function_of(call).get("name", ""))) in squeezed for call in calls)


def _squeezed(text: str) -> str:
    return "".join(text.replace(THINK, "").replace(END_THINK, "").split())


def _default_bos(tokenizer: PreTrainedTokenizerBase, row: Example | Completion | None = None) -> list[int]:
    """The begin token, where neither the template nor a text that was rendered before has written it."""
    if isinstance(row, Completion):
        if tokenizer.bos_token and (row.prompt + row.completion).startswith(tokenizer.bos_token):
            return []
    elif tokenizer.chat_template is not None:
        return []
    return [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []


def _token_row(
    tokenizer: PreTrainedTokenizerBase,
    row: Example | Completion,
    labelled: Labelled,
    ids: list[int],
    positions: dict[int, int],
) -> TokenRow:
    """positions: of each edge of the text, in tokens."""
    bos = _default_bos(tokenizer, row)
    end = [tokenizer.eos_token_id] if labelled.append_end else []
    if end == [None]:
        raise LoraMsError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    whole = np.array([*bos, *ids, *end], np.int32)
    labels = np.full(len(whole), IGNORE_INDEX, np.int32)
    for first, last in labelled.spans:
        part = slice(len(bos) + positions[first], len(bos) + positions[last])
        labels[part] = whole[part]
    if end:
        labels[-1] = whole[-1]
    return TokenRow(row.where, whole, labels, row.liked)


def _tokenise_all(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Labelled]
) -> list[tuple[list[int], dict[int, int]]]:
    """Token ids of each text, and the token position of each of its edges; see `_tokenise`."""
    whole = _ids(tokenizer, [labelled.text for labelled in texts])
    heads = iter(_ids(tokenizer, [labelled.text[:edge] for labelled in texts for edge in labelled.edges if edge]))
    found = []
    for labelled, ids in zip(texts, whole, strict=True):
        before = [next(heads) if edge else [] for edge in labelled.edges]
        positions = [len(head) for head in before]
        if any(head != ids[: len(head)] for head in before):
            ids, positions = _tokenise(tokenizer, labelled.text, labelled.edges)
        found.append((ids, dict(zip(labelled.edges, positions, strict=True))))
    return found


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of `text`, and the token position of each edge (a position in characters, ascending).

    A position is found by tokenising the text before the edge, as generation does: character offsets will not do, since
    byte-level tokenizers with trim_offsets (Llama 3) leave white space out of them. Where a token would reach over
    the edge, the text is split there. The text before an edge is looked at from its last special token on, which no
    token reaches over: the time grows with the text, and not with its square.
    """
    starts = _special_places(tokenizer, text, edges)
    whole, *parts = _ids(tokenizer, [text, *(text[a:b] for a, b in pairwise([*starts, len(text)]))])
    if [token for part in parts for token in part] != whole:
        starts, parts = [0], [whole]
    ends = [*starts[1:], len(text)]
    done: list[int] = []  # tokens before `start`
    number = 0  # of the part
    start = 0
    rest = parts[0]  # tokens from `start` to the end of the part
    positions = []
    for edge in edges:
        while edge >= ends[number] and number + 1 < len(parts):
            done += rest
            number += 1
            start = starts[number]
            rest = parts[number]
        head = rest if edge == len(text) else _ids(tokenizer, [text[start:edge]])[0]
        positions.append(len(done) + len(head))
        if head != rest[: len(head)]:
            done += head
            start = edge
            rest = _ids(tokenizer, [text[start : ends[number]]])[0]
    return [*done, *rest, *(token for part in parts[number + 1 :] for token in part)], positions


def _special_places(tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int]) -> list[int]:
    """Where special tokens begin that change nothing around them, and hold no edge; and 0."""
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content and not (token.lstrip or token.rstrip or token.single_word)
    ]
    if not tokens:
        return [0]
    found = {0}
    for match in re.finditer("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), text):
        first, last = match.span()
        if bisect_right(edges, first) == bisect_left(edges, last):
            found.add(first)
    return sorted(found)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    with readable("the text", "tokens"):  # the template or the tokenizer may hold half a character
        if not tokenizer.is_fast:
            # verbose=False: rows longer than the model are counted and reported later, not warned of one by one.
            return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        backend = tokenizer.backend_tokenizer  # in parallel over the cores, and without offsets: nothing here needs any
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
