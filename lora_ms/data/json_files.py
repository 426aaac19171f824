"""JSON documents and files of one JSON object a line, which are read line by line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lora_ms.data.fields import RowFault
from lora_ms.errors import LoraMsError

BOM = b"\xef\xbb\xbf"


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file; a RowFault stands for a line that is no JSON. A list or an object is read whole."""
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".jsonl" or _is_lines(file):
                yield from _lines(path.name, file)
            else:
                yield from _document(path.name, file.read())
    except OSError as error:
        raise LoraMsError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _is_lines(file: BinaryIO) -> bool:
    """Whether a file named .json begins with a whole object on a line of its own, and more follows."""
    first = next((line for line in file if line.removeprefix(BOM).strip()), b"")
    more = any(line.strip() for line in file)
    file.seek(0)
    try:
        return more and isinstance(json.loads(first.removeprefix(BOM)), dict)
    except (ValueError, RecursionError):
        return False


def _lines(name: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    # by bytes: text would also be split at U+2028 and its like, which JSON strings may hold
    advice = ""
    for number, raw in enumerate(file, start=1):
        line = (raw.removeprefix(BOM) if number == 1 else raw).rstrip(b"\r\n")
        if not line.strip():
            continue
        if not advice:
            listed = line.strip()[:2] in (b"[", b"[{")
            advice = "a list of objects wants the name .json" if listed else "write one object per line"
        where = f"{name}:{number}"
        try:
            yield where, json.loads(line)
        except UnicodeDecodeError as error:
            yield where, _not_utf8(line, error)
        except (json.JSONDecodeError, RecursionError) as error:
            yield where, RowFault(f"not valid JSON ({_reason(error)})", advice)


def _document(name: str, raw: bytes) -> Iterator[tuple[str, Any]]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault, line = _not_utf8(raw, error), raw.count(b"\n", 0, error.start) + 1
        raise LoraMsError(f"{name}:{line}: {fault.text}; {fault.advice}") from error
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LoraMsError(f"{name}{place}: not valid JSON ({_reason(error)}); write a list of objects") from error
    rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{number}]", row


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> RowFault:
    advice = "save the file as UTF-8 (from GBK: iconv -f GBK -t UTF-8)"
    return RowFault(f"byte 0x{raw[error.start]:02x} is not UTF-8", advice)


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"
