"""Text for people: numbers with their nouns, lists that end, tables that fit a terminal, and no codes in it."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

WIDTH = 80  # columns of a terminal
# what a terminal obeys in place of showing it, but for tab and line feed; and marks that turn the order of text round
CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """``text`` with control characters made visible: ``\\x1b[2J`` in place of what clears a screen."""
    return CODES.sub(lambda code: code[0].encode("unicode_escape").decode(), text)


class Escaping:
    """A stream on which everything is written ``escaped``: much of what is printed stands in files of others.

    keep: a code that passes nevertheless.
    """

    def __init__(self, stream: TextIO, keep: str = "\n") -> None:
        self.stream = stream
        self.keep = keep

    def write(self, text: str) -> int:
        self.stream.write(self.keep.join(map(escaped, text.split(self.keep))))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def unescaped(stream: Any) -> Any:
    """The stream behind an ``Escaping`` one, for colours of our own."""
    return stream.stream if isinstance(stream, Escaping) else stream


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


def wrapped(text: str, stream: TextIO) -> str:
    """``text`` in lines that end between words, where ``stream`` is a terminal; else in one line, for programs."""
    if not stream.isatty():
        return text
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    return textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)


def shortened(text: str, most: int = 3000) -> str:
    """The text, without its middle where it is long."""
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[: most // 2]} … ({left_out:,} characters) … {text[-most // 2 :]}"


def folded(line: str) -> str:
    """A line of output, wrapped at 80 columns."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def status_lines(name: str, status: str, text: str, name_width: int) -> list[str]:
    """A row of a table: name, status and a text that is wrapped at 80 columns."""
    first = f"{name:{name_width}}{status:9}"
    text = shortened(text)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
