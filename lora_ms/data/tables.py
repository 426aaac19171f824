"""Tables: CSV, Parquet, and folders that Hugging Face datasets has saved. Read in pieces, never whole."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ms.data.example import MOST_BYTES, RawRow, RowFault, shown_name
from lora_ms.errors import LoraMsError
from lora_ms.reading import member, opened, opened_text, read_json, readable

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_A_TIME = 512
SPLITS = ("train", "test", "validation", "valid", "val", "dev")  # words in the names of files
HELD_OUT = SPLITS[1:]
QUOTES = "put fields with commas or quotes in quotes"


def read_table(path: Path, kind: str, split: str | None) -> Iterator[RawRow]:
    """The rows of one file or folder; split: as in ``readers.read_sources``."""
    if kind == ".parquet":
        return _parquet(path)
    if kind == "datasets":
        return _saved_dataset(path, split)
    return _csv(path, "\t" if kind == ".tsv" else ",")


def _csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(MOST_BYTES)
    try:
        with opened_text(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                names = next(reader, [])
            except csv.Error as error:
                raise LoraMsError(f"{shown_name(path)}:1: not valid CSV ({error}); {QUOTES}") from None
            _check_columns(path, names)
            while True:
                where = f"{shown_name(path)}:{reader.line_num + 1}"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield RawRow(path, where, RowFault(f"not valid CSV ({error})", QUOTES))
                    continue
                if fields:
                    yield RawRow(path, where, _by_column(names, fields))
    except UnicodeDecodeError as error:
        advice = "save the file as UTF-8 (from GBK: iconv -f GBK -t UTF-8)"
        raise LoraMsError(
            f"{shown_name(path)}: byte 0x{error.object[error.start]:02x} is not UTF-8; {advice}"
        ) from error


def separator_advice(name: str) -> str:
    """What to do where all columns of a .csv seem to be one of this name; "" where it is one."""
    if "\t" in name:
        return "if tabs separate the columns, name the file .tsv"
    return "if semicolons separate the columns, save the file with commas" if ";" in name else ""


def _by_column(names: list[str], fields: list[str]) -> dict[str, str] | RowFault:
    if len(fields) != len(names):
        text = f"{len(fields)} fields, and the first line names {len(names)} columns"
        if len(names) == 1 and (advice := separator_advice(names[0])):
            return RowFault(text, advice)
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
    with opened(path) as raw, readable(path, "Parquet", "write it anew"), pyarrow.parquet.ParquetFile(raw) as file:
        _check_columns(path, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS_AT_A_TIME):
            for row in _rows(batch):
                number += 1
                yield RawRow(path, f"{shown_name(path)}[{number}]", row)


def _rows(table: "pyarrow.Table | pyarrow.RecordBatch") -> Iterator[dict[str, Any]]:
    """The rows of a piece of an Arrow table, once its offsets and texts are known to be good."""
    table.validate(full=True)
    yield from map(without_filled_nulls, table.to_pylist())


def _saved_dataset(path: Path, split: str | None) -> Iterator[RawRow]:
    from datasets import DatasetDict, load_from_disk

    _check_saved_files(path)
    dataset: Any
    number = 0
    with readable(path, "a saved dataset", "save it anew"):
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if split is None:
                split = next((name for name in HELD_OUT if name in dataset), "train")
            if split not in dataset:
                raise LoraMsError(f"{path}: there is no split {split!r}; there are {', '.join(sorted(dataset))}")
            dataset = dataset[split]
        for table in dataset.with_format("arrow").iter(ROWS_AT_A_TIME):
            for row in _rows(table):
                number += 1
                yield RawRow(path, f"{shown_name(path)}[{number}]", row)


def _check_saved_files(path: Path) -> None:
    """Raises LoraMsError where a saved dataset names files outside its folder."""
    splits = [path]
    if (path / "dataset_dict.json").is_file():
        names = read_json(member(path, "dataset_dict.json")).get("splits")
        splits = [member(path, str(name)) for name in names] if isinstance(names, list) else []
    for folder in splits:
        files = read_json(member(folder, "state.json")).get("_data_files")
        for file in files if isinstance(files, list) else []:
            member(folder, str(file.get("filename") if isinstance(file, dict) else file))


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
