"""A GGUF file's metadata and tensors, read and written; and where llama.cpp's layout differs from Hugging Face's.

Rows of a query's or key's matrix: Llama's rotary pairs are channels i and i + d/2 of a head at Hugging Face, and 2i and
2i + 1 in llama.cpp, which therefore stores the rows in another order (``interleaved``). Qwen's stay as they are.
"""

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.limits import limited
from lora_ms.reading import opened, readable
from lora_ms.storage import Planned

# llama.cpp's name of an architecture -> transformers'; Mistral is Llama there
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FAMILIES = {name: arch for arch, name in ARCHITECTURES.items()} | {"MistralForCausalLM": "llama"}
INTERLEAVED = ("llama",)
FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F32"}  # GGUF's type -> safetensors'
QUANTISED = "F16"  # what quantised tensors become where nothing is asked
SECONDS = 120.0  # to read the metadata; a vocabulary of 150,000 takes seven
MEMORY = 3 * 2**30  # bytes for it
Words = NDArray[Any]


def package() -> Any:
    """The ``gguf`` package. Raises LoraMsError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise LoraMsError("GGUF files need the package gguf: pip install gguf (or lora_ms[gguf])") from None


class GgufFile(NamedTuple):
    """What a file holds. metadata: key -> number, text or list. tensors: the package's, by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def fault(self, text: str) -> LoraMsError:
        return LoraMsError(f"{self.path}: {text}")

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata; default: None where it must be there.

        Raises:
            LoraMsError: it is not there, or of another type.
        """
        found = self.metadata.get(key, default)
        if kind is float and type(found) is int:
            found = float(found)
        if found is None:
            raise self.fault(f"{key} is missing in its metadata")
        if type(found) is not kind:
            raise self.fault(f"{key} is {found!r:.60}, and should be of type {kind.__name__}")
        return found


def read(path: Path) -> GgufFile:
    """The metadata of a file, and where its tensors are.

    Raises:
        LoraMsError: no GGUF, cut short, counts or types that contradict it, or more metadata than any model's.
    """
    gguf = package()
    advice = "is the download complete?"
    with opened(path) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        if stream.read(4) != b"GGUF":
            raise LoraMsError(f"{path}: no GGUF file: it does not begin with the letters GGUF")
        _Layout(path, stream, size).check()
    with readable(path, "GGUF", advice), limited(f"{path}: its metadata", SECONDS, size + MEMORY):
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            raise LoraMsError(f"{path}: truncated: {tensor.name} ends at byte {end:,} and the file at {size:,}")
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


class _Layout:
    """Walks the metadata once: the package's reader takes minutes over counts that a file cannot hold."""

    SIZES: ClassVar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by type's number
    STRING, ARRAY = 8, 9

    def __init__(self, path: Path, stream: IO[bytes], size: int):
        self.path = path
        self.stream = stream
        self.size = size  # bytes of the file

    def check(self) -> None:
        """``stream`` stands behind the letters GGUF.

        Raises:
            LoraMsError: a version that is not read, or something that goes on behind the file's end.
        """
        version = self.number(4)
        if version not in (2, 3):
            raise LoraMsError(f"{self.path}: its version is {version}; 2 and 3 are read")
        tensors, fields = self.number(8), self.number(8)
        for _ in range(fields):
            self.text()
            self.value(self.number(4))
        for _ in range(tensors):
            self.text()
            self.skip(8 * self.number(4))  # its shape
            self.skip(4 + 8)  # its type and place

    def value(self, kind: int) -> None:
        if kind == self.STRING:
            self.text()
        elif kind in self.SIZES:
            self.skip(self.SIZES[kind])
        elif kind == self.ARRAY:
            inner, count = self.number(4), self.number(8)
            if inner in self.SIZES:
                self.skip(count * self.SIZES[inner])
            elif inner == self.STRING:
                for _ in range(count):
                    self.text()
            else:
                raise LoraMsError(
                    f"{self.path}: a list in its metadata has entries of type {inner}, which are not read"
                )
        else:
            raise LoraMsError(f"{self.path}: a value in its metadata is of type {kind}, which GGUF does not have")

    def text(self) -> None:
        self.skip(self.number(8))

    def number(self, width: int) -> int:
        self.skip(width)
        self.stream.seek(-width, os.SEEK_CUR)
        return int.from_bytes(self.stream.read(width), "little")

    def skip(self, length: int) -> None:
        if self.stream.tell() + length > self.size:
            raise LoraMsError(f"{self.path}: it ends before its metadata do, or their counts are wrong")
        self.stream.seek(length, os.SEEK_CUR)


def gguf_names(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """llama.cpp's names of Hugging Face's tensors."""
    gguf = package()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}


def heads_of(name: str, architecture: str, heads: int, kv_heads: int) -> int:
    """Of how many heads the rows of tensor ``name`` are interleaved in llama.cpp; 0 where they are not."""
    if architecture not in INTERLEAVED:
        return 0
    leaf = name.rsplit(".", 2)[-2]
    return {"q_proj": heads, "k_proj": kv_heads}.get(leaf, 0)


def interleaved(rows: Words, heads: int) -> Words:
    """Rows [heads * d, …] in llama.cpp's order."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halved(rows: Words, heads: int) -> Words:
    """The reverse of ``interleaved``."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# --- tensors of a file


def planned_tensor(file: GgufFile, name: str, dtype: str | None, heads: int) -> Planned:
    """A tensor as safetensors will hold it, read as it is written.

    dtype: safetensors' type; None: the tensor's own, ``QUANTISED`` for one of a quantised type.
    heads: see ``heads_of``.

    Raises:
        LoraMsError: a type that the gguf package does not read.
    """
    tensor = file.tensors[name]
    kind = tensor.tensor_type.name
    known = {known.name for known in package().quants._type_traits} | set(FLOATS)
    if kind not in known:
        raise file.fault(f"{name} is of type {kind}, which the gguf package cannot read: take another quantisation")
    target = dtype or FLOATS.get(kind, QUANTISED)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return Planned(target, shape, partial(_blocks, file, tensor, target, heads))


def _blocks(file: GgufFile, tensor: Any, target: str, heads: int) -> Iterator[Words]:
    gguf = package()
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if heads:  # a head at a time would do; a matrix of queries is small enough
        parts: Iterable[slice] = [slice(0, shape[0])]
    else:
        parts = storage.row_blocks(shape)
    with readable(file.path, f"the tensor {tensor.name}"):
        for part in parts:
            values = _floats(gguf, tensor, part)
            values = halved(values, heads) if heads else values
            if not np.isfinite(values).all():
                raise file.fault(f"{tensor.name} holds NaN or infinity")
            words = storage.encoded(values, target)
            if target == "F16" and not np.isfinite(words).all():
                raise file.fault(f"{tensor.name} is out of float16's range: give --dtype bfloat16 or float32")
            yield words


def _floats(gguf: Any, tensor: Any, part: slice) -> NDArray[np.float32]:
    data = tensor.data[part]
    if data.dtype in (np.float32, np.float16, np.float64):
        return data.astype(np.float32)
    return gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type).astype(np.float32, copy=False)


# --- a file of ours


class Output(NamedTuple):
    """A tensor to be written: safetensors' type (F32, F16 or BF16), its shape, and its values, read when written."""

    dtype: str
    shape: tuple[int, ...]
    values: Any  # () -> blocks of rows as they are stored

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * np.dtype(storage.DTYPES[self.dtype]).itemsize


def write(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Output]) -> None:
    """Writes a file, tensor by tensor.

    metadata: key -> text, bool, number or list; numbers are written as uint32 and float32.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _write(writer, gguf, metadata, tensors)
    finally:
        writer.close()


def _write(writer: Any, gguf: Any, metadata: Mapping[str, Any], tensors: Mapping[str, Output]) -> None:
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        stored = np.dtype(storage.DTYPES[tensor.dtype])
        writer.add_tensor_info(name, tensor.shape, stored, tensor.size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(np.concatenate(list(tensor.values())).reshape(tensor.shape))
