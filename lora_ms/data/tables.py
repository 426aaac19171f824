"""Tables: CSV, Parquet, and folders that Hugging Face datasets has saved. Read in pieces, never whole."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_ms.data.example import RawRow, RowFault, shown_name
from lora_ms.errors import LoraMsError

ROWS_AT_A_TIME = 512


def read_table(path: Path, kind: str, split: str) -> Iterator[RawRow]:
    """The rows of one file or folder."""
    if kind == ".parquet":
        return _parquet(path)
    if kind == "datasets":
        return _saved_dataset(path, split)
    return _csv(path, "\t" if kind == ".tsv" else ",")


def _csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            _check_columns(path, names)
            while True:
                where = f"{shown_name(path)}:{reader.line_num + 1}"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    fault = RowFault(f"not valid CSV ({error})", "put fields with commas or quotes in quotes")
                    yield RawRow(path, where, fault)
                    continue
                if fields:
                    yield RawRow(path, where, _by_column(names, fields))
    except UnicodeDecodeError as error:
        advice = "save the file as UTF-8 (from GBK: iconv -f GBK -t UTF-8)"
        raise LoraMsError(
            f"{shown_name(path)}: byte 0x{error.object[error.start]:02x} is not UTF-8; {advice}"
        ) from error
    except OSError as error:
        raise LoraMsError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _by_column(names: list[str], fields: list[str]) -> dict[str, str] | RowFault:
    if len(fields) != len(names):
        text = f"{len(fields)} fields, and the first line names {len(names)} columns"
        return RowFault(text, "put fields with commas in quotation marks")
    return dict(zip(names, fields, strict=True))


def _check_columns(path: Path, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LoraMsError(f"{shown_name(path)}: the column {twice[0]!r} is there twice; rename or remove one")


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(path, f"{shown_name(path)}[{number}]", without_filled_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LoraMsError(f"{path}: not readable as Parquet ({reason}); write it anew") from error


def _saved_dataset(path: Path, split: str) -> Iterator[RawRow]:
    from datasets import DatasetDict, load_from_disk

    dataset: Any
    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of Arrow, JSON and pickles
        reason = " ".join(str(error).split())[:200]
        raise LoraMsError(f"{path}: not readable as a saved dataset ({reason}); save it anew") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise LoraMsError(f"{path}: there is no split {split!r}; there are {', '.join(sorted(dataset))}")
        dataset = dataset[split]
    for number, row in enumerate(dataset, start=1):
        yield RawRow(path, f"{shown_name(path)}[{number}]", without_filled_nulls(row))


def without_filled_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls inside its columns' objects, which no one wrote.

    Arrow gives all objects of a column the same keys, and a null for each that one of them did not have.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
