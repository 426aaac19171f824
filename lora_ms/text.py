"""Text for people: numbers with their nouns, lists that end, and tables that fit a terminal."""

import textwrap
from collections.abc import Sequence

WIDTH = 80  # columns of a terminal


def counted(number: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``, ``1,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(size: int) -> str:
    """``1.54 GB``, ``12.3 MB`` or ``140 KB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"


def listed(items: Sequence[str], most: int = 10, separator: str = "; ") -> str:
    """``a; b; c and 4 more``."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def status_lines(name: str, status: str, text: str, name_width: int) -> list[str]:
    """A row of a table: name, status and a text that is wrapped at 80 columns."""
    first = f"{name:{name_width}}{status:9}"
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
