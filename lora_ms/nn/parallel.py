"""Tensor parallelism (Shoeybi et al., 2019): how layers are split over ranks, and the sums over ranks they need.

A weight [out, in] is split by rows (q, k, v, gate, up: each rank has some heads or channels) or by columns (o, down:
each rank multiplies the channels that its own rows of the layers before have made). Of LoRA's factors, B [out, rank]
is split as the rows are and A [rank, in] as the columns are; the other factor is whole on every rank, and each rank
finds a part of its gradient.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

# axis of the weight [out, in] that is split, by the layer's leaf name
SPLIT_LAYERS = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "embed_tokens": 0,
    "lm_head": 0,
}
# for each parameter of a layer, which of its axes an axis of the weight is: {axis of the weight: axis of the parameter}
AXES = {"weight": {0: 0, 1: 1}, "bias": {0: 0}, "lora_a": {1: 1}, "lora_b": {0: 0}}
PARAMETER = re.compile(r"(?:.*?\.)?(\w+)\.(weight|bias|lora_a|lora_b)(?:\.weight)?", re.IGNORECASE)


def split_axis(name: str) -> int | None:
    """The axis of a parameter that is split, by its dotted path (ours or PEFT's); None where every rank has all."""
    found = PARAMETER.fullmatch(name)
    layer = SPLIT_LAYERS.get(found[1]) if found else None
    return None if found is None or layer is None else AXES[found[2].lower()].get(layer)


@dataclass(frozen=True)
class Shard:
    """Which part of every layer this rank has."""

    index: int = 0  # of this rank among those that share the layers
    count: int = 1  # of these ranks
    group: str = ""  # MindSpore's name for them

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole parameter ``name``, of which this rank's part has ``shape``."""
        axis = split_axis(name)
        return tuple(n * self.count if i == axis else n for i, n in enumerate(shape))

    def slices(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where this rank's part lies in the whole parameter ``name``, whose shape is ``shape``."""
        found = [slice(None)] * len(shape)
        axis = split_axis(name)
        if axis is not None:
            size = shape[axis] // self.count
            found[axis] = slice(self.index * size, (self.index + 1) * size)
        return tuple(found)

    def part(self, name: str, whole: NDArray) -> NDArray:
        """This rank's part of the whole parameter ``name``."""
        return whole[self.slices(name, whole.shape)] if self.count > 1 else whole

    def gather(self, parts: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """The whole of every parameter, on every rank; all ranks of the group must call it, with the same names.

        Each rank puts its part into zeros, and these are summed: a sum is the only collective of groups on the CPU.
        """
        names = [name for name in parts if split_axis(name) is not None] if self.count > 1 else []
        if not names:
            return dict(parts)
        padded = []
        for name in names:
            whole = np.zeros(self.whole_shape(name, parts[name].shape), np.float32)
            whole[self.slices(name, whole.shape)] = parts[name]
            padded.append(whole)
        summed = SumOverRanks(self.group)(Tensor(np.concatenate([whole.ravel() for whole in padded]))).asnumpy()
        pieces = np.split(summed, np.cumsum([whole.size for whole in padded])[:-1])
        found = {name: piece.reshape(w.shape) for name, piece, w in zip(names, pieces, padded, strict=True)}
        return {name: found.get(name, part) for name, part in parts.items()}


WHOLE = Shard()


class SumOverRanks(nn.Cell):
    """Sum of a tensor over the ranks of ``group``, or over all of them, on each."""

    def __init__(self, group: str = ""):
        super().__init__()
        self.all_reduce = ops.AllReduce(group=group) if group else ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)


class SumGradient(SumOverRanks):
    """Before layers that are split by rows: x as it is; its gradient is the sum of what the ranks found."""

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x, out, dout):
        return (self.all_reduce(dout),)


class SumOutput(SumOverRanks):
    """After a layer that is split by columns: the sum of what the ranks found; the gradient passes as it is."""

    def bprop(self, x, out, dout):
        return (dout,)


def sum_gradient(shard: Shard) -> nn.Cell:
    """``SumGradient``, or nothing where a rank has all of every layer."""
    return SumGradient(shard.group) if shard.count > 1 else nn.Identity()


def sum_output(shard: Shard) -> nn.Cell:
    """``SumOutput``, or nothing where a rank has all of every layer."""
    return SumOutput(shard.group) if shard.count > 1 else nn.Identity()
