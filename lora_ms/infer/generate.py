"""Whole answers to several prompts, by an engine that is kept between calls."""

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
from mindspore import nn
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError
from lora_ms.infer.cached_model import PIECE, cache_length
from lora_ms.infer.engine import Adapters, Engine, Request, check_prompts, prompt_name
from lora_ms.infer.sampling import Sampling


class Generator:
    """Generates with ``model`` (a ``CausalLM``); keeps the compiled graphs between calls.

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
