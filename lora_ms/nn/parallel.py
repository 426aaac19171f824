"""Tensor parallelism (Shoeybi et al., 2019): how layers are split over ranks, and the sums that join them again.

A weight [out, in] is split by rows (q, k, v, gate, up: each rank has some heads or channels) or by columns (o, down:
each rank takes what its rows of the others made). Of LoRA's factors, B [out, rank] is split where the rows are and
A [rank, in] where the columns are; the other factor is whole on every rank, and its gradient is a part of the sum.
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
# which axes of the weight a parameter of the layer has, and where: {axis of the weight: its own}
AXES = {"weight": {0: 0, 1: 1}, "bias": {0: 0}, "lora_a": {1: 1}, "lora_b": {0: 0}}
PARAMETER = re.compile(r"(?:.*?\.)?(\w+)\.(weight|bias|lora_a|lora_b)(?:\.weight)?", re.IGNORECASE)


def split_axis(name: str) -> int | None:
    """The axis of a parameter that is split, by its dotted path (ours or PEFT's); None where every rank has all."""
    found = PARAMETER.fullmatch(name)
    layer = SPLIT_LAYERS.get(found[1]) if found else None
    return None if found is None or layer is None else AXES[found[2].lower()].get(layer)


@dataclass(frozen=True)
class Shard:
    """This rank's place among the ``count`` ranks that share every layer; ``group``: MindSpore's name for them."""

    index: int = 0
    count: int = 1
    group: str = ""

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on one rank of what is ``shape`` here."""
        axis = split_axis(name)
        return tuple(n * self.count if i == axis else n for i, n in enumerate(shape))

    def place(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where this rank's part lies in the whole, whose shape is ``shape``."""
        axis, index = split_axis(name), self.index
        parts = [(index * (n // self.count), (index + 1) * (n // self.count)) for n in shape]
        return tuple(slice(*part) if i == axis else slice(None) for i, part in enumerate(parts))

    def part(self, name: str, whole: NDArray) -> NDArray:
        """This rank's part of the whole parameter ``name``."""
        return whole[self.place(name, whole.shape)] if self.count > 1 else whole

    def gather(self, parts: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """The whole of every parameter, on every rank; all ranks of the group must call it, with the same names.

        One sum over the ranks of what each knows, zeros elsewhere: the only collective that groups have on the CPU.
        """
        names = [name for name in parts if split_axis(name) is not None] if self.count > 1 else []
        if not names:
            return dict(parts)
        known = []
        for name in names:
            whole = np.zeros(self.whole_shape(name, parts[name].shape), np.float32)
            whole[self.place(name, whole.shape)] = parts[name]
            known.append(whole)
        summed = SumOverRanks(self.group)(Tensor(np.concatenate([whole.ravel() for whole in known]))).asnumpy()
        pieces = np.split(summed, np.cumsum([whole.size for whole in known])[:-1])
        found = {name: piece.reshape(w.shape) for name, piece, w in zip(names, pieces, known, strict=True)}
        return {name: found.get(name, part) for name, part in parts.items()}


WHOLE = Shard()


class SumOverRanks(nn.Cell):
    """Sum of a tensor over the ranks of ``group``, or over all of them, on each."""

    def __init__(self, group: str = ""):
        super().__init__()
        self.all_reduce = ops.AllReduce(group=group) if group else ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)


class Enter(SumOverRanks):
    """Before layers that are split by rows: x as it is; its gradient is the sum of what the ranks found."""

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x, out, dout):
        return (self.all_reduce(dout),)


class Leave(SumOverRanks):
    """After a layer that is split by columns: the sum of what the ranks found; the gradient passes as it is."""

    def bprop(self, x, out, dout):
        return (dout,)


def enter(shard: Shard) -> nn.Cell:
    """``Enter``, or nothing where a rank has all of every layer."""
    return Enter(shard.group) if shard.count > 1 else nn.Identity()


def leave(shard: Shard) -> nn.Cell:
    """``Leave``, or nothing where a rank has all of every layer."""
    return Leave(shard.group) if shard.count > 1 else nn.Identity()
