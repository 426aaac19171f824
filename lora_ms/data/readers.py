"""From a file, a folder, a glob or a list of dicts to raw rows, one in memory at a time."""

import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lora_ms.data.example import MOST_BYTES, RawRow, RowFault, shown_name, too_long
from lora_ms.data.mindrecord import read_mindrecord
from lora_ms.data.tables import HELD_OUT, SPLITS, read_table, without_filled_nulls
from lora_ms.errors import LoraMsError
from lora_ms.reading import opened_text, readable

# what word processors and Chinese input methods write, and JSON's own
TYPED = {"“": '"', "”": '"', "„": '"', "：": ":", "，": ","}
SUPPORTED = ".json, .jsonl, .csv, .tsv, .parquet, .mindrecord, or a folder saved by Hugging Face datasets"
BOM = b"\xef\xbb\xbf"

Thing = TypeVar("Thing")
RowSource = str | os.PathLike[str] | Sequence[Mapping[str, Any]]


def read_sources(
    sources: Sequence[RowSource], split: str | None = "train", num_samples: int | None = None
) -> Iterator[RawRow]:
    """The first `num_samples` rows (None: all) of all sources, one file after another.

    sources: each a file, a folder (its supported files, sorted by name), a glob, or a sequence of dicts.
    split: which part of a folder, or of a saved dataset, that has several; None: rows that are not to be learnt, that
        is, the first of ``HELD_OUT`` that it has, else all.

    Raises LoraMsError, naming the file, for a path that leads nowhere, an unreadable file and a source without rows.
    """
    if num_samples is not None and num_samples < 1:
        raise LoraMsError(f"num_samples is {num_samples}; give 1 or more, or leave it out to read all rows")
    return islice(_rows_of_all(sources, split), num_samples)


def read_as(source: str, make: Callable[[str, Any], Thing], num_samples: int | None = None) -> list[Thing]:
    """What ``make`` makes of each row of ``source``, from where it stands and its value.

    Raises LoraMsError, with file and line, for the first row that is unreadable or for which ``make`` raises RowFault.
    """
    found = []
    for row in read_sources([source], None, num_samples):
        try:
            if isinstance(row.value, RowFault):
                raise row.value
            found.append(make(row.where, row.value))
        except RowFault as fault:
            raise LoraMsError(f"{row.where}: {fault.text}; {fault.advice}") from None
    return found


def _rows_of_all(sources: Sequence[RowSource], split: str | None) -> Iterator[RawRow]:
    for source in sources:
        row = None
        for row in _rows_of(source, split):
            yield row
        if row is None:
            name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the dataset"
            raise LoraMsError(f"{name}: there are no rows; give at least one")


def _rows_of(source: RowSource, split: str | None) -> Iterator[RawRow]:
    if not isinstance(source, str | os.PathLike):
        datasets = sys.modules.get("datasets")  # loaded by whoever has made one of its datasets
        of_arrow = datasets is not None and isinstance(source, datasets.Dataset)
        for number, row in enumerate(source, start=1):
            yield RawRow(None, f"row {number}", without_filled_nulls(row) if of_arrow else row)
        return
    name = os.fspath(source)
    try:
        files = find_files(name, split)
    except (OSError, RuntimeError) as error:  # a name too long, a folder not to be entered, an unknown ~user
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise LoraMsError(f"{name:.80}: {reason}; check the path of the dataset") from error
    for file in files:
        yield from read_file(file, split)


def is_of_split(name: str, split: str) -> bool:
    """Whether a hub's file says in its path that it is of the split: ``data/train-00000-of-00002.parquet``."""
    return re.search(rf"(^|[-_./]){re.escape(split)}([-_./]|$)", name) is not None


def _named(file: Path, split: str) -> bool:
    """Whether a file is named as the split alone, perhaps with a number: ``train.jsonl``, ``train-00000-of-2.csv``."""
    return re.fullmatch(rf"{re.escape(split)}([-_.]?\d[-\w]*)?(\.\w+)+", file.name) is not None


def _of_split(source: str, files: list[Path], split: str) -> list[Path]:
    """Those of a folder's files that are of the split: that are named so, or, where it is ``train``, as no other one.

    Where no name tells a split, all; where all are of others, too, unless another split than ``train`` is asked for.
    """
    others = {other for other in SPLITS if other != split and any(_named(file, other) for file in files)}
    found = [file for file in files if _named(file, split)]
    if split == "train":
        return [file for file in files if not any(_named(file, other) for other in others)] or files
    if not found and others:
        there = ", ".join(sorted(others))
        raise LoraMsError(f"{source} has no split {split}; there are {there}: set data_loader.split")
    return found or files


def find_files(source: str, split: str | None = "train") -> list[Path]:
    """The supported files that `source` (a file, a folder or a glob) names, sorted; of a folder those of `split`, as in
    `read_sources`."""
    if not source.strip():
        raise LoraMsError("the path of the dataset is empty; name a file, a folder or a glob")
    path = Path(source).expanduser()
    if path.is_dir():
        if kind_of(path):
            return [path]
        found = [entry for entry in sorted(path.iterdir()) if kind_of(entry)]
        # as Hugging Face's repositories have it: data/train-00000-of-00002.parquet
        found = found or [entry for entry in sorted(path.glob("data/*")) if kind_of(entry)]
        if not found:
            raise LoraMsError(f"{source}: no supported file in this folder; supported are {SUPPORTED}")
        for other in HELD_OUT if split is None else ():
            if named := [file for file in found if _named(file, other)]:
                return named
        # as hubs and lora-ms preprocess, whose report stands beside them, number files
        numbered = [file for file in found if file.name.startswith(f"{split or 'train'}-")]
        return numbered or (found if split is None else _of_split(source, found, split))
    if path.is_file():
        if not kind_of(path):
            raise LoraMsError(f"{source}: file type not supported; supported are {SUPPORTED}")
        return [path]
    if glob.has_magic(str(path)):
        found = [entry for entry in map(Path, sorted(glob.glob(str(path), recursive=True))) if kind_of(entry)]
        if not found:
            raise LoraMsError(f"{source}: no supported file matches; supported are {SUPPORTED}")
        return found
    raise LoraMsError(f"{source}: no such file or folder; check the path of the dataset")


def kind_of(path: Path) -> str | None:
    """What a file is, by its name or its beginning; None for what is not read."""
    if path.is_dir():
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        return "datasets" if saved else None
    if path.name.startswith(".") or path.suffix == ".db" or not path.is_file():
        return None
    if path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".parquet"):
        return path.suffix.lower()
    if path.suffix == ".mindrecord" or _has_mindrecord_header(path):
        return ".mindrecord"
    return None


def _has_mindrecord_header(path: Path) -> bool:
    # Shards are named x.mindrecord0, x.mindrecord1 … The file begins with its header's length in 8 bytes, then JSON.
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError:
        return False
    return head[8:10] == b'{"' and b'"header_size"' in head


def read_file(path: Path, split: str | None) -> Iterator[RawRow]:
    """The rows of one file."""
    kind = kind_of(path)
    if kind == ".mindrecord":
        return read_mindrecord(path)
    if kind in (".csv", ".tsv", ".parquet", "datasets"):
        return read_table(path, str(kind), split)
    return read_json(path)


def read_json(path: Path) -> Iterator[RawRow]:
    """The rows of a JSON file: one object a line, read line by line; or a list or an object, read whole."""
    with opened_text(path) as file:
        first, more = _beginning(file)
    with opened_text(path) as file:
        by_line = not _opens_list(first, more) if path.suffix.lower() == ".jsonl" else more and _is_object(first)
        if by_line:
            yield from _json_lines(path, file)
        else:
            with readable(path, "JSON"):  # it is in memory as a whole
                raw = file.read()
            yield from _json_document(path, raw)


def _beginning(file: BinaryIO) -> tuple[bytes, bool]:
    """The first line that is not blank, and whether another one follows."""
    lines = _lines(file)
    first = next((line for line in lines if line.removeprefix(BOM).strip()), b"")
    more = any(line.strip() for line in lines)
    return first.removeprefix(BOM).strip(), more


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole object."""
    try:
        return len(line) <= MOST_BYTES and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _opens_list(first: bytes, more: bool) -> bool:
    """Whether a file whose first line is this one is a list of objects; a line with a whole list may be a row."""
    return first == b"[" or (re.match(rb"\[\s*\{", first) is not None and not (more and first.endswith(b"]")))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, the first ``MOST_BYTES`` + 1 bytes."""
    while line := file.readline(MOST_BYTES + 1):
        rest = line
        while len(rest) > MOST_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MOST_BYTES + 1)
        yield line


def _json_lines(path: Path, file: BinaryIO) -> Iterator[RawRow]:
    # by bytes: text would also be split at U+2028 and its like, which JSON strings may hold
    for number, raw in enumerate(_lines(file), start=1):
        line = (raw.removeprefix(BOM) if number == 1 else raw).rstrip(b"\r\n")
        if not line.strip():
            continue
        value: Any
        try:
            value = _without_repeated_keys(_loads(line.decode())) if len(line) <= MOST_BYTES else too_long()
        except UnicodeDecodeError as error:
            value = _not_utf8(line, error)
        except (ValueError, RecursionError) as error:
            value = RowFault(f"not valid JSON ({_reason(error)})", "write one object per line")
        yield RawRow(path, f"{shown_name(path)}:{number}", value)


def _json_document(path: Path, raw: bytes) -> Iterator[RawRow]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = _not_utf8(raw, error)
        line = raw.count(b"\n", 0, error.start) + 1
        raise LoraMsError(f"{shown_name(path)}:{line}: {fault.text}; {fault.advice}") from error
    if not text.strip():
        return
    try:
        document = _loads(text)
    except (ValueError, RecursionError) as error:
        place = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        by_line = ", or one object per line" if path.suffix.lower() == ".jsonl" else ""
        raise LoraMsError(
            f"{shown_name(path)}{place}: not valid JSON ({_reason(error)}); write a list of objects{by_line}"
        ) from error
    rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, start=1):
        try:
            value = _without_repeated_keys(row)
        except RecursionError as error:
            value = RowFault(f"not valid JSON ({_reason(error)})", "write objects with few levels")
        yield RawRow(path, f"{shown_name(path)}[{number}]", value)


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice."""

    key: str


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    names = [name for name, _ in pairs]
    repeated.key = next(name for name in names if names.count(name) > 1)
    return repeated


def _without_repeated_keys(value: Any) -> Any:
    """The value, or a RowFault where an object in it has a key twice: JSON would keep the last value alone."""
    key = _repeated_key(value)
    return value if key is None else RowFault(f"the key {key!r} stands twice in one object", "keep one of them")


def _repeated_key(value: Any) -> str | None:
    if isinstance(value, _Repeated):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for key in map(_repeated_key, inner) if key is not None), None)


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> RowFault:
    advice = "save the file as UTF-8 (from GBK: iconv -f GBK -t UTF-8)"
    return RowFault(f"byte 0x{raw[error.start]:02x} is not UTF-8", advice)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        found = error.doc[error.pos : error.pos + 1]
        if found == "}" and error.msg.startswith("Expecting property name"):
            return f"the last comma before column {error.colno} is too many"
        instead = f": {found} instead of {TYPED[found]}" if found in TYPED else ""
        return f"{error.msg.removesuffix(' at')} at column {error.colno}{instead}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
