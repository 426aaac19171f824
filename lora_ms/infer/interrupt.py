"""Ctrl-C while MindSpore computes.

MindSpore's graphs put a handler of their own in place of Python's as they run, and leave it there (in C, so that
``signal.getsignal`` does not see it). It answers Ctrl-C by sending SIGTERM to its own process, which ends it. Threads
that MindSpore starts for a process's first graph do the same as each begins, which may be after that graph's end.
"""

import functools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

THREADS = Path("/proc/self/task")  # of this process, one folder each; Linux alone has it
STARTING = 2.0  # seconds within which a thread will have begun


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, graphs run; Ctrl-C then does at the end of the block what it does elsewhere in this program.

    Afterwards the handler from before is in its place again. A SIGTERM inside counts as Ctrl-C, unless the program
    handles it itself or ignores Ctrl-C (as shells let their background jobs): the two cannot be told apart. Outside the
    main thread, which alone may set handlers, nothing is changed.
    """
    ours = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or ours is None:  # None: a handler of someone's C
        yield
        return
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    counts = ours != signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if counts:
        signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        _wait_for_threads()
        signal.signal(signal.SIGINT, ours)
        if counts:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if asked:
            signal.raise_signal(signal.SIGINT)


@functools.cache  # threads start once in a process
def _wait_for_threads() -> None:
    """Returns when the threads that the first graph started have begun: each then sleeps until it is needed."""
    end = time.monotonic() + STARTING
    while any(map(_runs, THREADS.glob("[0-9]*"))) and time.monotonic() < end:
        time.sleep(0.001)


def _runs(thread: Path) -> bool:
    """Whether another thread of this process runs, or waits for a core."""
    if int(thread.name) == threading.get_native_id():
        return False
    try:
        return (thread / "stat").read_text().rpartition(") ")[2].startswith("R")
    except FileNotFoundError:  # it has ended
        return False
