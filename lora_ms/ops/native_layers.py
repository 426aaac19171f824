"""Layers of a decoder by the C++ operators of ``ops/csrc``, which Python calls itself, on the memory of tensors.

MindSpore takes some 20 us to begin an operator, as long as a product of one row with a small weight takes, and some 30
ms to compile one: here is one in the place of thirteen for each layer. As an operator of a graph it would still cost
0.6 ms for each parameter, in each graph and each process: a third of a second for 30 layers. A call from here takes a
third of a millisecond, and nothing is compiled.

They compute what the cells of the layers compute, to the bit.
"""

import ctypes
import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor
from numpy.typing import NDArray

POINTER = ctypes.POINTER(ctypes.c_int64)
OUT_OF_MEMORY = 2  # of a call's result; see csrc/operators.cpp


@cache
def _loaded(library: str) -> ctypes.CDLL:
    return ctypes.CDLL(library)


class _Call:
    """The operator ``name`` of the library: inputs …, then parameters, then outputs.

    Tensors are read, and parameters written, where they lie: on the CPU ``data_ptr`` is the address of the numbers.
    """

    def __init__(self, library: str, name: str, parameters: Sequence[Parameter]):
        self.name = name
        self.function = _loaded(library)[name]
        self.parameters = list(parameters)
        self.told: dict[tuple, tuple[Any, ...]] = {}  # by the inputs' shapes: ranks, shapes and types as C takes them

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[NDArray]) -> None:
        """Raises MemoryError, or RuntimeError where the inputs do not fit together."""
        inputs[0].asnumpy()  # waits for the graph whose output it is
        tensors = [*inputs, *self.parameters]
        key = tuple(x.shape for x in (*inputs, *outputs))
        if key not in self.told:
            self.told[key] = _told([(x.shape, str(x.dtype).lower()) for x in (*tensors, *outputs)])
        addresses = [x.data_ptr() for x in tensors] + [x.ctypes.data for x in outputs]
        count = len(addresses)
        status = self.function(count, (ctypes.c_void_p * count)(*addresses), *self.told[key], None, None)
        if status == OUT_OF_MEMORY:
            raise MemoryError(f"{self.name}: out of memory")
        if status:
            raise RuntimeError(f"{self.name}: the operator failed on {key}")


def _told(tensors: Sequence[tuple[tuple[int, ...], str]]) -> tuple[Any, ...]:
    """The ranks, shapes and types of tensors, as C takes them."""
    count = len(tensors)
    ranks = (ctypes.c_int * count)(*(len(shape) for shape, _ in tensors))
    sizes = [(ctypes.c_int64 * len(shape))(*shape) for shape, _ in tensors]
    shapes = (POINTER * count)(*(ctypes.cast(own, POINTER) for own in sizes))
    return ranks, shapes, (ctypes.c_char_p * count)(*(name.encode() for _, name in tensors))


class CachedLayers:
    """Layers on new tokens; see ``Operators.cached_layers``."""

    def __init__(self, library: str, rounding: str, eps: float, parts: Sequence[int], parameters: Sequence[Parameter]):
        self.constants = Tensor(np.array(parts, np.int32)), Tensor(np.array([eps], np.float32))
        self.layers = _Call(library, f"cached_layers{rounding}", parameters)

    def __call__(
        self, x: Tensor, rope: Sequence[Tensor], places: Sequence[Tensor], visible: Sequence[Tensor]
    ) -> Tensor:
        found = np.empty(x.shape, np.float32)
        self.layers((x, *self.constants, rope[2], rope[3], *places, *visible), [found])
        return Tensor.from_numpy(found)


class HeadLogits:
    """The last norm and the head in generation; see ``Operators.head_logits``."""

    def __init__(self, library: str, rounding: str, eps: float, norm: Parameter, head: Parameter):
        self.eps = Tensor(np.array([eps], np.float32))
        self.logits = _Call(library, f"head_logits{rounding}", [norm, head])
        self.vocab_size = head.shape[0]

    def __call__(self, x: Tensor, rows: Tensor) -> NDArray:
        found = np.empty((rows.shape[0], self.vocab_size), np.float32)
        self.logits((x, rows, self.eps), [found])
        return found


class TrainedLayers:
    """Layers in training, and their gradient; see ``Operators.trained_layers``.

    What ``keeping`` keeps for ``backward``, which must follow it, is in memory of its own, beside MindSpore's; all
    share it, and it stays for the next call.
    """

    NUMBERS = itertools.count()

    def __init__(
        self,
        library: str,
        rounding: str,
        eps: float,
        parts: Sequence[int],
        parameters: Sequence[Parameter],
        rates: Sequence[float],
        wanted: tuple[int, bool],
        factors: int,
    ):
        self.constants = Tensor(np.array(parts, np.int32)), Tensor(np.array([eps], np.float32))
        self.rates = Tensor(np.array([[rate, 1 / (1 - rate)] for rate in rates], np.float32))
        self.wanted = Tensor(np.array(wanted, np.int32))
        self.number = Tensor(np.array([next(self.NUMBERS)], np.int32))  # who has kept something
        self.factors = factors
        self.forward = _Call(library, f"layers{rounding}", parameters)
        self.keep = _Call(library, f"kept_layers{rounding}", parameters)
        self.gradients = _Call(library, f"layers_gradient{rounding}", parameters)

    def __call__(self, x: Tensor, rope: Sequence[Tensor], draws: Tensor, visible: Sequence[Tensor]) -> Tensor:
        return self._forward(self.forward, x, rope, draws, visible)

    def keeping(self, x: Tensor, rope: Sequence[Tensor], draws: Tensor, visible: Sequence[Tensor]) -> Tensor:
        return self._forward(self.keep, x, rope, draws, visible)

    def _forward(
        self, call: _Call, x: Tensor, rope: Sequence[Tensor], draws: Tensor, visible: Sequence[Tensor]
    ) -> Tensor:
        found = np.empty(x.shape, np.float32)
        call((*self._first(x, rope, draws), *visible), [found])
        return Tensor.from_numpy(found)

    def backward(
        self, x: Tensor, grad: Tensor, rope: Sequence[Tensor], draws: Tensor, visible: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        grad.asnumpy()  # waits for the graph whose output it is
        d_x, d_factors = np.empty(x.shape, np.float32), np.empty(self.factors, np.float32)
        self.gradients((*self._first(x, rope, draws), grad, self.wanted, *visible), [d_x, d_factors])
        return Tensor.from_numpy(d_x), Tensor.from_numpy(d_factors)

    def _first(self, x: Tensor, rope: Sequence[Tensor], draws: Tensor) -> tuple[Tensor, ...]:
        return (x, *self.constants, rope[2], rope[3], draws, self.rates, self.number)
