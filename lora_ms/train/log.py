"""``run.log``: a copy of what a run prints."""

import sys
from pathlib import Path

from lora_ms.errors import LoraMsError


class Tee:
    """While open, what is printed goes to ``path`` as well; not so where ``active`` is False (other ranks)."""

    def __init__(self, path: Path, active: bool = True):
        self.path, self.active = path, active

    def __enter__(self) -> "Tee":
        if self.active:
            self.screen, self.file = sys.stdout, open(self.path, "a", buffering=1, encoding="utf-8")
            sys.stdout = self
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self.active:
            return
        sys.stdout = self.screen
        if isinstance(error, LoraMsError):
            self.file.write(f"error: {error}\n")
        self.file.close()

    def write(self, text: str) -> int:
        """To both."""
        self.file.write(text)
        return self.screen.write(text)

    def flush(self) -> None:
        """Both."""
        self.file.flush()
        self.screen.flush()

    def isatty(self) -> bool:
        """As the screen."""
        return self.screen.isatty()
