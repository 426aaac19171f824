"""From a file, a folder, a glob or a list of dicts to rows: list[Example | TokenRow]."""

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.example import IGNORE_INDEX, Example, TokenRow
from lora_ms.data.formats import RowFault, parse_rows, token_row
from lora_ms.errors import LoraMsError

SUPPORTED = ".json, .jsonl, .mindrecord"


def read_rows(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    fill: Mapping[str, str] | None = None,
    num_samples: int | None = None,
) -> list[Example | TokenRow]:
    """Read the first `num_samples` rows (None: all) of `source`.

    source: a file, a folder (its supported files, sorted by name), a glob, or a sequence of dicts.
    fill: what stands for {{KEY}} in every string of a text row. A {{KEY}} that is not filled is an error;
        text that is about such braces keeps them with fill {"KEY": "{{KEY}}"}.

    Raises LoraMsError, with the file and line, for whatever cannot be read or learnt from.
    """
    fill = fill or {}
    if num_samples is not None and num_samples < 1:
        raise LoraMsError(f"num_samples is {num_samples}; give 1 or more, or leave it out to read all rows")
    if not isinstance(source, str | os.PathLike):
        numbered = ((f"row {number}", row) for number, row in enumerate(source, start=1))
        rows = parse_rows(islice(numbered, num_samples), fill)
        name = "the dataset"
    else:
        rows = []
        name = os.fspath(source)
        try:
            files = find_files(name)
        except (OSError, RuntimeError) as error:  # a name too long, a folder not to be entered, an unknown ~user
            reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
            raise LoraMsError(f"{name:.80}: {reason}; check the path of the dataset") from error
        for path in files:
            limit = None if num_samples is None else num_samples - len(rows)
            if limit == 0:
                break
            rows += _read_file(path, fill, limit)
    if not rows:
        raise LoraMsError(f"{name}: there are no rows; give at least one")
    return rows


def find_files(source: str) -> list[Path]:
    """The supported files that `source` (a file, a folder or a glob) names, sorted."""
    if not source.strip():
        raise LoraMsError("the path of the dataset is empty; name a file, a folder or a glob")
    path = Path(source).expanduser()
    if path.is_dir():
        found = [entry for entry in sorted(path.iterdir()) if _kind(entry)]
        if not found:
            raise LoraMsError(f"{source}: no supported file in this folder; supported are {SUPPORTED}")
        return found
    if path.is_file():
        if not _kind(path):
            raise LoraMsError(f"{source}: file type not supported; supported are {SUPPORTED}")
        return [path]
    if glob.has_magic(str(path)):
        found = [entry for entry in map(Path, sorted(glob.glob(str(path), recursive=True))) if _kind(entry)]
        if not found:
            raise LoraMsError(f"{source}: no supported file matches; supported are {SUPPORTED}")
        return found
    raise LoraMsError(f"{source}: no such file or folder; check the path of the dataset")


def _kind(path: Path) -> str | None:
    if path.name.startswith(".") or path.suffix == ".db" or not path.is_file():
        return None
    if path.suffix.lower() in (".json", ".jsonl"):
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


def _read_file(path: Path, fill: Mapping[str, str], limit: int | None) -> list[Example | TokenRow]:
    if _kind(path) == ".mindrecord":
        return list(read_mindrecord(path, limit))
    text = _decode(path)
    rows = _json_lines(path.name, text) if path.suffix.lower() == ".jsonl" else _json_document(path.name, text)
    return parse_rows(islice(rows, limit), fill)


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise LoraMsError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise LoraMsError(
            f"{path.name}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 "
            f"(from GBK: iconv -f GBK -t UTF-8)"
        ) from error


def _json_lines(name: str, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines: it also splits at U+2028 and its like, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise LoraMsError(
                f"{name}:{number}: not valid JSON ({_reason(error)}); write one object per line"
            ) from error
        yield f"{name}:{number}", row


def _json_document(name: str, text: str) -> Iterator[tuple[str, Any]]:
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        # One object per line under the name .json: "Extra data" is what follows the first complete object.
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(name, text)
            return
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LoraMsError(f"{name}{line}: not valid JSON ({_reason(error)}); write a list of objects") from error
    rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{number}]", row


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{error.msg} at column {error.colno}"


def read_mindrecord(path: Path, limit: int | None = None) -> Iterator[TokenRow]:
    """The rows of one MindRecord file with columns input_ids [n] and, optionally, labels [n] (else: all is learnt).

    Rows are stored at one length, filled up with a pad token whose label is -100: that tail is cut off here.
    Without labels, padding cannot be told from text, and the row stays whole.
    """
    if not path.with_name(f"{path.name}.db").is_file():
        raise LoraMsError(f"{path}: its index {path.name}.db is missing; copy it beside the file")
    for number, row in enumerate(_mindrecord_rows(path, limit), start=1):
        where = f"{path.name}[{number}]"
        try:
            yield trim_padding(token_row(where, row["input_ids"], row.get("labels", row["input_ids"])))
        except RowFault as fault:
            raise LoraMsError(f"{where}: {fault.text}; {fault.advice}") from fault


def _mindrecord_rows(path: Path, limit: int | None) -> Iterator[dict[str, NDArray[Any]]]:
    try:
        import mindspore.dataset as ds
    except ImportError as error:
        raise LoraMsError(f"{path}: MindRecord files need MindSpore; install it, or give .json or .jsonl") from error
    try:
        # A list, so that one shard of several is read alone; the folder or glob names the others.
        dataset = ds.MindDataset([str(path)], shuffle=False, num_parallel_workers=1, num_samples=limit)
        columns = dataset.get_col_names()
        if "input_ids" not in columns:
            names = ", ".join(columns)
            raise LoraMsError(f'{path}: columns {names}; a column "input_ids" is needed (and may have "labels")')
        yield from dataset.create_dict_iterator(num_epochs=1, output_numpy=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise LoraMsError(f"{path}: not readable as MindRecord ({reason}); write it anew") from error


def trim_padding(row: TokenRow) -> TokenRow:
    """Cut the tail of unlearnt tokens that repeat the row's last id. Nothing learnt comes after, so no loss changes."""
    ids, labels = row.input_ids, row.labels
    padding: NDArray[np.bool_] = (ids == ids[-1]) & (labels == IGNORE_INDEX)
    kept = np.flatnonzero(~padding)
    length = int(kept[-1]) + 1 if kept.size else 1
    return TokenRow(row.where, ids[:length].copy(), labels[:length].copy())  # a view would keep the padding in memory
