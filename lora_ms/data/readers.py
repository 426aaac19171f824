"""From a file, a folder, a glob or a list of dicts to rows: list[Example | TokenRow]."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lora_ms.data.formats import Reading, Row, parse_rows
from lora_ms.data.json_files import read_json
from lora_ms.data.mindrecord import read_mindrecord
from lora_ms.data.tables import read_table
from lora_ms.errors import LoraMsError

SUPPORTED = ".json, .jsonl, .csv, .tsv, .parquet, .mindrecord, or a folder saved by Hugging Face datasets"


def read_rows(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    fill: Mapping[str, str] | None = None,
    num_samples: int | None = None,
) -> list[Row]:
    """Read the first `num_samples` rows (None: all) of `source` into a list.

    source: a file, a folder (its supported files, sorted by name), a glob, or a sequence of dicts.
    fill: what stands for {{KEY}} in every string of a text row. A {{KEY}} that is not filled is an error;
        text that is about such braces keeps them with fill {"KEY": "{{KEY}}"}.

    Raises LoraMsError, with the file and line, for whatever cannot be read or learnt from.
    """
    return list(iter_rows([source], Reading(fill=fill or {}), num_samples))


def iter_rows(
    sources: Sequence[str | os.PathLike[str] | Sequence[Mapping[str, Any]]],
    reading: Reading,
    num_samples: int | None = None,
    split: str = "train",
) -> Iterator[Row]:
    """The first `num_samples` rows of all sources, one file after another, one row in memory at a time.

    split: which part of a Hugging Face dataset that has several.

    Raises LoraMsError, with the file and line, for whatever cannot be read or learnt from.
    """
    if num_samples is not None and num_samples < 1:
        raise LoraMsError(f"num_samples is {num_samples}; give 1 or more, or leave it out to read all rows")
    left = num_samples
    for source in sources:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the dataset"
        count = 0
        for pairs in _files(name, split) if isinstance(source, str | os.PathLike) else [_numbered(source)]:
            for row in parse_rows(islice(pairs, left), reading):
                count += 1
                yield row
                left = None if left is None else left - 1
            if left == 0:
                return
        if not count and (reading.accept, reading.keep, reading.on_fault) == (None, None, None):
            raise LoraMsError(f"{name}: there are no rows; give at least one")


def _numbered(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _files(source: str, split: str) -> Iterator[Iterator[tuple[str, Any]]]:
    try:
        files = find_files(source, split)
    except (OSError, RuntimeError) as error:  # a name too long, a folder not to be entered, an unknown ~user
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise LoraMsError(f"{source:.80}: {reason}; check the path of the dataset") from error
    return (read_file(path, split) for path in files)


def find_files(source: str, split: str = "train") -> list[Path]:
    """The supported files that `source` (a file, a folder or a glob) names, sorted."""
    if not source.strip():
        raise LoraMsError("the path of the dataset is empty; name a file, a folder or a glob")
    path = Path(source).expanduser()
    if path.is_dir():
        if kind_of(path):
            return [path]
        found = [entry for entry in sorted(path.iterdir()) if kind_of(entry)]
        # as Hugging Face's repositories have it: data/train-00000-of-00002.parquet
        found = found or [entry for entry in sorted(path.glob("data/*")) if kind_of(entry)]
        found = [entry for entry in found if entry.name.startswith(f"{split}-")] or found
        if not found:
            raise LoraMsError(f"{source}: no supported file in this folder; supported are {SUPPORTED}")
        return found
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


def read_file(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of one file; a RowFault stands for a line that is none."""
    kind = kind_of(path)
    if kind == ".mindrecord":
        return read_mindrecord(path)
    if kind in (".csv", ".tsv", ".parquet", "datasets"):
        return read_table(path, str(kind), split)
    return read_json(path)
