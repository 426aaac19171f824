"""The engine for tokens: requests join and leave a fixed number of rows at any step, each with its own settings.

A step reads one piece of one prompt (several where nobody waits), or one token of every row whose prompt has been read,
in turn; so a long prompt does not stall the others. One graph serves pieces of prompts, another tokens, and nothing
that is submitted compiles more.

Every row has a line of the cache of its own, side by side. What a line holds stays there when its row has ended. A row
whose prompt begins as the tokens of a line do, takes these over: in its place, or by a copy, piece by piece. Only what
was read in whole pieces is taken over, and no answer, as the graph of a token rounds otherwise than that of a piece: so
a row has the same numbers, to the bit, whatever ran before it and runs beside it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError
from lora_ms.infer.cached_model import PIECE, CachedModel, cache_length
from lora_ms.infer.interrupt import interruptible
from lora_ms.infer.sampling import Sampling, choose, log_softmax, random_stream

ROWS = 8  # requests that run at once, where nothing else is said
LEAST = {"max_new_tokens": 0, "logprobs": 0, "prompt_logprobs": 0, "sample": 0, "scored_from": 1}
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
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, from ``scored_from`` on
    scored_from: int = 1  # index in the prompt, from 1 on; what is before it may be taken over from other requests
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
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of the prompt's tokens, where they were asked for, once
    finish: Finish | None = None  # why it ended; None: it goes on
    error: str = ""  # what was wrong, where ``finish`` is "error"
    cached_tokens: int = 0  # with the first event: tokens of the prompt that were not computed again


# an adapter in use: its place among those that live in the model, 0 for none; and a number that no other adapter has
# ever had there
Lease = tuple[int, int]
NO_ADAPTER: Lease = (0, 0)


class Adapters(Protocol):
    """The adapters that live in the model, by name."""

    def acquire(self, name: str) -> Lease:
        """The adapter, which keeps its place until it is released as often as it was acquired.

        Raises:
            LoraMsError: no such adapter.
        """

    def release(self, lease: Lease) -> None:
        """The reverse of ``acquire``."""

    def choose(self, places: Sequence[int]) -> None:
        """From now on, each line of a batch uses the adapter at its place; one place is for all lines."""


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


class Engine:
    """Answers requests with ``model`` (a ``CausalLM``); everything is called by one thread.

    Args:
        rows: requests that run at once; others wait.
        length: most tokens of a prompt and its answer together; None for what ``cache_length`` gives.
        adapters: of the model; None: none.
        piece: tokens of a prompt that are read at a time while others wait, and shared.
    """

    def __init__(
        self,
        model: nn.Cell,
        rows: int = ROWS,
        length: int | None = None,
        adapters: Adapters | None = None,
        piece: int = PIECE,
    ):
        self.model = model.set_train(False)
        self.rows = rows
        self.piece = piece
        self.length = cache_length(model, rows, piece) if length is None else length
        self.adapters = adapters
        self.lead = tuple(model.leading_ids)  # of virtual tokens, which stand before every prompt
        self._slots = -(-self.length // piece) * piece  # pieces are written whole
        self.graphs = CachedModel(self.model, rows, self._slots, piece)
        self._lines = [_Line(number, self._slots) for number in range(rows)]
        self._waiting: deque[_Row] = deque()
        self._events: list[Event] = []  # of requests that ended between steps
        self._next_id = 0
        self._steps = 0
        self._has_read = False  # whether the last step read a piece of a prompt

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits, or is still to be told."""
        return not (self._waiting or self._events or self.running)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(line.row is not None for line in self._lines)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    def warm(self) -> None:
        """Compiles all that is not compiled yet, before the first request does; to be called while idle."""
        self.answers([Request((0, 0), 2, prompt_logprobs=0)])
        self.graphs.copy(0, 0, 0)
        self.forget()

    def submit(self, request: Request) -> int:
        """Takes a request, which waits for a free row; returns its number, by which events name it.

        Raises:
            LoraMsError: an empty prompt, an id out of the vocabulary, a prompt and answer longer than ``length``, a
                number out of range, or an unknown adapter.
        """
        vocabulary = self.model.config.vocab_size
        check_prompts([request.prompt], vocabulary)
        wrong = [token for token, _ in request.sampling.logit_bias if not 0 <= token < vocabulary]
        if wrong:
            raise LoraMsError(f"logit_bias: token id {wrong[0]} does not exist in a vocabulary of {vocabulary}")
        for name, least in LEAST.items():
            value = getattr(request, name)
            if value is not None and value < least:
                raise LoraMsError(f"{name} {value} is out of range")
        needed = len(self.lead) + len(request.prompt) + request.max_new_tokens
        if needed > self.length:
            virtual = f" with {len(self.lead)} virtual ones" if self.lead else ""
            raise LoraMsError(
                f"the prompt has {len(request.prompt):,} tokens and max_new_tokens is {request.max_new_tokens:,}, "
                f"{needed:,} together{virtual}, and a row has room for {self.length:,}: shorten one of them"
            )
        lease = NO_ADAPTER
        if request.adapter is not None:
            if self.adapters is None:
                raise LoraMsError(f"no adapter {request.adapter!r}: this engine has none")
            lease = self.adapters.acquire(request.adapter)
        self._next_id += 1
        self._waiting.append(_Row(self._next_id, request, lease, self.lead))
        return self._next_id

    def cancel(self, id: int) -> None:
        """Ends a request, whose row is free at once; the next step tells it. One that has ended stays as it was."""
        for row in [*self._waiting, *self._rows()]:
            if row.id == id:
                self._end(row)
                self._events.append(Event(id, finish="cancelled"))

    def cancel_all(self) -> None:
        """Ends all requests; nothing more is told of them. Also what makes an engine usable again that was stopped in
        the middle of a step."""
        for row in [*self._waiting, *self._rows()]:
            self._end(row)
        self._events.clear()

    def forget(self) -> None:
        """What has been computed is not used again by requests to come: the model's weights have changed."""
        for line in self._lines:
            line.stale = True

    def step(self) -> list[Event]:
        """Reads one piece of a prompt, or one token of every row whose prompt has been read: in turn, where there are
        both."""
        events, self._events = self._events, []
        self._steps += 1
        self._admit()
        unread = self._next_to_read()
        read = self._read_rows()
        if unread is None or (self._has_read and read):
            self._has_read = False
            return events + self._next_tokens(read)
        self._has_read = True
        self._take_over(unread)
        return events + self._read_piece(unread)

    def run(self) -> Iterator[Event]:
        """Steps until the engine is idle; requests may be submitted and cancelled in between."""
        while not self.idle:
            yield from self.step()

    def events_of(self, requests: Iterable[Request]) -> Iterator[tuple[int, Event]]:
        """The events of ``requests``, each with the number of its request, from 0 on, where the engine was idle.

        Requests are taken as rows become free, so that there may be any number of them.
        """
        numbers: dict[int, int] = {}
        rest = iter(requests)
        try:
            while True:
                for request in islice(rest, self.rows - self.running - self.waiting):
                    numbers[self.submit(request)] = len(numbers)
                if self.idle:
                    return
                for event in self.step():
                    yield numbers[event.id], event
        finally:
            self.cancel_all()

    def answers(self, requests: Sequence[Request]) -> list[list[int]]:
        """The new tokens of each request, where the engine was idle: the end token included where one came."""
        found: list[list[int]] = [[] for _ in requests]
        for number, event in self.events_of(requests):
            if event.token is not None:
                found[number].append(event.token)
        return found

    def _rows(self) -> "list[_Row]":
        """Those that run."""
        return [line.row for line in self._lines if line.row is not None]

    def _admit(self) -> None:
        """Gives free lines to those who wait, in their order."""
        while self._waiting and self.running < self.rows:
            row = self._waiting.popleft()
            line = self._line_for(row)
            shared = self._shared(line, row)
            line.row, line.lease, line.used, line.stale = row, row.lease, shared, False
            line.whole = shared
            row.line, row.shared = line, shared

    def _line_for(self, row: "_Row") -> "_Line":
        """The free line that holds the beginning of the prompt and little else, or the one that was left longest ago,
        but for the one that holds most of the beginning."""
        free = [line for line in self._lines if line.row is None]
        best = max(self._lines, key=lambda line: self._shared(line, row))
        shared = self._shared(best, row)
        if shared and best.row is None and (len(free) == 1 or best.whole - shared < self.piece):
            return best
        return min(free, key=lambda line: (line is best and shared > 0, line.left))

    def _shared(self, line: "_Line", row: "_Row") -> int:
        """Tokens of the prompt, in whole pieces, that the line holds; those are never among them after which
        something is to be told."""
        if self.graphs.grows or line.stale or line.lease != row.lease:
            return 0
        count = min(line.whole, row.first_told)
        different = np.flatnonzero(line.ids[:count] != row.ids[:count])
        return (int(different[0]) if len(different) else count) // self.piece * self.piece

    def _read_rows(self) -> "list[_Row]":
        """Those whose prompts have been read."""
        return [row for row in self._rows() if row.line.used >= len(row.ids)]

    def _next_to_read(self) -> "_Row | None":
        """The row that has waited longest among those whose prompts have not been read."""
        unread = [row for row in self._rows() if row.line.used < len(row.ids)]
        return min(unread, key=lambda row: row.id) if unread else None

    def _take_over(self, row: "_Row") -> None:
        """Copies the beginning of the prompt from the line that holds most of it, beyond what has been read."""
        line = row.line
        best = max(self._lines, key=lambda other: self._shared(other, row))
        shared = self._shared(best, row)
        for start in range(line.used, shared, self.piece):
            with interruptible():
                self.graphs.copy(best.number, line.number, start)
        if shared > line.used:
            line.write(row.ids[line.used : shared])
            line.whole = row.shared = shared

    def _tokens_to_read(self, row: "_Row") -> int:
        """Whole pieces, several where nobody waits for a token meanwhile; or what is left behind them."""
        left = len(row.ids) - row.line.used
        most = self.piece if self._read_rows() else self.graphs.most
        return min(left // self.piece * self.piece, most) or left

    def _read_piece(self, row: "_Row") -> list[Event]:
        """Reads one piece of the prompt, or several."""
        line = row.line
        begin = line.used
        part = row.ids[begin : begin + self._tokens_to_read(row)]
        self._choose([row.lease[0]])
        with self.graphs.running(), interruptible():
            logits, best, hidden = self.graphs.read(line.number, part, begin, len(row.ids))
            best = best.asnumpy()
        top = row.request.prompt_logprobs
        first = max(begin, row.first_told) + 1
        following = row.ids[first : begin + len(part) + 1].tolist()
        if top is not None and following:
            scores = log_softmax(self.graphs.scores(hidden)[first - begin - 1 :][: len(following)])
            row.prompt_logprobs += [token_logprob(t, s, top) for t, s in zip(following, scores, strict=True)]
        line.write(part)
        if len(part) % self.piece == 0:
            line.whole = line.used
        return [] if line.used < len(row.ids) else self._told([row], [0], logits, best)

    def _next_tokens(self, rows: "list[_Row]") -> list[Event]:
        """The next token of each of ``rows``."""
        if not rows:
            return []
        ids = np.zeros(self.rows, np.int32)
        # of lines without a token native operators compute nothing, and what others write goes behind the tokens there
        start = np.array([min(line.used, self._slots - 1) for line in self._lines])
        lengths = start.copy()
        places = [0] * self.rows
        for row in rows:
            ids[row.line.number] = row.new[-1]
            lengths[row.line.number] += 1
            places[row.line.number] = row.lease[0]
        self._choose(places)
        with self.graphs.running(), interruptible():
            logits, best = self.graphs.next(ids, start, lengths)
            best = best.asnumpy()
        for row in rows:
            row.line.write([row.new[-1]])
        return self._told(rows, [row.line.number for row in rows], logits, best)

    def _choose(self, places: list[int]) -> None:
        if self.adapters is not None:
            self.adapters.choose(places)

    def _told(self, rows: "list[_Row]", at: list[int], logits: Tensor, best: NDArray) -> list[Event]:
        """The events of ``rows``; ``at``: where each stands among the ``logits`` [n, v] and likeliest ids [n]."""
        needed = any(row.request.sampling.needs_logits or row.request.logprobs is not None for row in rows)
        numbers = logits.asnumpy() if needed else None
        return [
            self._next(row, int(best[i]), None if numbers is None else numbers[i])
            for row, i in zip(rows, at, strict=True)
        ]

    def _next(self, row: "_Row", best: int, logits: NDArray | None) -> Event:
        """The event of a row's next token: the likeliest, or what it chooses by ``logits`` [v]."""
        request = row.request
        token: int | None = None
        logprob: TokenLogprob | None = None
        finish: Finish | None = None
        error = ""
        if request.max_new_tokens == 0:
            finish = "length"
        else:
            try:
                token, logprob = row.choose(best, logits)
            except LoraMsError as problem:
                finish, error = "error", str(problem)
        first = not row.new
        if token is not None:
            row.new.append(token)
            finish = row.finish
        if finish is not None:
            self._end(row)
        scores = tuple(row.prompt_logprobs) if first and request.prompt_logprobs is not None else None
        shared = row.shared if first else 0
        return Event(row.id, token, logprob, scores, finish=finish, error=error, cached_tokens=shared)

    def _end(self, row: "_Row") -> None:
        """The row leaves its line, or those who wait."""
        if row in self._waiting:
            self._waiting.remove(row)
        else:
            line = row.line
            line.row = None
            line.left = self._steps
            line.used = min(line.used, self._slots - 1)  # see ``_next_tokens``
        if self.adapters is not None and row.lease != NO_ADAPTER:
            self.adapters.release(row.lease)


def token_logprob(token: int, logprobs: NDArray, top: int) -> TokenLogprob:
    """The log-probability of ``token`` and those of the ``top`` likeliest, given those [v] of all tokens."""
    top = min(top, len(logprobs))
    likeliest = np.argpartition(logprobs, len(logprobs) - top)[len(logprobs) - top :] if top else np.zeros(0, np.int64)
    order = sorted(likeliest, key=lambda i: (-logprobs[i], i))
    return TokenLogprob(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in order))


class _Line:
    """A line of the cache.

    Attributes:
        ids: the tokens in its slots, of which the first ``used`` count.
        whole: so many of them were read in whole pieces.
        row: that is there; None: the line is free, and what it holds may be taken over.
        lease: the adapter with which the tokens were read.
        left: the step in which it was left.
        stale: whether the model has changed since.
    """

    def __init__(self, number: int, slots: int):
        self.number = number
        self.ids = np.zeros(slots, np.int32)
        self.used = 0
        self.whole = 0
        self.row: _Row | None = None
        self.lease = NO_ADAPTER
        self.left = 0
        self.stale = False

    def write(self, ids: Sequence[int] | NDArray) -> None:
        """More tokens are in the cache."""
        self.ids[self.used : self.used + len(ids)] = ids
        self.used += len(ids)


class _Row:
    """A request, and what has come of it.

    Attributes:
        line: of the cache; set when the row joins.
        ids: the prompt's, after those of the virtual tokens.
        shared: tokens of the prompt that were not computed again.
    """

    line: _Line

    def __init__(self, id: int, request: Request, lease: Lease, lead: Sequence[int]):
        self.id = id
        self.request = request
        self.lease = lease
        self.virtual = len(lead)
        self.ids = np.array([*lead, *request.prompt], np.int32)
        self.new: list[int] = []
        self.shared = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.rng = random_stream(request.prompt, request.sampling.seed, request.sample)

    @property
    def first_told(self) -> int:
        """Index of the first token after which something is told: the first answer, or the first score of a prompt;
        virtual tokens are not scored, nor is the prompt's first."""
        last = len(self.ids) - 1
        if self.request.prompt_logprobs is None:
            return last
        return min(last, self.virtual + self.request.scored_from - 1)

    def choose(self, best: int, logits: NDArray | None) -> tuple[int, TokenLogprob | None]:
        """The next token, ``best`` or by ``logits`` [v], which are there where they are needed.

        Raises:
            LoraMsError: the logits are not finite.
        """
        request = self.request
        if logits is None:
            return best, None
        token = best
        if request.sampling.needs_logits:
            seen = np.concatenate([self.ids[self.virtual :], np.array(self.new, np.int32)])
            token = choose(logits, seen, request.sampling, self.rng, len(self.new))
        if request.logprobs is None:
            return token, None
        return token, token_logprob(token, log_softmax(logits), request.logprobs)

    @property
    def finish(self) -> Finish | None:
        """Why the last token was the last one; None: it was not."""
        if self.new[-1] in self.request.eos_token_ids:
            return "stop"
        return "length" if len(self.new) >= self.request.max_new_tokens else None
