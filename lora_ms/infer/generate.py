"""Answers to prompts: as tokens (``Generator``), and as text (``Speaker``)."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from mindspore import nn
from numpy.typing import NDArray

from lora_ms.data.example import Message
from lora_ms.data.template import encode_prompt, end_of_turn
from lora_ms.errors import LoraMsError
from lora_ms.infer.cached_model import PIECE, cache_length
from lora_ms.infer.engine import ROWS, Adapters, Engine, Finish, Request, check_prompts, prompt_name
from lora_ms.infer.sampling import Sampling
from lora_ms.infer.text_stream import TextStream


class Generator:
    """Tokens in, tokens out, by ``model`` (a ``CausalLM``); keeps the engines and their graphs between calls.

    Args:
        weights_stay: whether the model computes the same in all calls: then the beginnings of texts that it has read
            are not computed again.
    """

    def __init__(self, model: nn.Cell, weights_stay: bool = False):
        self.model = model.set_train(False)
        self.weights_stay = weights_stay
        self.engines: list[Engine] = []
        self.adapters: Adapters | None = None
        self.adapter_names: tuple[str, ...] | None = None

    def with_adapters(self, adapters: Adapters, names: Sequence[str]) -> "Generator":
        """A copy, with the same graphs, that answers the prompt of each row with the adapter of that name.

        adapters: those that live in the model now, for as many lines as there are names.
        """
        found = copy(self)
        found.adapters = adapters
        found.adapter_names = tuple(names)
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int] = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, the end token included where one came.

        What a row answers does not depend on the others, nor on its place among them: it has a limit and a random
        stream of its own; the second of two equal prompts gets another stream.

        Args:
            prompts: token ids, of any lengths, at least one each; all are generated at once.
            max_new_tokens: most new tokens: one limit for all rows, or a list of one for each row.
            eos_token_ids: a row ends with the first of these.
            on_token: called with (row, token) as soon as a token is known.

        Raises:
            LoraMsError: an empty prompt, or an id that the model's vocabulary does not have; no token can be drawn.
        """
        check_prompts(prompts, self.model.config.vocab_size)
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        requests = self.requests(prompts, limits, sampling or Sampling(), eos_token_ids)
        engine = self.engine_for(requests, len(requests))
        if not self.weights_stay:
            engine.forget()
        answers: list[list[int]] = [[] for _ in prompts]
        try:
            rows = {engine.submit(request): row for row, request in enumerate(requests) if request.max_new_tokens > 0}
            for event in engine.run():
                if event.error:
                    raise LoraMsError(f"{prompt_name(rows[event.id] + 1, len(prompts))}: {event.error}")
                if event.token is not None:
                    answers[rows[event.id]].append(event.token)
                    if on_token is not None:
                        on_token(rows[event.id], event.token)
        finally:
            engine.cancel_all()
        return answers

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        eos_token_ids: Sequence[int] = (),
    ) -> list[Request]:
        """What ``generate`` asks an engine: of equal prompts, each draws its own random numbers."""
        names = [None] * len(prompts) if self.adapter_names is None else self.adapter_names
        before: Counter[tuple[int, ...]] = Counter()
        found = []
        for prompt, limit, name in zip(prompts, limits, names, strict=True):
            ids = tuple(int(token) for token in prompt)
            found.append(Request(ids, limit, sampling, tuple(eos_token_ids), name, sample=before[ids]))
            before[ids] += 1
        return found

    def engine_for(self, requests: Sequence[Request], rows: int) -> Engine:
        """One with so many rows, and slots for all tokens of any of ``requests``: one that is compiled, where it has
        them."""
        needed = max(len(request.prompt) + max(request.max_new_tokens, 0) for request in requests)
        needed += len(self.model.leading_ids)
        needed = -(-needed // PIECE) * PIECE  # prompts are read by whole pieces
        for engine in sorted(self.engines, key=lambda engine: engine.rows):
            if engine.rows >= rows and engine.length >= needed:
                return engine
        length = cache_length(self.model, rows, needed)
        self.engines.append(Engine(self.model, rows, length, self.adapters))
        return self.engines[-1]


@dataclass(frozen=True)
class GeneratedAnswer:
    """The answer to one prompt."""

    text: str
    finish: Finish  # why it ended


class Speaker:
    """Text in, text out: prompts by the chat template, answers streamed as whole characters.

    Args:
        generator: around the model.
        tokenizer: with a chat template, or the Alpaca prompt is used.
        max_new_tokens: length of the longest answer.
        max_length: longest prompt and answer together, in tokens.
        more_ends: ids that end an answer, besides the tokenizer's, the model's and the chat template's own.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        max_length: int,
        more_ends: Sequence[int] = (),
    ):
        self.generator = generator
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.max_length = max_length
        self.calls = 0
        ends = {tokenizer.eos_token_id, *generator.model.config.eos_token_ids, *more_ends, end_of_turn(tokenizer)}
        self.eos_token_ids = tuple(sorted(end for end in ends if end is not None))

    def answers(
        self, conversations: Sequence[Sequence[Message]], show: Callable[[str], None] | None = None
    ) -> list[str]:
        """The assistant's next turn in each conversation, all in one batch; ``show`` streams the first of them."""
        return self.continued([encode_prompt(self.tokenizer, turns) for turns in conversations], show)

    def continued(self, prompts: Sequence[Sequence[int]], show: Callable[[str], None] | None = None) -> list[str]:
        """What follows each prompt, given as tokens; see ``answers``.

        Raises:
            LoraMsError: a prompt that leaves no room for an answer, is empty, or has ids beyond the vocabulary.
        """
        limits = [self.limit(prompt, number, len(prompts)) for number, prompt in enumerate(prompts, 1)]
        stream = TextStream(self.tokenizer)

        def show_first(row: int, token: int) -> None:
            if show is not None and row == 0:
                show(stream.add(token))

        new = self.generator.generate(
            prompts,
            max_new_tokens=limits,
            sampling=self._sampling(),
            eos_token_ids=self.eos_token_ids,
            on_token=show_first,
        )
        if show is not None:
            show(stream.finish())
        return [self._text(tokens) for tokens in new]

    def in_turn(self, prompts: Sequence[Sequence[int]], first: int = 0) -> Iterator[GeneratedAnswer]:
        """The answers to any number of prompts, from the one at index ``first`` on, in their order.

        As many run at once as there are rows; each is the one that ``continued`` gives.

        Raises:
            LoraMsError: as ``continued``, or an answer cannot be drawn.
        """
        limits = [self.limit(prompt, number, len(prompts)) for number, prompt in enumerate(prompts, 1)]
        requests = self.generator.requests(prompts, limits, self._sampling(), self.eos_token_ids)
        engine = self.generator.engine_for(requests, min(len(requests), ROWS))
        tokens: dict[int, list[int]] = {}
        ended: dict[int, Finish] = {}
        due = 0
        for number, event in engine.events_of(requests[first:]):
            if event.error:
                raise LoraMsError(f"{prompt_name(first + number + 1, len(prompts))}: {event.error}")
            if event.token is not None:
                tokens.setdefault(number, []).append(event.token)
            if event.finish is not None:
                ended[number] = event.finish
            while due in ended:
                yield GeneratedAnswer(self._text(tokens.pop(due, [])), ended.pop(due))
                due += 1

    def _sampling(self) -> Sampling:
        """Of the next call: another answer when asked again."""
        self.calls += 1
        return replace(self.sampling, seed=self.sampling.seed + self.calls)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def limit(self, prompt: Sequence[int], number: int = 1, count: int = 1) -> int:
        """Most new tokens after ``prompt``, the one of this number among ``count``.

        Raises:
            LoraMsError: not one fits.
        """
        if len(prompt) >= self.max_length:
            raise LoraMsError(
                f"{prompt_name(number, count)} has {len(prompt):,} tokens, and the model takes {self.max_length:,} "
                "with the answer: shorten it"
            )
        return min(self.max_new_tokens, self.max_length - len(prompt))

    def prompt_length(self, conversation: Sequence[Message]) -> int:
        """Tokens of the prompt that ``answers`` would build."""
        return len(encode_prompt(self.tokenizer, conversation))


def pad_rows(
    prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]], pad_id: int, width: int
) -> NDArray[np.int32]:
    """[batch, width + new]: prompts padded on the left to ``width``, answers on the right to the longest."""
    longest = max(map(len, new))
    out = np.full((len(prompts), width + longest), pad_id, np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, new, strict=True)):
        out[row, width - len(prompt) : width] = prompt
        out[row, width : width + len(answer)] = answer
    return out
