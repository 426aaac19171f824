"""Ctrl-C while MindSpore computes.

MindSpore's graphs put a handler of their own in place of Python's as they run, and leave it there (in C, so that
``signal.getsignal`` does not see it). It answers Ctrl-C by sending SIGTERM to its own process, which ends it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, graphs run; Ctrl-C then does at the end of the block what it does elsewhere in this program.

    Afterwards Python's handler is in its place again. A SIGTERM inside counts as Ctrl-C, unless the program handles it
    itself: the two cannot be told apart. Outside the main thread, which alone may set handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGINT)
    if not callable(ours):  # ignored, or the system's own: not Python's to handle
        yield
        return
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    other = signal.getsignal(signal.SIGTERM)
    if other == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        if other == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, ours)
        if asked:
            ours(signal.SIGINT, None)
