"""Signals that end a run in good order."""

import signal


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the step under way is finished and saved; a second Ctrl-C stops at once."""

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
