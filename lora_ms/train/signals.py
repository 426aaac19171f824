"""Ending a run by Ctrl-C or SIGTERM."""

import signal


class StopSignal:
    """Inside ``with``, notes Ctrl-C and SIGTERM, so that the current step is finished and saved.

    A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.seen = False

    def _note(self, number, frame) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
