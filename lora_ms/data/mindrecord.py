"""MindRecord files: token rows as MindFormers stores them."""

import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ms import saving
from lora_ms.data.example import IGNORE_INDEX, RawRow, TokenRow, shown_name
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.reading import readable, reason

ROWS_WRITTEN = 2000  # together
WRITTEN_SET = "mindrecord.sha256"  # the list of the files of ``lora-ms preprocess``


def read_mindrecord(path: Path) -> Iterator[RawRow]:
    """The rows of one MindRecord file: columns input_ids [n] and, optionally, labels [n] (else: all is learnt).

    Rows are stored at one length, filled up with a pad token whose label is -100: that tail is cut off here.
    Without labels, padding cannot be told from text, and the row stays whole.
    """
    _check_whole(path)
    for number, row in enumerate(_mindrecord_rows(path), start=1):
        ids, labels = trim_padding(row["input_ids"], row.get("labels", row["input_ids"]))
        yield RawRow(path, f"{shown_name(path)}[{number}]", {"input_ids": ids, "labels": labels})


def _check_whole(path: Path) -> None:
    if saving.set_is_unfinished(path.parent, WRITTEN_SET):
        raise LoraMsError(f"{path}: lora-ms preprocess ended before all files were in their place; run it once more")
    if not path.with_name(f"{path.name}.db").is_file():
        raise LoraMsError(f"{path}: its index {path.name}.db is missing; copy it beside the file")


def _mindrecord_rows(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    try:
        import mindspore.dataset as ds
    except ImportError as error:
        raise LoraMsError(f"{path}: MindRecord files need MindSpore; install it, or give .json or .jsonl") from error
    with readable(path, "MindRecord", "write it anew"):
        # A list, so that one shard of several is read alone; the folder or glob names the others.
        dataset = ds.MindDataset([str(path)], shuffle=False, num_parallel_workers=1)
        columns = dataset.get_col_names()
        if "input_ids" not in columns:
            names = ", ".join(columns)
            raise LoraMsError(f'{path}: columns {names}; a column "input_ids" is needed (and may have "labels")')
        yield from dataset.create_dict_iterator(num_epochs=1, output_numpy=True)


def trim_padding(ids: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cut the tail of unlearnt tokens that repeat the row's last id. Nothing learnt comes after, so no loss changes.

    ids, labels [n], of integers; arrays of another shape or type come back as they are, to be refused as a row.
    """
    if ids.ndim != 1 or ids.shape != labels.shape or not ids.size:
        return ids, labels
    padding = (ids == ids[-1]) & (labels == IGNORE_INDEX)
    kept = np.flatnonzero(~padding)
    length = int(kept[-1]) + 1 if kept.size else 1
    return ids[:length].copy(), labels[:length].copy()  # a view would keep the padding in memory


def write_mindrecord(path: Path, rows: Iterable[TokenRow], width: int | None, pad_id: int) -> None:
    """Write one file with columns input_ids and labels, unshifted.

    width: tokens of every row, filled up with `pad_id` and label -100, as MindFormers expects them (seq_length + 1);
        None keeps each row as long as it is.
    """
    from mindspore.mindrecord import FileWriter
    from mindspore.mindrecord.common.exceptions import MindRecordException

    column = {"type": "int32", "shape": [-1 if width is None else width]}
    rows = iter(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        saving.create(path)
        mode = path.stat().st_mode  # by the umask
        path.unlink()
        writer = FileWriter(str(path), 1, overwrite=True)
        writer.add_schema({"input_ids": column, "labels": column}, "token rows of lora_ms")
        while piece := [_padded(row, width, pad_id) for row in islice(rows, ROWS_WRITTEN)]:
            writer.write_raw_data(piece)
        writer.commit()
        for file in (path, path.with_name(f"{path.name}.db")):
            file.chmod(stat.S_IMODE(mode))  # MindSpore sets its own
    except (OSError, RuntimeError, MindRecordException) as error:
        raise WriteError(f"cannot write {path}: {reason(error)}") from None


def _padded(row: TokenRow, width: int | None, pad_id: int) -> dict[str, NDArray[np.int32]]:
    if width is None:
        return {"input_ids": np.array(row.input_ids), "labels": np.array(row.labels)}
    ids = np.full(width, pad_id, np.int32)
    labels = np.full(width, IGNORE_INDEX, np.int32)
    ids[: len(row.input_ids)] = row.input_ids
    labels[: len(row.labels)] = row.labels
    return {"input_ids": ids, "labels": labels}


def fixed_width(files: Sequence[Path], width: int) -> int:
    """How many rows MindRecord files have together, where each has labels and begins with a row of ``width`` tokens;
    else 0.

    Raises:
        LoraMsError: they are not readable.
    """
    if any(file.suffix != ".mindrecord" for file in files):
        return 0
    schemas = [_schema(file) for file in files]
    if any(schema != schemas[0] for schema in schemas):  # MindDataset reads files of one schema alone
        return 0
    for file in files:
        row = next(_mindrecord_rows(file), {})
        if "labels" not in row or row["input_ids"].shape != (width,):
            return 0
    import mindspore.dataset as ds

    return ds.MindDataset([str(file) for file in files], shuffle=False, num_parallel_workers=1).get_dataset_size()


def _schema(file: Path) -> dict[str, dict[str, Any]]:
    """Type and shape of each column."""
    _check_whole(file)
    from mindspore.mindrecord import FileReader

    with readable(file, "MindRecord", "write it anew"):
        reader = FileReader(str(file), num_consumer=1)
        try:
            return reader.schema()
        finally:
            reader.close()
