"""Files on disk: tensors mapped and read one at a time, and writing that is whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from lora_ms.errors import LoraMsError

# safetensors names its types so; bfloat16, which NumPy lacks, is read as 16-bit words
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}
INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """Where a tensor lies: its file, type, shape and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """Names and places of one file's tensors (format: 8-byte little-endian length, JSON, data).

    Raises:
        LoraMsError: the file is missing, truncated or not safetensors.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise ValueError("the header reaches beyond the end of the file")
            header = json.loads(stream.read(length))
        places = {name: _place(info) for name, info in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise LoraMsError(f"{file}: no such file") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise LoraMsError(f"{file}: not a readable safetensors file ({error})") from None
    base = 8 + length
    entries = {}
    for name, (dtype, shape, start, end) in places.items():
        if base + end > size:
            raise LoraMsError(f"{file}: truncated: {name} ends at byte {base + end:,} and the file at {size:,}")
        entries[name] = Entry(file, dtype, shape, base + start, base + end)
    return entries


def _place(info: dict) -> tuple[str, tuple[int, ...], int, int]:
    start, end = info["data_offsets"]
    return info["dtype"], tuple(info["shape"]), start, end


def open_dir(path: Path) -> dict[str, Entry]:
    """All tensors of a directory: one ``model.safetensors``, or shards named by an index."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoraMsError(f"{path / INDEX}: holds no weight_map")
        files = sorted(set(weight_map.values()))
    elif (path / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise LoraMsError(f"{path}: holds no model.safetensors and no {INDEX}")
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= read_header(path / file)
    return entries


def read(entry: Entry, dtype: DTypeLike) -> np.ndarray:
    """The tensor as ``dtype``; at most one copy of it is in memory besides the mapped file."""
    if entry.dtype not in DTYPES:
        raise LoraMsError(f"{entry.file}: type {entry.dtype} is not supported; supported: {', '.join(DTYPES)}")
    stored = np.dtype(DTYPES[entry.dtype])
    count = (entry.end - entry.start) // stored.itemsize
    raw = np.memmap(entry.file, stored, "r", entry.start, (count,)) if count else np.empty(0, stored)
    if entry.dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        raw = wide.view(np.float32)
    return np.array(raw, dtype, copy=entry.dtype != "BF16" or raw.dtype != dtype).reshape(entry.shape)


def read_json(file: Path) -> dict:
    """The object in ``file``. Raises LoraMsError where the file is missing, does not parse or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoraMsError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise LoraMsError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LoraMsError(f"{file}: holds no JSON object")
    return value


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write instead of ``file``; renamed to it when the block ends well, removed when it does not.

    Raises:
        LoraMsError: the folder cannot be made or written.
    """
    part = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, file)
    except OSError as error:
        raise LoraMsError(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, value: object) -> None:
    """Indented, with a final newline."""
    with whole(file) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file; metadata defaults to the ``{"format": "pt"}`` that transformers and PEFT look for."""
    from safetensors.numpy import save_file

    with whole(file) as part:
        save_file(tensors, part, metadata={"format": "pt"} if metadata is None else metadata)
        part.chmod(0o644)  # safetensors leaves it to the owner alone
