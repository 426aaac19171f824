"""What AdaLoRA (Zhang et al., 2023) adds to a step of the optimiser, on its flat vectors."""

from collections.abc import Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray


class Span(NamedTuple):
    """Where a tensor lies in a flat vector."""

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + int(np.prod(self.shape))

    def of(self, flat: NDArray[np.float32]) -> NDArray[np.float32]:
        return flat[self.start : self.stop].reshape(self.shape)


def joined(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Start and end of the stretches of a vector that ``spans`` cover, in order."""
    stretches: list[tuple[int, int]] = []
    for span in sorted(spans):
        if stretches and stretches[-1][1] == span.start:
            stretches[-1] = (stretches[-1][0], span.stop)
        else:
            stretches.append((span.start, span.stop))
    return stretches


class Orthogonality(nn.Cell):
    """``weight`` times the mean distance, in Frobenius' norm, of every A A^T and B^T B from the identity.

    Parameters [n] -> (penalty [], its gradient [n]). Factors of one shape are multiplied together.

    Args:
        a, b: where the factors [rank, in] and [out, rank] lie in the vector.
        n: length of the vector.
    """

    name = "orthogonality"  # in metrics.jsonl

    def __init__(self, a: Sequence[Span], b: Sequence[Span], n: int, weight: float):
        super().__init__()
        groups: dict[tuple, list[int]] = {}
        for is_a, spans in ((True, a), (False, b)):
            for span in spans:
                groups.setdefault((is_a, span.shape), []).append(span.start)
        self.factor = weight / (len(a) + len(b))
        self.is_a = tuple(is_a for is_a, _ in groups)
        self.shapes = tuple((len(starts), *shape) for (_, shape), starts in groups.items())
        self.ranges = tuple(
            tuple((start, start + shape[0] * shape[1]) for start in starts) for (_, shape), starts in groups.items()
        )
        ranks = [shape[0] if is_a else shape[1] for is_a, shape in groups]
        self.ones = tuple(
            Tensor(np.tile(np.eye(rank, dtype=np.float32), (len(starts), 1, 1)))
            for rank, starts in zip(ranks, groups.values(), strict=True)
        )
        self.pieces = self._pieces(n)
        self.product = ops.BatchMatMul()
        self.product_t = ops.BatchMatMul(transpose_b=True)
        self.t_product = ops.BatchMatMul(transpose_a=True)
        self.sum = ops.ReduceSum(keep_dims=True)

    def _pieces(self, n: int) -> tuple[tuple[int, int, int], ...]:
        """The gradient in order: (group, start, end) in the group's own vector, or (-1, 0, length) of zeros."""
        found = []
        for group, ranges in enumerate(self.ranges):
            size = ranges[0][1] - ranges[0][0]
            found += [(start, group, i * size, (i + 1) * size) for i, (start, _) in enumerate(ranges)]
        pieces, end = [], 0
        for start, group, first, last in sorted(found):
            if start > end:
                pieces.append((-1, 0, start - end))
            pieces.append((group, first, last))
            end = start + last - first
        return (*pieces, (-1, 0, n - end)) if n > end else tuple(pieces)

    def construct(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        total, grads, pieces = Tensor(0.0, ms.float32), [], []
        for i in range(len(self.ranges)):
            x = ops.concat([flat[r[0] : r[1]] for r in self.ranges[i]]).reshape(self.shapes[i])
            off = (self.product_t(x, x) if self.is_a[i] else self.t_product(x, x)) - self.ones[i]  # [m, rank, rank]
            norms = ops.sqrt(self.sum(ops.square(off), (1, 2)))  # [m, 1, 1]
            total = total + norms.sum()
            off = off / ops.maximum(norms, Tensor(1e-12, ms.float32))
            grad = self.product(off, x) if self.is_a[i] else self.product(x, off)
            grads.append((2.0 * self.factor) * grad.reshape((-1,)))
        for piece in self.pieces:
            if piece[0] < 0:
                pieces.append(ops.zeros(piece[2], ms.float32))
            else:
                pieces.append(grads[piece[0]][piece[1] : piece[2]])
        return total * self.factor, ops.concat(pieces)


class Importance(nn.Cell):
    """Smoothed ``|p grad|`` of A, B and E, and the smoothed distance from it; and which triplets are kept.

    Args:
        stretches: the parts of the optimiser's vectors that belong to A, B and E.
        triplets: ranks of all modules together.
        beta1, beta2: smoothing of the importance and of its spread.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]], triplets: int, beta1: float, beta2: float):
        super().__init__()
        self.stretches, self.beta1, self.beta2 = tuple(stretches), beta1, beta2
        n = sum(stop - start for start, stop in stretches)
        self.importance = Parameter(ops.zeros(n, ms.float32), name="importance", requires_grad=False)
        self.spread = Parameter(ops.zeros(n, ms.float32), name="spread", requires_grad=False)
        self.kept = Parameter(ops.ones(triplets, ms.float32), name="kept", requires_grad=False)
        # 1 while importance is measured; 0 from the last cut on, whose own step does not count
        self.measuring = Parameter(Tensor(1.0, ms.float32), name="measuring", requires_grad=False)

    def state(self) -> dict[str, Parameter]:
        """What a checkpoint must hold."""
        return {
            "importance": self.importance,
            "spread": self.spread,
            "kept": self.kept,
            "measuring": self.measuring,
        }

    def pick(self, flat: Tensor) -> Tensor:
        return ops.concat([flat[s[0] : s[1]] for s in self.stretches])

    def construct(self, new: Tensor, grad: Tensor, taken: Tensor) -> Tensor:
        value, weight = ops.abs(self.pick(new) * self.pick(grad)), taken * self.measuring
        importance = self.importance + weight * (1.0 - self.beta1) * (value - self.importance)
        spread = self.spread + weight * (1.0 - self.beta2) * (ops.abs(value - importance) - self.spread)
        ops.assign(self.importance, importance)
        ops.assign(self.spread, spread)
        return weight


class Cut(nn.Cell):
    """Sets E [rank, 1] of each module to zero where ``kept`` [triplets of all modules] is 0."""

    def __init__(self, es: Sequence[Parameter], kept: Parameter):
        super().__init__()
        self.es, self.kept = ms.ParameterTuple(es), kept
        self.shapes = tuple(tuple(e.shape) for e in es)

    def construct(self) -> Tensor:
        start = 0
        for i in range(len(self.shapes)):
            mask = self.kept[start : start + self.shapes[i][0]].reshape(self.shapes[i])
            ops.assign(self.es[i], self.es[i] * mask)
            start += self.shapes[i][0]
        return self.kept.sum()
