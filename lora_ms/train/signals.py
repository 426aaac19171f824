"""Ending a run by Ctrl-C, SIGTERM or SIGHUP."""

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed, or ssh has ended


class StopSignal:
    """Inside ``with``, notes a signal, so that the current step is finished and saved.

    A second Ctrl-C stops at once. A signal that the process ignores, as under ``nohup``, is left alone.
    """

    def __init__(self):
        self.seen = False

    def _note(self, number, frame) -> None:
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = True

    def __enter__(self) -> "StopSignal":
        noted = [number for number in SIGNALS if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
