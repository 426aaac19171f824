"""The JSON of answers: chats and completions, whole and in chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_ms.infer.engine import TokenLogprob
from lora_ms.serve.catalog import Served
from lora_ms.serve.generation import Piece


@dataclass
class Prompted:
    """One prompt of a request, and what stands before its answers' text."""

    tokens: list[int]
    echo: str = ""


@dataclass
class _Choice:
    """All of one answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    prompt_scores: Sequence[TokenLogprob] | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.scores += piece.scores
        self.finish = piece.finish or self.finish
        if piece.prompt_scores is not None:  # () for a prompt of one token
            self.prompt_scores = piece.prompt_scores


class Reply(Protocol):
    """How one kind of request is answered."""

    served: Served
    prompts: Sequence[Prompted]

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the prompts are read."""

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """One chunk; None where there is nothing to tell yet."""

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that is to have it."""


class _Common:
    PREFIX = ""
    OBJECTS = ("", "")  # of a chunk, of the whole

    def __init__(self, served: Served, prompts: Sequence[Prompted], n: int, scored: bool, ids: bool):
        self.served = served
        self.prompts = prompts
        self.n = n
        self.scored = scored  # log-probabilities were asked for
        self.ids = ids  # token ids were asked for
        self.id = self.PREFIX + uuid.uuid4().hex
        self.created = int(time.time())
        self.untold: dict[int, _Choice] = {}  # scores and ids of tokens whose text has not been told

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
        }

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.frame(self.OBJECTS[0], []), "usage": usage}

    def collected(self, pieces: Sequence[Piece]) -> list[_Choice]:
        choices = [_Choice() for _ in range(len(self.prompts) * self.n)]
        for piece in pieces:
            choices[piece.index].add(piece)
        return choices

    def waiting(self, piece: Piece) -> _Choice | None:
        """What to tell with this piece; None: its text is not certain yet."""
        choice = self.untold.setdefault(piece.index, _Choice())
        choice.add(piece)
        if not choice.text and choice.finish is None and choice.prompt_scores is None:
            return None
        return self.untold.pop(piece.index)

    def token_text(self, token: int) -> str:
        return self.served.tokenizer.decode([token])

    def with_ids(self, choice: dict[str, Any], tokens: list[int], prompt: Sequence[int] | None) -> dict[str, Any]:
        if self.ids:
            choice["token_ids"] = tokens
            if prompt is not None:
                choice["prompt_token_ids"] = list(prompt)
        return choice


class ChatReply(_Common):
    """``/v1/chat/completions``."""

    PREFIX = "chatcmpl-"
    OBJECTS = ("chat.completion.chunk", "chat.completion")

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self.frame(self.OBJECTS[0], [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(self.n)
        ]

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        told = self.waiting(piece)
        if told is None:
            return None
        delta = {"content": told.text} if told.text else {}
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(told.scores),
            "finish_reason": told.finish,
        }
        return self.frame(self.OBJECTS[0], [self.with_ids(choice, told.tokens, None)])

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index, found in enumerate(self.collected(pieces)):
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": found.text},
                "logprobs": self._logprobs(found.scores),
                "finish_reason": found.finish,
            }
            choices.append(self.with_ids(choice, found.tokens, self.prompts[0].tokens))
        return {**self.frame(self.OBJECTS[1], choices), "usage": usage}

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.scored:
            return None
        return {
            "content": [
                {**self._entry(score.token, score.logprob), "top_logprobs": [self._entry(*top) for top in score.top]}
                for score in scores
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}


class CompletionReply(_Common):
    """``/v1/completions``."""

    PREFIX = "cmpl-"
    OBJECTS = ("text_completion", "text_completion")

    def __init__(self, served: Served, prompts: Sequence[Prompted], n: int, scored: bool, ids: bool):
        super().__init__(served, prompts, n, scored, ids)
        self.offsets = [0] * (len(prompts) * n)  # characters of the tokens told, for text_offset
        self.begun: set[int] = set()  # answers of which something was told

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        told = self.waiting(piece)
        if told is None:
            return None
        return self.frame(self.OBJECTS[0], [self._choice(piece.index, told)])

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(index, found) for index, found in enumerate(self.collected(pieces))]
        return {**self.frame(self.OBJECTS[1], choices), "usage": usage}

    def _choice(self, index: int, found: _Choice) -> dict[str, Any]:
        prompt, first = self.prompts[index // self.n], index not in self.begun
        self.begun.add(index)
        choice = {
            "index": index,
            "text": (prompt.echo if first else "") + found.text,
            "logprobs": self._logprobs(index, found),
            "finish_reason": found.finish,
        }
        return self.with_ids(choice, found.tokens, prompt.tokens if first else None)

    def _logprobs(self, index: int, found: _Choice) -> dict[str, Any] | None:
        if not self.scored:
            return None
        entries: list[tuple[int, TokenLogprob | None]] = [(score.token, score) for score in found.scores]
        if found.prompt_scores is not None:
            before = [(score.token, score) for score in found.prompt_scores]
            entries = [(self.prompts[index // self.n].tokens[0], None), *before, *entries]
        texts = [self.token_text(token) for token, _ in entries]
        offsets = []
        for text in texts:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if score is None else finite(score.logprob) for _, score in entries],
            "top_logprobs": [None if score is None else self._top(score) for _, score in entries],
            "text_offset": offsets,
        }

    def _top(self, score: TokenLogprob) -> dict[str, float]:
        """By text; of several tokens with one text (bytes of a character), the likeliest. The token itself is there."""
        found: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            found.setdefault(self.token_text(token), finite(logprob))
        return found


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def usage_of(prompts: Sequence[Prompted], answers: Sequence[int], cached: Sequence[int]) -> dict[str, Any]:
    """``usage``: a prompt counts once, however many answers it has.

    answers, cached: of each answer, its tokens and those of its prompt that were not computed again.
    """
    read, written = sum(len(prompt.tokens) for prompt in prompts), sum(answers)
    each = len(cached) // len(prompts)  # answers of a prompt: what one of them had computed, the others take over
    known = sum(min(cached[first : first + each]) for first in range(0, len(cached), each))
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": known},
    }
