"""The engine's answers to one HTTP request, as text."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from lora_ms.infer.engine import Event, Request, TokenLogprob
from lora_ms.infer.text_stream import TextStream
from lora_ms.serve.engine_thread import EngineThread
from lora_ms.serve.faults import ApiError


@dataclass
class Piece:
    """What has become certain of one answer.

    Attributes:
        index: of the answer.
        scores: of its tokens, where they were asked for.
        finish: why it ended; None: it goes on.
        prompt_scores: of the prompt's tokens from the second on, once, where they were asked for.
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    prompt_scores: Sequence[TokenLogprob] | None = None


class Generation:
    """Answers to ``requests``, one each; ``streams`` make text of them.

    Used as a context: what has not ended when it is left is cancelled.
    """

    def __init__(self, engine: EngineThread, requests: Sequence[Request], streams: Sequence[TextStream]):
        self.engine = engine
        self.requests = requests
        self.streams = streams
        self.tokens = [0] * len(requests)  # of each answer
        self.cached = [0] * len(requests)  # tokens of each answer's prompt that were not computed again
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._running: dict[int, int] = {}  # the engine's number -> index

    async def __aenter__(self) -> "Generation":
        reserved = len(self.requests)
        self.engine.reserve(reserved)
        try:
            for index, request in enumerate(self.requests):
                reserved -= 1
                self._running[await self.engine.submit(request, self._events)] = index
        except BaseException:
            self.engine.release(reserved)
            self.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what has not ended."""
        for id in self._running:
            self.engine.cancel(id)
        self._running.clear()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until all answers have ended.

        Raises:
            ApiError: the engine failed.
        """
        while self._running:
            event = await self._events.get()
            index = self._running.get(event.id)
            if index is None:  # a stop string has ended it
                continue
            self.cached[index] += event.cached_tokens
            yield self._piece(index, event)

    def _piece(self, index: int, event: Event) -> Piece:
        if event.finish in ("error", "cancelled"):
            del self._running[event.id]
            raise ApiError(500, event.error or "the request was cancelled")
        piece, stream = Piece(index, prompt_scores=event.prompt_logprobs), self.streams[index]
        if event.token is not None:
            self.tokens[index] += 1
            piece.tokens.append(event.token)
            if event.logprob is not None:
                piece.scores.append(event.logprob)
            if event.finish != "stop":  # the token that ends an answer is no part of its text
                piece.text = stream.add(event.token)
        if event.finish is not None:
            del self._running[event.id]
            piece.finish = event.finish
            piece.text += stream.finish()
        if stream.stopped:
            piece.finish = "stop"
            if event.finish is None:
                del self._running[event.id]
                self.engine.cancel(event.id)
        return piece
