"""Programs in files of others, chat templates and regular expressions, run under a limit of time and memory."""

import os
import re
import resource
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from lora_ms.errors import LoraMsError

SECONDS = 2.0  # of the processor; real templates take milliseconds
MEMORY = 2**30  # bytes that a template may take; real ones take what their text has
PATTERN_SECONDS = 1.0  # for an expression, in all its slow matches together
PATTERN_LENGTH = 2000  # characters
SLOW = 0.01  # seconds; real expressions take microseconds

_spent: dict[str, float] = defaultdict(float)  # seconds of slow matches, by expression


class LimitReached(LoraMsError):
    """A program took too long, or too much memory, or called itself without end."""


class _Stop(BaseException):
    """Ends a program; no ``except Exception`` of it, or of the library that runs it, goes on."""


@contextmanager
def limited(what: str, seconds: float = SECONDS, memory: int | None = None) -> Iterator[Callable[[], None]]:
    """Inside, Python code of at most so many seconds of the processor, and so many bytes more than there are now.

    Yields what begins the count anew, for the next of several programs. Outside the main thread, where Python delivers
    no signals, time is not limited.

    Raises:
        LimitReached: it took more; ``what`` begins the line.
    """

    def stop(number: int, frame: object) -> None:
        raise _Stop

    def again() -> None:
        if memory is not None:
            most = int(os.pread(sizes, 100, 0).split()[0]) * resource.getpagesize() + memory
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)

    timed = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    sizes = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    before = signal.signal(signal.SIGVTALRM, stop) if timed else None
    try:
        outer = signal.getitimer(signal.ITIMER_VIRTUAL)
        try:
            again()
            yield again
        except _Stop:
            raise LimitReached(f"{what} takes too long: it was stopped") from None
        except MemoryError:
            if memory is None:
                raise
            raise LimitReached(f"{what} takes too much memory: it was stopped") from None
        except RecursionError:
            raise LimitReached(f"{what} calls itself without end: it was stopped") from None
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, *outer)
    finally:
        if timed:
            signal.signal(signal.SIGVTALRM, before)
        os.close(sizes)
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fullmatch(pattern: str, text: str) -> re.Match[str] | None:
    """``re.fullmatch`` under a limit of time. Raises LoraMsError, also where the expression does not parse."""
    return _matched(pattern, text, whole=True, shown=pattern)


def match(pattern: str, text: str, shown: str | None = None) -> re.Match[str] | None:
    """``re.match`` under a limit of time. Raises LoraMsError, also where the expression does not parse.

    shown: the expression in the file, where ``pattern`` is made of it.
    """
    return _matched(pattern, text, whole=False, shown=pattern if shown is None else shown)


def _matched(pattern: str, text: str, whole: bool, shown: str) -> re.Match[str] | None:
    if len(pattern) > PATTERN_LENGTH:
        raise LoraMsError(f"a regular expression of {len(pattern):,} characters: at most {PATTERN_LENGTH:,} are read")
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise LoraMsError(f"not a regular expression: {shown[:80]!r}: {error}") from None
    apply = expression.fullmatch if whole else expression.match
    if _is_quick(pattern):
        return apply(text)
    what = f"the regular expression {shown[:80]!r}"
    began = _processor()
    with limited(what, max(PATTERN_SECONDS - _spent[pattern], SLOW)):
        found = apply(text)
    taken = _processor() - began
    if taken > SLOW:
        _spent[pattern] += taken
    return found


@lru_cache(4096)
def _is_quick(pattern: str) -> bool:
    """Whether an expression has too few repetitions to be slow on a module's path, and none of a group."""
    return sum(map(pattern.count, "*+{")) <= 2 and re.search(r"\)[*+{]", pattern) is None


def _processor() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime
