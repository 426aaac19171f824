"""Where the weights of a model lie."""

import math

import numpy as np
from mindspore import Parameter, Tensor
from numpy.typing import DTypeLike, NDArray

BLOCK = 64 << 20  # bytes
LINE = 64  # bytes: every weight begins where a line of the processor's cache does


class WeightMemory:
    """Weights side by side in large blocks.

    NumPy asks Linux for pages of 2 MB in arrays of 4 MB and more; the matrices of a small model are smaller, and come
    in pages of 4 KB. In a block they are read faster, and there sooner: SmolLM2-135M's token takes 20.4 ms in the place
    of 24.0 (two cores, AVX-512). What is not used of a block is not taken from the system, and a block is given back
    with the last weight in it.
    """

    def __init__(self) -> None:
        self.block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.used = 0  # bytes of it

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """An array that is to be filled."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self.used + size > self.block.size:
            self.block, self.used = np.empty(max(BLOCK, size + LINE), np.uint8), 0
            self.used = -self.block.ctypes.data % LINE
        begin = self.used
        self.used += -(-size // LINE) * LINE
        return self.block[begin : begin + size].view(dtype).reshape(shape)

    def put(self, parameter: Parameter, values: NDArray, dtype: DTypeLike) -> None:
        """Gives a parameter these numbers, as ``dtype``, which is its own."""
        here = self.take(values.shape, dtype)
        here[...] = values
        parameter.set_data(Tensor.from_numpy(here))
