"""From messages to tokens and labels, with the tokenizer's chat template or else the Alpaca prompt.

Training and chat share `encode_prompt`'s text: what a turn is trained to follow is what it will be asked to follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_ms.data.example import IGNORE_INDEX, Example, Message, TokenRow
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The wording that models trained on Stanford Alpaca's data know.
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class Labelled(NamedTuple):
    """A rendered conversation and the character ranges [start, end) of it that are learnt."""

    text: str
    spans: list[tuple[int, int]]
    ended: bool  # the last span closes with an end token


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> TokenRow:
    """Tokens of a conversation, with labels on every assistant turn and the end token that closes it.

    The text after that end token (ChatML's newline) has no label. A last turn that the template leaves open gets
    tokenizer.eos_token_id, with a label: a model that never learnt to stop does not stop.

    A template may show a past turn otherwise than it was generated: Qwen3 and DeepSeek-R1 drop the reasoning of
    earlier turns. Such a turn cannot be learnt from this text; then only the last turn has labels.

    Raises LoraMsError where the template refuses the messages, or no end token exists.
    """
    labelled = _render_labelled(tokenizer, example)
    boundaries = [boundary for span in labelled.spans for boundary in span]
    ids, positions = _tokenise(tokenizer, labelled.text, boundaries)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    for start, end in zip(positions[::2], positions[1::2], strict=True):
        labels[start:end] = ids[start:end]
    if not labelled.ended:
        if tokenizer.eos_token_id is None:
            raise LoraMsError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
        ids = [*ids, tokenizer.eos_token_id]
        labels = np.append(labels, tokenizer.eos_token_id)
    bos = _default_bos(tokenizer)
    return TokenRow(
        example.where,
        np.array([*bos, *ids], np.int32),
        np.concatenate([np.full(len(bos), IGNORE_INDEX), labels]).astype(np.int32),
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], input: str = "") -> list[int]:
    """Tokens of the prompt for the assistant's next turn after `messages`, which end with a user's.

    input: the tail of the last user message that the Alpaca prompt sets apart; a chat template does not.
    """
    text = _render(tokenizer, "the prompt", _with_preamble(tokenizer, messages, input), True)
    return [*_default_bos(tokenizer), *_ids(tokenizer, text)]


def encode_text(tokenizer: PreTrainedTokenizerBase, instruction: str, system: str | None = None) -> list[int]:
    """Tokens of the prompt for one question, with a system message if given."""
    first = [Message("system", system)] if system else []
    return encode_prompt(tokenizer, [*first, Message("user", instruction)])


def _render_labelled(tokenizer: PreTrainedTokenizerBase, example: Example) -> Labelled:
    messages = _with_preamble(tokenizer, example.messages, example.input)
    end_tokens = _end_tokens(tokenizer)
    text = _render(tokenizer, example.where, messages, False)
    prompt = _render(tokenizer, example.where, messages[:-1], True)
    if not (text.startswith(prompt) and _shows(text[len(prompt) :], messages[-1].content)):
        closing = next((token for token in end_tokens if text.rstrip().endswith(token)), "")
        text = prompt + _continuation(prompt, messages[-1].content) + closing
    earlier: list[tuple[int, int]] = []
    for turn, message in enumerate(messages[:-1]):
        if message.role != "assistant":
            continue
        start = _render(tokenizer, example.where, messages[:turn], True)
        end = _render(tokenizer, example.where, messages[: turn + 1], False)
        if not (end.startswith(start) and text.startswith(end) and _shows(end[len(start) :], message.content)):
            earlier = []
            break
        earlier.append((len(start), _turn_end(end, end_tokens)))
    last = (len(prompt), _turn_end(text, end_tokens))
    return Labelled(text, [*earlier, last], text[: last[1]].endswith(end_tokens))


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
    if tokenizer.chat_template is None:
        return _render_alpaca(messages, generation, tokenizer.eos_token or "")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except Exception as error:  # the template is a program of the model's author: it may raise anything
        reason = " ".join(str(error).split())
        raise LoraMsError(f"{where}: the tokenizer's chat template refuses the messages: {reason}") from error


def _with_preamble(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], input: str) -> list[Message]:
    """For the Alpaca prompt: the preamble as a system message, unless there is one, and `input` under its heading."""
    messages = list(messages)
    if tokenizer.chat_template is not None:
        return messages
    if input:
        last = max(index for index, message in enumerate(messages) if message.role == "user")
        instruction = messages[last].content.removesuffix(f"\n{input}")
        messages[last] = Message("user", f"{instruction}\n\n### Input:\n{input}")
    if messages[0].role == "system":
        return messages
    return [Message("system", ALPACA_PREAMBLE_WITH_INPUT if input else ALPACA_PREAMBLE), *messages]


def _render_alpaca(messages: Sequence[Message], generation: bool, end_token: str) -> str:
    blocks = []
    for message in messages:
        if message.role == "system":
            blocks.append(message.content)
        elif message.role == "user":
            blocks.append(f"### Instruction:\n{message.content}")
        else:
            blocks.append(f"### Response:\n{message.content}{end_token}")
    return "\n\n".join([*blocks, "### Response:\n"] if generation else blocks)


def _default_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A chat template writes its own BOS; elsewhere the tokenizer's habit decides.
    if tokenizer.chat_template is not None or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: rows longer than the model are counted and reported later, not warned of one by one.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, boundaries: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of `text`, and the token position of each character boundary (ascending).

    A boundary is found by tokenising the text before it, as generation does: character offsets will not do, since
    byte-level tokenizers with trim_offsets (Llama 3) leave white space out of them. Where a token would reach over
    the boundary, the text is split there.
    """
    done: list[int] = []  # tokens before `start`
    start = 0
    rest = _ids(tokenizer, text)  # tokens from `start` on
    positions = []
    for boundary in boundaries:
        head = rest if boundary == len(text) else _ids(tokenizer, text[start:boundary])
        positions.append(len(done) + len(head))
        if head != rest[: len(head)]:
            done += head
            start, rest = boundary, _ids(tokenizer, text[boundary:])
    return done + rest, positions
