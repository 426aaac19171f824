"""The cells of ``parameter_terms``: each takes all trained parameters as one vector (see ``train.objectives``)."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn.flat_groups import FlatGroups
from lora_ms.objectives.base import Start

Array = NDArray[np.float32]


class PullToStart(nn.Cell):
    """``factor Σ importance (w - start)²``: parameters [n] -> (value [], gradient [n]).

    Args:
        params: with the values that they start from.
        importance: of each parameter, in its shape, or None for 0; None for 1 everywhere.
    """

    def __init__(
        self, name: str, params: Sequence[Parameter], factor: float, importance: Sequence[Array | None] | None = None
    ):
        super().__init__()
        self.name = name
        start = np.concatenate([p.asnumpy().ravel() for p in params]).astype(np.float32)
        weights = np.full(1, factor, np.float32)
        if importance is not None:
            pieces = [np.zeros(p.size) if f is None else f.ravel() for p, f in zip(params, importance, strict=True)]
            weights = (np.concatenate(pieces) * factor).astype(np.float32)
        # parameters and no constants: a compiled graph does not hold their numbers
        self.start = Parameter(Tensor(start), name=f"{name}_start", requires_grad=False)
        self.slope = Parameter(Tensor(2.0 * weights), name=f"{name}_slope", requires_grad=False)
        self.dot = ops.MatMul()

    def construct(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        # four passes over the numbers: every one counts beside a short step
        distance = flat - self.start
        gradient = distance * self.slope
        value = self.dot(gradient.reshape((1, -1)), distance.reshape((-1, 1)))
        return 0.5 * value.reshape(()), gradient


class Meeting(NamedTuple):
    """A factor A [rank, in] that trains: where it lies in the vector, and the earlier ones of its module [m, in]."""

    start: int
    rank: int
    earlier: Array


class Overlap(nn.Cell):
    """``weight Σ (A earlier^T)²`` over modules: parameters [n] -> (value [], gradient [n]).

    Modules of one shape are multiplied together.

    Args:
        n: length of the vector.
    """

    name = "orthogonal"

    def __init__(self, meetings: Sequence[Meeting], n: int, weight: float):
        super().__init__()
        groups: dict[tuple[int, ...], list[Meeting]] = {}
        for meeting in meetings:
            groups.setdefault((meeting.rank, *meeting.earlier.shape), []).append(meeting)
        self.weight = weight
        shapes = [((rank, width), [m.start for m in members]) for (rank, _, width), members in groups.items()]
        self.groups = FlatGroups(shapes, n)
        # parameters and no constants: a compiled graph does not hold their numbers
        self.earlier = ms.ParameterTuple(
            Parameter(Tensor(np.stack([m.earlier for m in members])), name=f"earlier_{i}", requires_grad=False)
            for i, members in enumerate(groups.values())
        )
        self.product_t = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()

    @classmethod
    def of(cls, start: Start, earlier: Sequence[Mapping[str, Array]], weight: float) -> "Overlap | None":
        """The term for modules that train an A and have one of its width in ``earlier``; None if there are none."""
        begins = [0, *accumulate(p.size for p in start.params)]
        meetings = []
        for name, param, begin in zip(start.names, start.params, begins, strict=False):
            module, _, leaf = name.rpartition(".")
            if leaf == "lora_a":
                found = [a[module] for a in earlier if module in a and a[module].shape[1] == param.shape[1]]
                if found:
                    meetings.append(Meeting(begin, param.shape[0], np.concatenate(found)))
        return cls(meetings, begins[-1], weight) if meetings else None

    def construct(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        total = Tensor(0.0, ms.float32)
        gradients = []
        for i in range(len(self.groups.shapes)):
            a = self.groups.tensors(flat, i)
            products = self.product_t(a, self.earlier[i])  # [modules, rank, earlier ranks]
            total = total + ops.square(products).sum()
            gradients.append((2.0 * self.weight) * self.product(products, self.earlier[i]))
        return total * self.weight, self.groups.whole(gradients)
