"""The weights of a model's folder on their way into memory: where they lie there, and reading them before they are
asked for."""

import math
import threading
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lora_ms import storage
from lora_ms.storage import Entry

BLOCK = 32 << 20  # bytes
LARGE = 4 << 20  # bytes: for an array of as many NumPy asks Linux for pages of 2 MB
LINE = 64  # bytes: every weight begins where a line of the processor's cache does


class WeightMemory:
    """Arrays of which small matrices lie side by side in blocks.

    NumPy asks Linux for pages of 2 MB in arrays of 4 MB and more; the matrices of a small model are smaller, and come
    in pages of 4 KB. In a block they are read faster: SmolLM2-135M's token takes 20.4 ms in the place of 24.0 (two
    cores, AVX-512). What is not used of a block is not taken from the system, and a block is given back with the last
    matrix in it. Vectors, which stay where matrices are replaced, as by merging, and large arrays have their own.
    """

    def __init__(self) -> None:
        self.block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.used = 0  # bytes of it
        self.lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """An array that is to be filled."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(shape) < 2 or size >= LARGE:
            return _aligned(size).view(dtype).reshape(shape)
        with self.lock:
            if self.used + size > self.block.size:
                self.block, self.used = _aligned(BLOCK), 0
            begin = self.used
            self.used += -(-size // LINE) * LINE
            return self.block[begin : begin + size].view(dtype).reshape(shape)

    def copy(self, values: NDArray, dtype: DTypeLike) -> NDArray:
        """The numbers ``values`` as ``dtype``."""
        found = self.take(values.shape, dtype)
        found[...] = values
        return found


def _aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes, the first at the beginning of a line."""
    memory = np.empty(size + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + size]


class WeightsAhead:
    """Tensors that a thread reads as ``dtype``, one after another, until each is asked for.

    A thread that a process need not wait for: where the run ends with an error, nobody waits for the rest.
    """

    def __init__(self, entries: Iterable[Entry], dtype: DTypeLike):
        self.dtype = np.dtype(dtype)
        memory = WeightMemory()
        self.waiting = {entry: memory.take(entry.shape, dtype) for entry in entries}
        self.begun: dict[Entry, Future[NDArray]] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self._read_all, daemon=True).start()

    def _read_all(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    return
                entry = next(iter(self.waiting))
                out, future = self.waiting.pop(entry), Future[NDArray]()
                self.begun[entry] = future
            try:
                future.set_result(storage.fill(out, entry))
            except Exception as error:
                future.set_exception(error)

    def take(self, entry: Entry) -> NDArray | None:
        """The tensor, which is forgotten here; None where it is not among them."""
        with self.lock:
            out, future = self.waiting.pop(entry, None), self.begun.pop(entry, None)
        if future is not None:
            return future.result()
        return None if out is None else storage.fill(out, entry)

    def stop(self) -> None:
        """Nothing more is read."""
        with self.lock:
            self.waiting.clear()

    @property
    def size(self) -> int:
        """Bytes of what has been read, or is being read, and was not asked for."""
        with self.lock:
            return sum(math.prod(entry.shape) for entry in self.begun) * self.dtype.itemsize


_ahead: WeightsAhead | None = None


def read_ahead(entries: Iterable[Entry], dtype: DTypeLike) -> None:
    """Begins to read tensors that ``read`` will be asked for, as ``dtype``."""
    global _ahead
    _ahead = WeightsAhead(entries, dtype)


def read(entry: Entry, dtype: DTypeLike, memory: WeightMemory) -> NDArray:
    """The tensor as ``dtype``: what was read ahead of it, or in ``memory``."""
    found = _ahead.take(entry) if _ahead is not None and _ahead.dtype == dtype else None
    return storage.fill(memory.take(entry.shape, dtype), entry) if found is None else found


def forget_ahead() -> None:
    """Gives back what was read and nobody asked for, and reads no more."""
    global _ahead
    if _ahead is not None:
        _ahead.stop()
    _ahead = None


def size_ahead() -> int:
    """Bytes of memory that weights have which no model has yet."""
    return 0 if _ahead is None else _ahead.size
