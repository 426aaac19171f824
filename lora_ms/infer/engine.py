"""The engine for tokens: requests join and leave a fixed number of rows at any step, each with its own settings.

A step reads one piece of one prompt, and then one token of every row whose prompt has been read; so a long prompt does
not stall the others. One graph serves pieces of prompts, another tokens, and nothing that is submitted compiles more.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol
from zlib import crc32

import numpy as np
from mindspore import nn
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError
from lora_ms.infer.cached_model import CachedModel
from lora_ms.infer.generate import PIECE, cache_length, check_prompts
from lora_ms.infer.interrupt import interruptible
from lora_ms.infer.sampling import Sampling, choose, log_softmax

ROWS = 8  # requests that run at once, where nothing else is said
Finish = Literal["stop", "length", "cancelled", "error"]
TopLogprobs = tuple[tuple[int, float], ...]  # token ids with their log-probabilities, the likeliest first


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how.

    Log-probabilities are the model's own, before penalties, temperature and what else ``sampling`` asks for.
    """

    prompt: tuple[int, ...]  # token ids, at least one
    max_new_tokens: int = 128  # 0: the prompt is read, and no more
    sampling: Sampling = Sampling()
    eos_token_ids: tuple[int, ...] = ()  # the first of these ends the answer, and is its last token
    adapter: str | None = None  # by name; None: the model without one
    logprobs: int | None = None  # with each token its log-probability, and those of so many likeliest; None: neither
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, from its second on
    sample: int = 0  # which of several answers to one prompt: each draws its own random numbers


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: TopLogprobs = ()


@dataclass(frozen=True)
class Event:
    """What a step tells of one request: a token, the end, or both; before the first token, the prompt's scores."""

    id: int  # of the request, as ``Engine.submit`` gave it
    token: int | None = None  # None where there is none: a prompt's scores, or an end without a token
    logprob: TokenLogprob | None = None  # where ``Request.logprobs`` asked for it
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of the prompt's tokens from its second on, once
    finish: Finish | None = None  # why it ended; None: it goes on
    error: str = ""  # what was wrong, where ``finish`` is "error"
    cached_tokens: int = 0  # with the first event: tokens of the prompt that were not computed again


class Adapters(Protocol):
    """The adapters that live in the model, by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests may name."""

    def acquire(self, name: str) -> int:
        """The adapter's place, which it keeps until it is released as often as it was acquired.

        Raises:
            LoraMsError: no such adapter.
        """

    def release(self, place: int) -> None:
        """The reverse of ``acquire``."""


class Engine:
    """Answers requests with ``model`` (a ``CausalLM``); everything is called by one thread.

    Args:
        rows: requests that run at once; others wait.
        length: most tokens of a prompt and its answer together; None for what ``cache_length`` gives.
        adapters: of the model; None: none.
    """

    def __init__(self, model: nn.Cell, rows: int = ROWS, length: int | None = None, adapters: Adapters | None = None):
        self.model = model.set_train(False)
        self.rows = rows
        self.length = cache_length(model, rows, PIECE) if length is None else length
        self.adapters = adapters
        slots = -(-self.length // PIECE) * PIECE + PIECE  # a piece is written whole, behind the last token of a row too
        self._graphs = CachedModel(self.model, rows, slots)
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running | None] = [None] * rows
        self._events: list[Event] = []  # of requests that ended between steps
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits, or is still to be told."""
        return not (self._waiting or self._events or any(self._running))

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(row is not None for row in self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    def warm(self) -> None:
        """Compiles what is not compiled yet, before the first request does."""
        self.answers([Request((0,), 2)])

    def submit(self, request: Request) -> int:
        """Takes a request, which waits for a free row; returns its number, by which events name it.

        Raises:
            LoraMsError: an empty prompt, an id out of the vocabulary, a prompt and answer longer than ``length``, a
                setting out of range, or an unknown adapter.
        """
        vocabulary = self.model.config.vocab_size
        check_prompts([request.prompt], vocabulary)
        wrong = [token for token, _ in request.sampling.logit_bias if not 0 <= token < vocabulary]
        if wrong:
            raise LoraMsError(f"logit_bias: token id {wrong[0]} does not exist in a vocabulary of {vocabulary}")
        for name in ("max_new_tokens", "logprobs", "prompt_logprobs", "sample"):
            value = getattr(request, name)
            if value is not None and value < 0:
                raise LoraMsError(f"{name} {value} is out of range")
        if request.prompt_logprobs is not None:
            raise LoraMsError("prompt_logprobs are not computed yet: leave them out")
        needed = len(request.prompt) + request.max_new_tokens
        if needed > self.length:
            raise LoraMsError(
                f"the prompt has {len(request.prompt):,} tokens and max_new_tokens is {request.max_new_tokens:,}, "
                f"{needed:,} together, and a row has room for {self.length:,}: shorten one of them"
            )
        place = -1
        if request.adapter is not None:
            if self.adapters is None:
                raise LoraMsError(f"no adapter {request.adapter!r}: this engine has none")
            place = self.adapters.acquire(request.adapter)
        self._next_id += 1
        self._waiting.append(_Running(self._next_id, request, place))
        return self._next_id

    def cancel(self, id: int) -> None:
        """Ends a request, whose row is free at once; the next step tells it. One that has ended stays as it was."""
        for row in [*self._waiting, *self._running]:
            if row is not None and row.id == id:
                self._end(row)
                self._events.append(Event(id, finish="cancelled"))

    def step(self) -> list[Event]:
        """Reads one piece of a prompt, and one token of every row whose prompt has been read."""
        events, self._events = self._events, []
        self._admit()
        with self._graphs.running(), interruptible():
            events += self._read_piece()
            events += self._next_tokens()
        return events

    def run(self) -> Iterator[Event]:
        """Steps until the engine is idle; requests may be submitted and cancelled in between."""
        while not self.idle:
            yield from self.step()

    def answers(self, requests: list[Request]) -> list[list[int]]:
        """The new tokens of each request, where the engine was idle: the end token included where one came."""
        ids = [self.submit(request) for request in requests]
        found: dict[int, list[int]] = {id: [] for id in ids}
        for event in self.run():
            if event.token is not None:
                found[event.id].append(event.token)
        return [found[id] for id in ids]

    def _admit(self) -> None:
        """Gives free rows to those who wait, in their order."""
        for line, row in enumerate(self._running):
            if row is None and self._waiting:
                joined = self._waiting.popleft()
                joined.line = line
                self._running[line] = joined

    def _end(self, row: "_Running") -> None:
        if row.line is None:
            self._waiting.remove(row)
        else:
            self._running[row.line] = None
        if self.adapters is not None and row.place >= 0:
            self.adapters.release(row.place)

    def _read_piece(self) -> list[Event]:
        """Reads one piece of the prompt that has waited longest."""
        unread = [row for row in self._running if row is not None and row.read < len(row.request.prompt)]
        if not unread:
            return []
        row = min(unread, key=lambda row: row.id)
        prompt = row.request.prompt
        part = prompt[row.read : row.read + PIECE]
        ids = np.zeros((self.rows, PIECE), np.int32)
        ids[row.line, : len(part)] = part
        start = np.array([0 if other is None else other.read for other in self._running])
        lengths = start + 1
        lengths[row.line] = len(prompt)
        last = np.full(self.rows, len(part) - 1)
        logits, best = self._graphs.run(ids, start, lengths, last)
        row.read += len(part)
        if row.read < len(prompt):
            return []
        return self._told([row], logits, best)

    def _next_tokens(self) -> list[Event]:
        """The next token of each row whose prompt has been read."""
        rows = [row for row in self._running if row is not None and row.new and row.read < len(row.all)]
        if not rows:
            return []
        ids = np.zeros((self.rows, 1), np.int32)
        start = np.array([0 if other is None else other.read for other in self._running])
        for row in rows:
            ids[row.line] = row.all[-1]
        logits, best = self._graphs.run(ids, start, start + 1, np.zeros(self.rows))
        for row in rows:
            row.read += 1
        return self._told(rows, logits, best)

    def _told(self, rows: "list[_Running]", logits, best) -> list[Event]:
        """The events of ``rows``, whose next tokens' logits [rows, v] and likeliest ids [rows] are given."""
        best = best.asnumpy()
        needed = any(row.request.sampling.needs_logits or row.request.logprobs is not None for row in rows)
        numbers = logits.asnumpy() if needed else np.zeros((self.rows, 0), np.float32)
        events = []
        for row in rows:
            if row.request.max_new_tokens == 0:
                self._end(row)
                events.append(Event(row.id, finish="length"))
                continue
            events.append(self._token(row, int(best[row.line]), numbers[row.line]))
        return events

    def _token(self, row: "_Running", best: int, logits: NDArray) -> Event:
        request = row.request
        token = best
        if request.sampling.needs_logits:
            token = choose(logits, np.array(row.all), request.sampling, row.rng, len(row.new))
        row.new.append(token)
        finish: Finish | None = None
        if token in request.eos_token_ids:
            finish = "stop"
        elif len(row.new) >= request.max_new_tokens:
            finish = "length"
        if finish is not None:
            self._end(row)
        logprob = None if request.logprobs is None else token_logprob(token, log_softmax(logits), request.logprobs)
        return Event(row.id, token, logprob, finish=finish)


def token_logprob(token: int, logprobs: NDArray, top: int) -> TokenLogprob:
    """Of ``token``, and the ``top`` likeliest, of the log-probabilities [v] of all tokens in its place."""
    top = min(top, len(logprobs))
    likeliest = np.argpartition(logprobs, len(logprobs) - top)[len(logprobs) - top :] if top else np.zeros(0, np.int64)
    order = sorted(likeliest, key=lambda i: (-logprobs[i], i))
    return TokenLogprob(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in order))


class _Running:
    """A request, and what has come of it.

    Attributes:
        place: of its adapter; -1: none.
        line: of the cache, once it has one.
        read: tokens that are in the cache.
    """

    def __init__(self, id: int, request: Request, place: int):
        self.id = id
        self.request = request
        self.place = place
        self.line: int | None = None
        self.read = 0
        self.new: list[int] = []
        tokens = np.asarray(request.prompt, np.int32).tobytes()
        self.rng = np.random.default_rng([request.sampling.seed, crc32(tokens), request.sample])

    @property
    def all(self) -> list[int]:
        return [*self.request.prompt, *self.new]
