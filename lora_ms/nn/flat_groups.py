"""Tensors of like shapes that lie in one vector: taken out to be multiplied together, and put back."""

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops


class FlatGroups(nn.Cell):
    """Groups of tensors in a vector [n], the tensors of a group of one shape.

    Numbers are gathered by their places: a slice for each tensor would be hundreds of operators for a model of 30
    layers, one inside another, and deeper than MindSpore's compiler goes.

    Args:
        groups: of each group, the shape of a tensor, and where in the vector its tensors begin.
        n: length of the vector.

    Attributes:
        shapes: of each group, (tensors, *shape).
    """

    def __init__(self, groups: Sequence[tuple[tuple[int, ...], Sequence[int]]], n: int):
        super().__init__()
        self.shapes = tuple((len(starts), *shape) for shape, starts in groups)
        places = [
            np.concatenate([np.arange(start, start + np.prod(shape), dtype=np.int32) for start in starts])
            for shape, starts in groups
        ]
        back = np.zeros(n, np.int32)  # what is in no tensor is the 0 that ``whole`` puts before the groups
        back[np.concatenate(places)] = np.arange(1, 1 + sum(map(len, places)))
        # parameters and no constants: a compiled graph does not hold their numbers
        self.places = ms.ParameterTuple(
            Parameter(Tensor(array), name=f"places_{i}", requires_grad=False) for i, array in enumerate(places)
        )
        self.back = Parameter(Tensor(back), name="back", requires_grad=False)
        self.zero = Tensor(np.zeros(1, np.float32))

    def tensors(self, flat: Tensor, group: int) -> Tensor:
        """Those of a group, as one of ``shapes[group]``."""
        return ops.gather(flat, self.places[group], 0).reshape(self.shapes[group])

    def whole(self, parts: list[Tensor]) -> Tensor:
        """What ``tensors`` gave of each group, or numbers in its place -> [n]; 0 where no tensor lies."""
        return ops.gather(ops.concat([self.zero, *[part.reshape((-1,)) for part in parts]]), self.back, 0)
