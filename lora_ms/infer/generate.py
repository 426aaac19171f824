"""Generation with a key-value cache: one graph for the prompt's length bucket, one for the step."""

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError
from lora_ms.infer.sampling import Sampling, choose
from lora_ms.nn.graph import Graph
from lora_ms.nn.kv_cache import KVCache

SHORTEST_BUCKET = 32  # tokens; prompts are padded to this times a power of two
CACHE_UNIT = 64  # tokens; the cache's length is a multiple of this


def prompt_bucket(length: int) -> int:
    """Padded length of a prompt of ``length`` tokens: few lengths, few compilations."""
    bucket = SHORTEST_BUCKET
    while bucket < length:
        bucket *= 2
    return bucket


class _Step(Graph):
    """input_ids [b, s], start [], padding [b] -> (logits [b, v], likeliest token [b, 1]) of the next token."""

    def __init__(self, model: nn.Cell, batch: int, length: int):
        super().__init__(auto_prefix=False)
        c = model.config
        self.model = model
        self.cache = KVCache(
            num_layers=c.num_hidden_layers,
            batch=batch,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            length=length,
            head_dim=c.head_dim,
            dtype=model.model.stream,
            operators=model.operators,
        )
        self.argmax = ops.Argmax(-1, ms.int32)

    def construct(self, input_ids: Tensor, start: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.next_logits(input_ids, self.cache, start, padding)
        return logits, self.argmax(logits).reshape((-1, 1))


class Generator:
    """Generates with ``model`` (a ``CausalLM``); keeps the compiled graphs between calls."""

    def __init__(self, model: nn.Cell):
        self.model = model.set_train(False)
        self.steps: dict[tuple[int, int], _Step] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, the end token included where one came.

        Args:
            prompts: token ids, of any lengths, at least one each; all are generated in one batch.
            eos_token_ids: a row ends with the first of these.
            on_token: called with (row, token) as soon as a token is known.

        Raises:
            LoraMsError: an empty prompt.
        """
        sampling = sampling or Sampling()
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise LoraMsError("a prompt is empty: give at least one token")
        batch, longest = len(prompts), prompt_bucket(max(map(len, prompts)))
        length = -(-(longest + max_new_tokens) // CACHE_UNIT) * CACHE_UNIT
        if (batch, length) not in self.steps:
            self.steps[batch, length] = _Step(self.model, batch, length).set_train(False)
        step = self.steps[batch, length]
        ids = np.zeros((batch, longest), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
        padding = Tensor(np.array([longest - len(prompt) for prompt in prompts], np.int32))
        rows = [_Row(prompt, np.random.default_rng([sampling.seed, i])) for i, prompt in enumerate(prompts)]
        newest, start = Tensor(ids), 0
        for _ in range(max_new_tokens):
            logits, best = step(newest, Tensor(start, ms.int32), padding)
            start = longest if start == 0 else start + 1
            if sampling.needs_logits:
                values = logits.asnumpy()
                tokens = [choose(values[i], np.array(r.all), sampling, r.rng) for i, r in enumerate(rows)]
                newest = Tensor(np.array(tokens, np.int32).reshape(-1, 1))
            else:
                newest, tokens = best, best.asnumpy()[:, 0].tolist()
            for index, (state, token) in enumerate(zip(rows, tokens, strict=True)):
                if state.ended:
                    continue
                state.add(token, eos_token_ids)
                if on_token is not None:
                    on_token(index, token)
            if all(state.ended for state in rows):
                break
        return [state.new for state in rows]


class _Row:
    """One prompt and what has come of it."""

    def __init__(self, prompt: Sequence[int], rng: np.random.Generator):
        self.all, self.ended, self.rng = list(prompt), False, rng
        self.new: list[int] = []

    def add(self, token: int, eos_token_ids: Sequence[int]) -> None:
        self.all.append(token)
        self.new.append(token)
        self.ended = token in eos_token_ids


def pad_rows(
    prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]], pad_id: int, width: int
) -> NDArray[np.int32]:
    """[batch, width + new]: prompts padded on the left to ``width``, answers on the right to the longest."""
    before, after = width, max(map(len, new))
    out = np.full((len(prompts), before + after), pad_id, np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, new, strict=True)):
        out[row, before - len(prompt) : before] = prompt
        out[row, before : before + len(answer)] = answer
    return out
