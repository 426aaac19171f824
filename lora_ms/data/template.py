"""From messages to tokens and labels, with the tokenizer's chat template or else the Alpaca prompt:
Example or Completion -> TokenRow.

Training and chat share `encode_prompt`'s text: what a turn is trained to follow is what it will be asked to follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lora_ms.data.example import IGNORE_INDEX, Completion, Example, Message, TokenRow
from lora_ms.data.templates import ALPACA_PREAMBLE_WITH_INPUT, INPUT_HEADING, TEMPLATES
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template; Alpaca's for one without."""
    return tokenizer.chat_template or TEMPLATES["alpaca"]


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the template `name`, or the one in the file of that name; it is saved with the tokenizer.

    A named template begins with the tokenizer's begin token where the tokenizer puts it before every text.

    Raises LoraMsError for an unknown name.
    """
    if name in TEMPLATES:
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + TEMPLATES[name]
        return
    if not Path(name).is_file():
        raise LoraMsError(f"chat_template {name}: no such file, and none of {', '.join(TEMPLATES)}")
    try:
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraMsError(f"chat_template {name}: not readable as UTF-8 text") from error


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its begin token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


class Labelled(NamedTuple):
    """A rendered conversation and the character ranges [start, end) of it that are learnt."""

    text: str
    spans: list[tuple[int, int]]
    ended: bool  # the last span closes with an end token
    not_learnt: int = 0  # how many of the first spans are not learnt after all


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example | Completion, turns: Literal["all", "last"] = "all"
) -> TokenRow:
    """Tokens and labels of one row; see `encode_rows`."""
    return encode_rows(tokenizer, [example], turns)[0]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example | Completion], turns: Literal["all", "last"] = "all"
) -> list[TokenRow]:
    """Tokens of conversations, with labels on every assistant turn (or the last), and the end token that closes it.

    The text after that end token (ChatML's newline) has no label. A last turn that the template leaves open gets
    tokenizer.eos_token_id, with a label: a model that never learnt to stop does not stop.

    A template may show a past turn otherwise than it was generated: Qwen3 and DeepSeek-R1 drop the reasoning of
    earlier turns. Such a turn cannot be learnt from this text; then only the last turn has labels.

    All rows are tokenised in a few calls, which the tokenizers library spreads over the cores.
    Raises LoraMsError where the template refuses the messages, or no end token exists.
    """
    rendered = [_labelled(tokenizer, row, turns) for row in rows]
    texts = [labelled.text for labelled in rendered]
    whole = _ids(tokenizer, texts)
    heads = [labelled.text[:edge] for labelled in rendered for edge in _edges(labelled.spans)]
    lengths = iter(_ids(tokenizer, [head for head in heads if head]))
    encoded = []
    for row, labelled, ids in zip(rows, rendered, whole, strict=True):
        boundaries = _edges(labelled.spans)
        before = [next(lengths) if boundary else [] for boundary in boundaries]
        positions = [len(head) for head in before]
        if any(head != ids[: len(head)] for head in before):
            ids, positions = _tokenise(tokenizer, labelled.text, boundaries)
        encoded.append(_token_row(tokenizer, row, ids, positions[2 * labelled.not_learnt :], labelled.ended))
    return encoded


def _token_row(
    tokenizer: PreTrainedTokenizerBase,
    row: Example | Completion,
    ids: list[int],
    positions: list[int],
    ended: bool,
) -> TokenRow:
    end = [] if ended else [tokenizer.eos_token_id]
    if end == [None]:
        raise LoraMsError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    bos = _default_bos(tokenizer, row)
    whole = np.array([*bos, *ids, *end], np.int32)
    labels = np.full(len(whole), IGNORE_INDEX, np.int32)
    for first, last in zip(positions[::2], positions[1::2], strict=True):
        part = slice(len(bos) + first, len(bos) + last)
        labels[part] = whole[part]
    if end:
        labels[-1] = whole[-1]
    return TokenRow(row.where, whole, labels)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], input: str = "") -> list[int]:
    """Tokens of the prompt for the assistant's next turn after `messages`, which end with a user's.

    input: the tail of the last user message that the Alpaca prompt sets apart; a chat template does not.
    """
    messages = _with_input(tokenizer, messages, input)
    text = _render(tokenizer, "the prompt", messages, True)
    # split where training splits it, so that past turns have the tokens that they had
    spans = _earlier(tokenizer, "the prompt", text, messages)
    return [*_default_bos(tokenizer), *_tokenise(tokenizer, text, _edges(spans))[0]]


def encode_text(tokenizer: PreTrainedTokenizerBase, instruction: str, system: str | None = None) -> list[int]:
    """Tokens of the prompt for one question, with a system message if given."""
    first = [Message("system", system)] if system else []
    return encode_prompt(tokenizer, [*first, Message("user", instruction)])


def _edges(spans: Sequence[tuple[int, int]]) -> list[int]:
    return [edge for span in spans for edge in span]


def _labelled(tokenizer: PreTrainedTokenizerBase, row: Example | Completion, turns: str) -> Labelled:
    if isinstance(row, Completion):
        whole = row.prompt + row.completion
        return Labelled(whole, [(len(row.prompt), len(whole))], False)
    messages = _with_input(tokenizer, row.messages, row.input)
    end_tokens = _end_tokens(tokenizer)
    text = _render(tokenizer, row.where, messages, False)
    prompt = _render(tokenizer, row.where, messages[:-1], True)
    if not (text.startswith(prompt) and _shows(text[len(prompt) :], messages[-1].content)):
        closing = next((token for token in end_tokens if text.rstrip().endswith(token)), "")
        text = prompt + _continuation(prompt, messages[-1].content) + closing
    last = (len(prompt), _turn_end(text, end_tokens))
    earlier = _earlier(tokenizer, row.where, text, messages[:-1])
    return Labelled(
        text, [*earlier, last], text[: last[1]].endswith(end_tokens), len(earlier) if turns == "last" else 0
    )


def _earlier(
    tokenizer: PreTrainedTokenizerBase, where: str, text: str, messages: Sequence[Message]
) -> list[tuple[int, int]]:
    """Character ranges of past assistant turns; none where the text shows one otherwise than it was generated."""
    spans = []
    end_tokens = _end_tokens(tokenizer)
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = _render(tokenizer, where, messages[:turn], True)
        end = _render(tokenizer, where, messages[: turn + 1], False)
        if not (end.startswith(start) and text.startswith(end) and _shows(end[len(start) :], message.content)):
            return []
        spans.append((len(start), _turn_end(end, end_tokens)))
    return spans


def _continuation(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt. A prompt that opens <think> (DeepSeek-R1's) has it closed by the answer."""
    if not prompt.rstrip().endswith("<think>"):
        return answer
    if "</think>" in answer:
        return answer.lstrip().removeprefix("<think>").lstrip("\n")
    return f"\n</think>\n\n{answer}"


def _shows(turn: str, content: str) -> bool:
    # Templates strip and re-space a turn; what counts is that none of its words is gone.
    return "".join(content.split()) in "".join(turn.split())


def _turn_end(text: str, end_tokens: tuple[str, ...]) -> int:
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(end_tokens) else len(text)


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(token for token in [tokenizer.eos_token, *special] if token)


def _render(tokenizer: PreTrainedTokenizerBase, where: str, messages: Sequence[Message], generation: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    template = template_of(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
    except Exception as error:  # the template is a program of the model's author: it may raise anything
        reason = " ".join(str(error).split())
        raise LoraMsError(f"{where}: the chat template refuses the messages: {reason}") from error
    return str(text)


def _with_input(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], input: str) -> list[Message]:
    """For templates that know Alpaca's "input": it goes under its heading, with the preamble that announces it."""
    messages = list(messages)
    template = template_of(tokenizer)
    if not input or "### Instruction:" not in template:
        return messages
    last = max(index for index, message in enumerate(messages) if message.role == "user")
    instruction = messages[last].content.removesuffix(f"\n{input}")
    messages[last] = Message("user", f"{instruction}{INPUT_HEADING}{input}")
    if messages[0].role == "system" or "### Input:" in template:
        return messages
    return [Message("system", ALPACA_PREAMBLE_WITH_INPUT), *messages]


def _default_bos(tokenizer: PreTrainedTokenizerBase, row: Example | Completion | None = None) -> list[int]:
    # A chat template writes its own BOS; elsewhere the tokenizer's habit decides.
    if tokenizer.chat_template is not None and not isinstance(row, Completion):
        return []
    return [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    if not tokenizer.is_fast:
        # verbose=False: rows longer than the model are counted and reported later, not warned of one by one.
        return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    backend = tokenizer.backend_tokenizer  # in parallel over the cores, and without offsets, which nothing here needs
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, boundaries: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of `text`, and the token position of each character boundary (ascending).

    A boundary is found by tokenising the text before it, as generation does: character offsets will not do, since
    byte-level tokenizers with trim_offsets (Llama 3) leave white space out of them. Where a token would reach over
    the boundary, the text is split there.
    """
    done: list[int] = []  # tokens before `start`
    start = 0
    rest = _ids(tokenizer, [text])[0]  # tokens from `start` on
    positions = []
    for boundary in boundaries:
        head = rest if boundary == len(text) else _ids(tokenizer, [text[start:boundary]])[0]
        positions.append(len(done) + len(head))
        if head != rest[: len(head)]:
            done += head
            start, rest = boundary, _ids(tokenizer, [text[boundary:]])[0]
    return done + rest, positions
