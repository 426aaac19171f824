"""``run.log``: a copy of what a run prints."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lora_ms import saving
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.text import escaped


@contextmanager
def locked_output(output_dir: Path) -> Iterator[None]:
    """Inside the block, no other run can write into ``output_dir``, which is made where it is not there.

    Raises:
        LoraMsError: another run has it, or it cannot be made.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = saving.lock(output_dir)
    except WriteError as error:
        raise LoraMsError(f"output_dir {error}, or give another output_dir") from None
    except OSError as error:
        raise LoraMsError(f"output_dir {output_dir} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(lock)


class Tee:
    """Inside ``with``, what is printed is also kept: in memory, and from ``to(path)`` on in a file.

    From then on a full disk costs lines of the file alone, and a terminal that is closed the lines on the screen.
    """

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.path: Path | None = None
        self.full = False  # whether the file cannot be written, and the user knows
        self.lock = ExitStack()

    def __enter__(self) -> "Tee":
        self.screen = sys.stdout
        sys.stdout = self  # type: ignore[assignment]
        return self

    def __exit__(self, kind, error, trace) -> None:
        sys.stdout = self.screen
        if isinstance(error, LoraMsError):
            self.keep(escaped(f"error: {error}") + "\n")
        self.lock.close()

    def to(self, path: Path) -> None:
        """Appends to ``path`` what was printed so far, and what will be. Its folder is locked until the block ends.

        Raises:
            LoraMsError: it cannot be written, or another run has the folder.
        """
        self.lock.enter_context(locked_output(path.parent))
        try:
            saving.append(path, "".join(self.kept))
        except OSError as error:
            raise LoraMsError(f"output_dir {path.parent} cannot be written: {error.strerror}") from None
        self.kept = []
        self.path = path

    def keep(self, text: str) -> None:
        """To the file alone."""
        if self.path is None:
            self.kept.append(text)
            return
        try:
            saving.append(self.path, text)
        except OSError as error:
            if not self.full:
                self.full = True
                self._show(f"warning: cannot write {self.path}: {error.strerror}; lines there may be missing\n")

    def _show(self, text: str) -> int:
        try:
            return self.screen.write(text)
        except OSError:
            if self.path is None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.screen.fileno())  # nobody reads on; the file has it
            return len(text)

    def write(self, text: str) -> int:
        """To screen and file."""
        self.keep(escaped(text))
        return self._show(text)

    def flush(self) -> None:
        try:
            self.screen.flush()
        except OSError:
            if self.path is None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.screen.fileno())

    def isatty(self) -> bool:
        return self.screen.isatty()
