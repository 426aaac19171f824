"""Generation with a key-value cache: a graph for pieces of prompts and a graph for single tokens, and no more of them
whatever the prompts and answers are."""

from collections import Counter
from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError
from lora_ms.infer.cached_model import CachedModel
from lora_ms.infer.interrupt import interruptible
from lora_ms.infer.sampling import Sampling, choose

PIECE = 64  # tokens of a prompt that are read at a time
SHORTEST_CACHE = 512  # tokens; a cache that is read whole at every token has this times a power of two
CACHE_BYTES = 2 << 30  # of a cache that costs nothing before it is filled; more where the answers need it


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


def cache_length(model: nn.Cell, batch: int, needed: int) -> int:
    """Tokens of a line of the cache: few lengths, few compilations.

    Where slots that are not in use cost nothing, it is the longest text of the model, as far as ``CACHE_BYTES`` allow;
    else a few times what is needed, at most.
    """
    c = model.config
    length = SHORTEST_CACHE
    while length < needed:
        length *= 2
    if not model.operators.reads_used_slots:
        return length
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4  # bytes
    fitting = SHORTEST_CACHE
    while 2 * fitting * token * batch <= CACHE_BYTES:
        fitting *= 2
    longest = -(-c.longest // PIECE) * PIECE
    return max(length, min(longest, fitting))


class Generator:
    """Generates with ``model`` (a ``CausalLM``); keeps the compiled graphs between calls."""

    def __init__(self, model: nn.Cell):
        self.model = model.set_train(False)
        self.compiled: list[CachedModel] = []

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
        lead = list(self.model.leading_ids)
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        streams = random_streams(prompts, sampling.seed)
        rows = [_Row(lead, *row) for row in zip(prompts, streams, limits, strict=True)]
        model = self._model_for(rows)

        def add(tokens: dict[int, int]) -> None:
            for i, token in tokens.items():
                rows[i].add(token, eos_token_ids)
                if on_token is not None:
                    on_token(i, token)

        with model.running():
            for begin in range(0, max(len(row.prompt) for row in rows), PIECE):
                with interruptible():
                    found = self._read_piece(model, rows, begin, sampling)
                add(found)
            while not all(row.ended for row in rows):
                with interruptible():
                    found = self._next_tokens(model, rows, sampling)
                add(found)
        return [row.new for row in rows]

    def _model_for(self, rows: Sequence["_Row"]) -> CachedModel:
        """One with a line for each row, and slots for all their tokens: one that is compiled, where it has them."""
        needed = max(len(row.all) + max(row.limit, 0) for row in rows)
        needed = -(-needed // PIECE) * PIECE  # prompts are read by whole pieces
        for model in sorted(self.compiled, key=lambda model: model.batch):
            if model.batch >= len(rows) and model.length >= needed:
                return model
        length = cache_length(self.model, len(rows), needed)
        self.compiled.append(CachedModel(self.model, len(rows), length))
        return self.compiled[-1]

    def _read_piece(self, model: CachedModel, rows: Sequence["_Row"], begin: int, sampling: Sampling) -> dict[int, int]:
        """The model reads the tokens [begin, begin + PIECE) of all prompts.

        Returns the first new token of each row whose prompt ends there. Behind the end of a prompt stands padding, in
        slots that new tokens will take.
        """
        ids = np.zeros((model.batch, PIECE), np.int32)
        lengths = np.ones(model.batch, np.int32)
        for i, row in enumerate(rows):
            part = row.prompt[begin : begin + PIECE]
            ids[i, : len(part)] = part
            lengths[i] = len(row.prompt)
        last = np.clip(lengths - 1 - begin, 0, PIECE - 1)  # of each line, the token after which the next one is wanted
        found = model.run(ids, np.full(model.batch, begin), lengths, last)
        ending = [i for i, row in enumerate(rows) if begin < len(row.prompt) <= begin + PIECE and not row.ended]
        return self._chosen(found, rows, ending, sampling)

    def _next_tokens(self, model: CachedModel, rows: Sequence["_Row"], sampling: Sampling) -> dict[int, int]:
        """The next token of each row that has not ended."""
        ids = np.zeros((model.batch, 1), np.int32)
        slots = np.zeros(model.batch, np.int32)
        for i, row in enumerate(rows):
            ids[i] = row.all[-1]
            slots[i] = len(row.all) - 1
        found = model.run(ids, slots, slots + 1, np.zeros(model.batch))
        return self._chosen(found, rows, [i for i, row in enumerate(rows) if not row.ended], sampling)

    def _chosen(
        self, found: tuple[Tensor, Tensor], rows: Sequence["_Row"], wanted: Sequence[int], sampling: Sampling
    ) -> dict[int, int]:
        """From the logits and the likeliest tokens of all lines, the tokens of the rows ``wanted``."""
        if not wanted:
            return {}
        if not sampling.needs_logits:
            best = found[1].asnumpy()
            return {i: int(best[i]) for i in wanted}
        logits = found[0].asnumpy()
        return {i: choose(logits[i], np.array(rows[i].real), sampling, rows[i].rng) for i in wanted}


class _Row:
    """One prompt and what has come of it; lead: the ids of virtual tokens that stand before it."""

    def __init__(self, lead: Sequence[int], prompt: Sequence[int], rng: np.random.Generator, limit: int):
        self.prompt = [*lead, *prompt]
        self.virtual = len(lead)
        self.new: list[int] = []
        self.rng = rng
        self.limit = limit  # most new tokens
        self.ended = limit < 1

    @property
    def all(self) -> list[int]:
        return self.prompt + self.new

    @property
    def real(self) -> list[int]:
        """``all`` but for the virtual tokens."""
        return self.all[self.virtual :]

    def add(self, token: int, eos_token_ids: Sequence[int]) -> None:
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
