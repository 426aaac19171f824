"""MindFormers' checkpoint files: ``.safetensors`` read and written in pieces, ``.ckpt`` whole in memory."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.bridge.layout import Order
from lora_ms.errors import LoraMsError
from lora_ms.reading import readable, refuse_pickle
from lora_ms.storage import Planned

NAME_MAP = "param_name_map.json"  # MindSpore's index of a folder of safetensors files
TYPES = {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}
IN_MEMORY = {ms.float32: "F32", ms.float16: "F16", ms.bfloat16: "BF16"}
SUFFIXES = (".ckpt", ".safetensors")


class Stored(NamedTuple):
    """A tensor as it is stored: the name of its type in safetensors, and its words, on disk until they are read."""

    dtype: str
    words: NDArray


def of_entry(entry: storage.Entry) -> Stored:
    """The tensor of a safetensors file, mapped."""
    if entry.dtype not in storage.DTYPES:
        raise LoraMsError(f"{entry.file}: type {entry.dtype} is not supported")
    kind = np.dtype(storage.DTYPES[entry.dtype])
    if entry.start == entry.end:
        return Stored(entry.dtype, np.empty(entry.shape, kind))
    return Stored(entry.dtype, np.memmap(entry.file, kind, "r", entry.start, entry.shape))


def decoded(dtype: str, words: NDArray) -> NDArray:
    """Numbers of stored words."""
    return (words.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else words


def read_file(path: Path) -> dict[str, Stored]:
    """All tensors of a ``.ckpt`` or ``.safetensors`` file, or of a folder of the latter.

    Raises:
        LoraMsError: nothing there, or nothing readable.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise LoraMsError(f"{path}: holds no .safetensors file")
        return {name: tensor for file in files for name, tensor in read_file(file).items()}
    if path.suffix == ".safetensors":
        return {name: of_entry(entry) for name, entry in storage.read_header(path).items()}
    if not path.is_file():
        raise LoraMsError(f"{path}: no such file; give a .ckpt or .safetensors file, or a folder")
    refuse_pickle(path)
    with readable(path, "a checkpoint"):
        loaded = ms.load_checkpoint(str(path))
    return {name: _of_tensor(value) for name, value in loaded.items() if value.dtype in IN_MEMORY}


def _of_tensor(value: Tensor) -> Stored:
    dtype = IN_MEMORY[value.dtype]
    return Stored(
        dtype, storage.encoded(value.astype(ms.float32).asnumpy(), "BF16") if dtype == "BF16" else value.asnumpy()
    )


def planned(sources: list[Stored], dtype: str | None = None, order: Order | None = None) -> Planned:
    """A tensor to write: the rows of ``sources``, one below the other, in ``order`` (None: as they stand).

    dtype: safetensors' name of the type; None for the sources' own.
    """
    first = sources[0]
    rows = sum(len(s.words) for s in sources) if first.words.ndim else 0
    order = np.arange(rows) if order is None else order
    target = dtype or first.dtype
    shape = (len(order), *first.words.shape[1:]) if first.words.ndim else ()
    return Planned(target, shape, partial(_blocks, sources, target, order))


def _blocks(sources: list[Stored], target: str, order: Order) -> Iterator[NDArray]:
    first = sources[0]
    if not first.words.ndim:
        yield storage.encoded(decoded(first.dtype, np.asarray(first.words)), target)
        return
    for rows in storage.row_blocks((len(order), *first.words.shape[1:])):
        wanted, start = order[rows], 0
        block = np.empty((len(wanted), *first.words.shape[1:]), first.words.dtype)
        for source in sources:
            here = (wanted >= start) & (wanted < start + len(source.words))
            block[here] = source.words[wanted[here] - start]
            start += len(source.words)
        yield block if first.dtype == target else storage.encoded(decoded(first.dtype, block), target)


def in_memory(tensor: Planned) -> NDArray:
    """The words of a planned tensor."""
    return np.concatenate([np.asarray(block).reshape(-1) for block in tensor.blocks()]).reshape(tensor.shape)


def write_file(path: Path, tensors: Mapping[str, Planned]) -> None:
    """One ``.safetensors`` or ``.ckpt`` file, atomically."""
    if path.suffix == ".safetensors":
        with saving.new_file(path) as part:
            storage.write_blocks(part, tensors)
        return
    with saving.new_file(path) as part:
        values = [{"name": name, "data": _tensor(tensor)} for name, tensor in tensors.items()]
        try:
            ms.save_checkpoint(values, str(part), format="ckpt")
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from None


def _tensor(tensor: Planned) -> Tensor:
    words = in_memory(tensor)
    return Tensor(decoded(tensor.dtype, words), TYPES[tensor.dtype])
