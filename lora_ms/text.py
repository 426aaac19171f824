"""Text for people: numbers with their nouns, and tables that fit a terminal."""

import textwrap

WIDTH = 80  # columns of a terminal


def counted(number: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``, ``1,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def status_lines(name: str, status: str, text: str, name_width: int) -> list[str]:
    """A row of a table: name, status and a text that is wrapped at 80 columns."""
    first = f"{name:{name_width}}{status:9}"
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
