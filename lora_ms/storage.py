"""Tensors and settings on disk: mapped and read one at a time, and written block by block."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import IndexJson, check
from lora_ms.reading import PICKLES, member, opened, parse_json, read_json, readable, refuse_pickle
from lora_ms.saving import new_file

# safetensors names its types so; bfloat16, which NumPy lacks, is read as 16-bit words
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}
# bits of a number, by all types of the format
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
HEADER_SIZE = 100_000_000  # bytes, the library's limit
LONGEST_NAME = 1000  # characters of a tensor's name
MOST_AXES = 32  # of a tensor, as in NumPy
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
OF_NUMPY = {"float32": "F32", "float16": "F16", "float64": "F64", "uint8": "U8"}
INDEX = "model.safetensors.index.json"
# what another model in the same folder replaces
MODEL_FILES = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SHARD_SIZE = 5 * 10**9  # bytes, as transformers has it
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BLOCK = 2**22  # numbers of a tensor that are in memory at a time


class Entry(NamedTuple):
    """Where a tensor lies: its file, type, shape and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """Names and places of one file's tensors (format: 8-byte little-endian length, JSON, data).

    The rules are the safetensors library's: the tensors fill the data from the first byte to the last, one after
    another, each as long as its type and shape say. Besides, no name stands twice or is very long.

    Raises:
        LoraMsError: the file is missing, truncated, contradicts itself or is no safetensors file.
    """
    with opened(file) as stream, readable(file, "safetensors"):
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if length > HEADER_SIZE:
            raise ValueError(f"a header of {length:,} bytes: at most {HEADER_SIZE:,} are read")
        if length > size - 8:
            raise ValueError("the header reaches beyond the end of the file")
        text = stream.read(length).decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("the header is no JSON object")
        header = parse_json(text, parse_int=_natural, parse_constant=_no_number)
        check_metadata(header.pop("__metadata__", None))
        entries = {name: _entry(file, name, info, 8 + length) for name, info in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.end > size:
                raise LoraMsError(f"{file}: truncated: {name} ends at byte {entry.end:,} and the file at {size:,}")
            if entry.start != end:
                raise ValueError(f"{name} begins at byte {entry.start:,}, and the tensor before it ends at {end:,}")
            end = entry.end
        if end != size:
            raise ValueError(f"the tensors end at byte {end:,} and the file at {size:,}")
    return entries


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 20 or int(text) >= 2**64:
        raise ValueError(f"the number {text:.20} is out of range")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def check_metadata(metadata: Any) -> dict[str, str]:
    """The metadata of a header. Raises ValueError where they are not texts."""
    texts = metadata is None or (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()))
    if not texts:
        raise ValueError("__metadata__ holds values other than texts")
    return metadata or {}


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that ``write_tensors`` put beside the tensors of a file, which ``read_header`` has accepted."""
    with opened(file) as stream, readable(file, "safetensors"):
        length = int.from_bytes(stream.read(8), "little")
        if length > HEADER_SIZE:
            raise ValueError(f"a header of {length:,} bytes: at most {HEADER_SIZE:,} are read")
        return check_metadata(parse_json(stream.read(length).decode("utf-8")).get("__metadata__"))


def _entry(file: Path, name: str, info: Any, base: int) -> Entry:
    """The place of a tensor; base: where the data begin."""
    name.encode()  # half a surrogate pair is no text
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name of {len(name):,} characters: at most {LONGEST_NAME:,} are read")
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has other keys than dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} is of the unknown type {dtype!r:.80}")
    whole = isinstance(shape, list) and isinstance(offsets, list) and all(type(n) is int for n in (*shape, *offsets))
    if not whole or len(offsets) != 2:
        raise ValueError(f"{name}: shape and data_offsets are no lists of whole numbers")
    if len(shape) > MOST_AXES:
        raise ValueError(f"{name}: {len(shape):,} axes, and at most {MOST_AXES} are read")
    bits = BITS[dtype]
    for number in shape:
        bits *= number
        if bits >= 2**63:
            raise ValueError(f"{name}: its shape is out of range")
    start, end = offsets
    if end < start or bits != 8 * (end - start):
        raise ValueError(
            f"{name}: data_offsets of {end - start:,} bytes, but {dtype} of shape {shape} takes {bits // 8:,}"
        )
    return Entry(file, dtype, tuple(shape), base + start, base + end)


def open_dir(path: Path) -> dict[str, Entry]:
    """All tensors of a directory: one ``model.safetensors``, or shards named by an index.

    Raises:
        LoraMsError: neither, or both: then nothing says which of the two are the weights; or a file outside.
    """
    single = "model.safetensors"
    weight_map: dict[str, str] = {}
    if (path / INDEX).is_file():
        index = read_json(member(path, INDEX))
        weight_map = check(IndexJson, index, path / INDEX)["weight_map"]
    files = sorted(set(weight_map.values()))
    for file in files:
        member(path, file)
    if (path / single).is_file() and single not in files:
        left = [file for file in files if (path / file).is_file()]
        if left:
            raise LoraMsError(
                f"{path}: holds {single} and {INDEX} with {left[0]}: which are the weights? Move the older ones away "
                f"(transformers reads {single}, vLLM the others)"
            )
        files = [single]  # the index is of shards that are gone
        weight_map = {}
    if not files:
        for other in sorted(path.glob("*.*")) if path.is_dir() else ():
            if other.suffix in PICKLES and other.stem != "training_args":
                refuse_pickle(other)
        raise LoraMsError(f"{path}: holds no {single} and no {INDEX}")
    entries: dict[str, Entry] = {}
    for file in files:
        found = read_header(member(path, file))
        entries |= {name: entry for name, entry in found.items() if weight_map.get(name, file) == file}
    return entries


def check_type(entry: Entry) -> None:
    """Raises LoraMsError where a tensor is not of one of ``DTYPES``."""
    if entry.dtype not in DTYPES:
        raise LoraMsError(f"{entry.file}: type {entry.dtype} is not supported; supported: {', '.join(DTYPES)}")


def read(entry: Entry, dtype: DTypeLike) -> np.ndarray:
    """The tensor as ``dtype``, which may be the bfloat16 of a library; at most one copy of it is in memory besides the
    mapped file, or two where bfloat16 becomes float16."""
    return fill(np.empty(entry.shape, dtype), entry)


def fill(out: np.ndarray, entry: Entry) -> np.ndarray:
    """Reads the tensor into ``out``, of its shape and of any type; see ``read``. Returns ``out``."""
    check_type(entry)
    stored = np.dtype(DTYPES[entry.dtype])
    if not out.size:
        return out
    raw = np.memmap(entry.file, stored, "r", entry.start, entry.shape or (1,))
    if entry.dtype != "BF16":
        np.copyto(out, raw.reshape(entry.shape), casting="unsafe")
    elif out.dtype.name == "bfloat16":
        out.view(stored)[...] = raw.reshape(entry.shape)
    else:
        wide = out if out.dtype == np.float32 else np.empty(entry.shape, np.float32)
        np.left_shift(raw.reshape(entry.shape), 16, out=wide.view(np.uint32), dtype=np.uint32)
        if wide is not out:
            np.copyto(out, wide, casting="unsafe")
    return out


def read_raw(entry: Entry) -> np.ndarray:
    """The bytes of a tensor of any type, as they lie: uint8 [n], mapped."""
    size = entry.end - entry.start
    return np.memmap(entry.file, np.uint8, "r", entry.start, (size,)) if size else np.empty(0, np.uint8)


def rows_of(entry: Entry, start: int, stop: int) -> Entry:
    """The rows from ``start`` to ``stop`` of a tensor, as a tensor."""
    width = (entry.end - entry.start) // max(entry.shape[0], 1)
    shape = (stop - start, *entry.shape[1:])
    return entry._replace(shape=shape, start=entry.start + start * width, end=entry.start + stop * width)


def read_part(entry: Entry, place: tuple[slice, ...], dtype: DTypeLike) -> np.ndarray:
    """The rows and columns ``place`` of a tensor, of which little else is in memory at a time."""
    rows, *columns = (slice(*each.indices(n)) for each, n in zip(place, entry.shape, strict=True))
    entry = rows_of(entry, rows.start, rows.stop)
    part = np.empty([each.stop - each.start for each in (rows, *columns)], dtype)
    for block in row_blocks(entry.shape):
        part[block] = read(rows_of(entry, block.start, block.stop), dtype)[(slice(None), *columns)]
    return part


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Ranges of rows of at most ``BLOCK`` numbers, or of one row."""
    height = max(1, BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], height):
        yield slice(start, min(start + height, shape[0]))


def read_blocks(entry: Entry, dtype: DTypeLike = np.float32) -> Iterator[np.ndarray]:
    """The tensor in blocks of rows, one after another."""
    for rows in row_blocks(entry.shape) if entry.shape else ():
        yield read(rows_of(entry, rows.start, rows.stop), dtype)
    if not entry.shape:
        yield read(entry, dtype)


def read_words(entry: Entry) -> Iterator[np.ndarray]:
    """The tensor as it is stored, in blocks."""
    check_type(entry)
    kind = np.dtype(DTYPES[entry.dtype])
    for start in range(entry.start, entry.end, BLOCK * kind.itemsize):
        count = (min(start + BLOCK * kind.itemsize, entry.end) - start) // kind.itemsize
        yield np.fromfile(entry.file, kind, count, offset=start)


def write_json(file: Path, value: object) -> None:
    """Indented, with a final newline."""
    with new_file(file) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, as the library itself writes it: sorted by name."""
    planned = {
        name: Planned(OF_NUMPY[value.dtype.name], value.shape, partial(iter, [value]))
        for name, value in sorted(tensors.items())
    }
    with new_file(file) as part:
        write_blocks(part, planned, metadata)


def encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` as they are stored in safetensors' ``dtype``; bfloat16 is rounded to the nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # infinity then, for the caller to refuse
            return np.ascontiguousarray(values, DTYPES[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    words = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FC0), words) if nan.any() else words


class Planned(NamedTuple):
    """A tensor to be written: its type in the file, its shape, and blocks of rows as they are stored."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * BITS[self.dtype] // 8


def parse_size(text: str) -> int:
    """Bytes: ``5GB``, ``500MB``, ``2GiB`` or a plain number. Raises LoraMsError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise LoraMsError(f"max_shard_size expects a size such as 5GB or 500MB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def shards_of(planned: Mapping[str, Planned], shard_size: int) -> dict[str, list[str]]:
    """Names of tensors by file, in order; a file is at most ``shard_size`` bytes of tensors, or one tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in planned.items():
        if not shards or tensor.size > room:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= tensor.size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_model(folder: Path, planned: Mapping[str, Planned], shard_size: int = SHARD_SIZE) -> Iterator[Path]:
    """Writes ``model.safetensors``, or shards and their index, block by block; yields each file once it is written."""
    shards = shards_of(planned, shard_size)
    for file, names in shards.items():
        write_blocks(folder / file, {name: planned[name] for name in names})
        yield folder / file
    if len(shards) > 1:
        total = sum(tensor.size for tensor in planned.values())
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_blocks(file: Path, planned: Mapping[str, Planned], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file; metadata: texts besides the format's name."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in planned.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format has it
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in planned.values():
            for block in tensor.blocks():
                stream.write(np.ascontiguousarray(block).data.cast("B") if block.size else b"")
