"""``run.log``: a copy of what a run prints."""

import io
import sys
from pathlib import Path
from typing import TextIO

from lora_ms.errors import LoraMsError
from lora_ms.text import escaped


class Tee:
    """Inside ``with``, what is printed is also kept: in memory, and from ``to(path)`` on in a file."""

    def __init__(self) -> None:
        self.copy: TextIO = io.StringIO()

    def __enter__(self) -> "Tee":
        self.screen = sys.stdout
        sys.stdout = self  # type: ignore[assignment]
        return self

    def __exit__(self, kind, error, trace) -> None:
        sys.stdout = self.screen
        if isinstance(error, LoraMsError):
            self.copy.write(escaped(f"error: {error}") + "\n")
        self.copy.close()

    def to(self, path: Path) -> None:
        """Appends to ``path`` what was printed so far, and what will be.

        Raises:
            LoraMsError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise LoraMsError(f"output_dir {path.parent} cannot be written: {error.strerror}") from None
        if isinstance(self.copy, io.StringIO):
            file.write(self.copy.getvalue())
        self.copy = file

    def write(self, text: str) -> int:
        """To screen and file."""
        self.copy.write(escaped(text))
        return self.screen.write(text)

    def flush(self) -> None:
        self.copy.flush()
        self.screen.flush()

    def isatty(self) -> bool:
        return self.screen.isatty()
