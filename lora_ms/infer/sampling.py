"""Choosing the next token from its logits, in NumPy; the order and meaning of each step are transformers'."""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError


@dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults take the likeliest token."""

    do_sample: bool = False
    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # keep this many likeliest tokens; 0: all
    top_p: float = 1.0  # keep the likeliest tokens whose probabilities reach this sum; 0 keeps one
    repetition_penalty: float = 1.0  # above 1: tokens that occurred become less likely
    seed: int = 0
    min_p: float = 0.0  # drop the tokens whose probability is below this share of the likeliest's
    presence_penalty: float = 0.0  # taken from the logit of a token that the answer has; -2 to 2
    frequency_penalty: float = 0.0  # the same, once for each time that the answer has it
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, each with what is added to its logit, -100 to 100

    def __post_init__(self):
        for name, value, fits in (
            ("temperature", self.temperature, self.temperature >= 0),
            ("top_k", self.top_k, self.top_k >= 0),
            ("top_p", self.top_p, 0 <= self.top_p <= 1),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0),
            ("min_p", self.min_p, 0 <= self.min_p <= 1),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2),
            ("logit_bias", dict(self.logit_bias), all(-100 <= value <= 100 for _, value in self.logit_bias)),
        ):
            if not fits:
                raise LoraMsError(f"{name} {value} is out of range")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken always."""
        return not self.do_sample or self.temperature == 0 or self.top_p == 0

    @property
    def needs_logits(self) -> bool:
        """Whether more than the largest logit matters."""
        return not self.greedy or self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether the likeliest token may be another than the model's."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias)


def random_stream(prompt: Sequence[int], seed: int, sample: int = 0) -> np.random.Generator:
    """The random numbers of an answer to ``prompt``: the one of number ``sample`` among several."""
    return np.random.default_rng([seed % 2**64, crc32(np.asarray(prompt, np.int32).tobytes()), sample])


def penalise(logits: NDArray, seen: NDArray, penalty: float) -> NDArray:
    """Logits [v] with those of the ids ``seen`` divided by ``penalty`` where positive, multiplied where negative."""
    out = logits.copy()
    ids = np.unique(seen)
    values = out[ids]
    out[ids] = np.where(values > 0, values / penalty, values * penalty)
    return out


def keep_top_k(logits: NDArray, k: int) -> NDArray:
    """Logits [v] with all below the k-th largest at -inf."""
    if not 0 < k < len(logits):
        return logits
    kth = np.partition(logits, -k)[-k]
    return np.where(logits < kth, -np.inf, logits)


def softmax(logits: NDArray) -> NDArray:
    """Probabilities [v], float64."""
    exp = np.exp((logits - logits.max()).astype(np.float64))
    return exp / exp.sum()


def keep_top_p(logits: NDArray, p: float) -> NDArray:
    """Logits [v] with the least likely tokens at -inf whose probabilities together are at most 1 - p."""
    if p >= 1:
        return logits
    kept = np.flatnonzero(logits > -np.inf)
    order = kept[np.argsort(logits[kept], kind="stable")]  # least likely first
    drop = np.cumsum(softmax(logits)[order]) <= 1 - p
    drop[-1] = False
    out = logits.copy()
    out[order[drop]] = -np.inf
    return out


def keep_min_p(logits: NDArray, p: float) -> NDArray:
    """Logits [v] with the tokens at -inf whose probability is below ``p`` times the largest."""
    if p <= 0:
        return logits
    return np.where(logits - logits.max() < np.log(p), -np.inf, logits)


def penalise_answer(logits: NDArray, answer: NDArray, presence: float, frequency: float) -> NDArray:
    """Logits [v] less ``presence`` for each id of ``answer``, and less ``frequency`` for each time it is there."""
    out = logits.copy()
    ids, counts = np.unique(answer, return_counts=True)
    out[ids] -= (presence + frequency * counts).astype(out.dtype)
    return out


def adjusted(logits: NDArray, seen: NDArray, sampling: Sampling, answered: int) -> NDArray:
    """Logits [v] with bias and penalties; ``seen`` and ``answered`` as ``choose`` has them."""
    s = sampling
    if s.logit_bias:
        logits = logits.copy()
        for token, value in s.logit_bias:
            logits[token] += value
    if s.repetition_penalty != 1:
        logits = penalise(logits, seen, s.repetition_penalty)
    if answered and (s.presence_penalty or s.frequency_penalty):
        logits = penalise_answer(logits, seen[-answered:], s.presence_penalty, s.frequency_penalty)
    return logits


def choose(logits: NDArray, seen: NDArray, sampling: Sampling, rng: np.random.Generator, answered: int = 0) -> int:
    """The next token of one row: logits [v], ids ``seen`` so far, of which the last ``answered`` are the answer's.

    Raises:
        LoraMsError: the logits, or what the temperature makes of them, are not finite.
    """
    s = sampling
    logits = adjusted(logits, seen, s, answered)
    if s.greedy:
        return int(np.argmax(logits))
    with np.errstate(over="ignore", invalid="ignore"):
        logits = keep_min_p(keep_top_p(keep_top_k(logits / s.temperature, s.top_k), s.top_p), s.min_p)
        shares = softmax(logits)
    if not np.isfinite(shares).all():
        raise LoraMsError(f"no token can be drawn: the model's logits divided by {s.temperature} are not finite")
    return int(rng.choice(len(logits), p=shares))


def log_softmax(logits: NDArray) -> NDArray:
    """Logarithms of the probabilities [..., v], float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
