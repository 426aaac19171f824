"""Generation with a key-value cache: one graph for the prompt's length bucket, one for the step."""

from collections import Counter
from collections.abc import Callable, Sequence
from zlib import crc32

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


def prompt_name(number: int, count: int) -> str:
    """How errors call a prompt, the one of this number among ``count``."""
    return f"prompt {number}" if count > 1 else "the prompt"


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises LoraMsError where there is no prompt, an empty one, or an id out of the vocabulary."""
    for number, prompt in enumerate(prompts or [()], 1):
        name = prompt_name(number, len(prompts))
        if not len(prompt):
            raise LoraMsError(f"{name} is empty: give at least one token")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise LoraMsError(
                f"{name}: token id {wrong[0]} does not exist in a vocabulary of {vocab_size}; "
                "is the tokenizer another model's?"
            )


def random_streams(prompts: Sequence[Sequence[int]], seed: int) -> list[np.random.Generator]:
    """A random stream for each prompt, by its tokens; the second of two equal prompts gets another."""
    streams: list[np.random.Generator] = []
    before: Counter[bytes] = Counter()
    for prompt in prompts:
        tokens = np.asarray(prompt, np.int32).tobytes()
        streams.append(np.random.default_rng([seed, crc32(tokens), before[tokens]]))
        before[tokens] += 1
    return streams


class _Step(Graph):
    """input_ids [b, s], start [], padding [b] -> (logits [b, v], likeliest token [b, 1]) of the next token.

    start: the cache slot of the first of the s tokens. padding: how many slots at the left of a line are padding.
    """

    title = "generation"

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
        max_new_tokens: int | Sequence[int] = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, the end token included where one came.

        What a row answers does not depend on the others, nor on its place among them: it has a limit and a random
        stream of its own.

        Args:
            prompts: token ids, of any lengths, at least one each; all are generated in one batch.
            max_new_tokens: most new tokens: one limit for all rows, or a list of one for each row.
            eos_token_ids: a row ends with the first of these.
            on_token: called with (row, token) as soon as a token is known.

        Raises:
            LoraMsError: an empty prompt, or an id that the model's vocabulary does not have.
        """
        sampling = sampling or Sampling()
        check_prompts(prompts, self.model.config.vocab_size)
        batch = len(prompts)
        limits = [max_new_tokens] * batch if isinstance(max_new_tokens, int) else list(max_new_tokens)
        longest = prompt_bucket(max(map(len, prompts)))
        length = -(-(longest + max(limits)) // CACHE_UNIT) * CACHE_UNIT
        if (batch, length) not in self.steps:
            self.steps[batch, length] = _Step(self.model, batch, length).set_train(False)
        step = self.steps[batch, length]
        ids = np.zeros((batch, longest), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
        padding = Tensor(np.array([longest - len(prompt) for prompt in prompts], np.int32))
        streams = random_streams(prompts, sampling.seed)
        rows = [_Row(*row) for row in zip(prompts, streams, limits, strict=True)]
        newest = Tensor(ids)
        start = 0
        while not all(row.ended for row in rows):
            logits, best = step(newest, Tensor(start, ms.int32), padding)
            start = longest if start == 0 else start + 1
            if sampling.needs_logits:
                values = logits.asnumpy()
                tokens = [choose(values[i], np.array(r.all), sampling, r.rng) for i, r in enumerate(rows)]
                newest = Tensor(np.array(tokens, np.int32).reshape(-1, 1))
            else:
                newest = best
                tokens = best.asnumpy()[:, 0].tolist()
            for index, (state, token) in enumerate(zip(rows, tokens, strict=True)):
                if state.ended:
                    continue
                state.add(token, eos_token_ids)
                if on_token is not None:
                    on_token(index, token)
        return [state.new for state in rows]


class _Row:
    """One prompt and what has come of it."""

    def __init__(self, prompt: Sequence[int], rng: np.random.Generator, limit: int):
        self.all = list(prompt)
        self.new: list[int] = []
        self.rng = rng
        self.limit = limit  # most new tokens
        self.ended = limit < 1

    def add(self, token: int, eos_token_ids: Sequence[int]) -> None:
        self.all.append(token)
        self.new.append(token)
        self.ended = token in eos_token_ids or len(self.new) >= self.limit


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
