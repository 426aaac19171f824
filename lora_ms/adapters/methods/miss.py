"""MiSS (Kang and Yin, 2024): the input's numbers are summed in groups of every rank-th one, and one matrix multiplies
the sums.

``y = x W^T + b + s(dropout(x)) D`` with s(x) [rank], s(x)_i = x_i + x_(i + rank) + …, and D [rank, out], from zeros.
``mini`` repeats a D [rank, mini_r] along the outputs. ``bat`` makes each D [rank, rank], one for each group of outputs,
multiply the weight as well: ``W_ij (I + D_i) + D_i`` is added to each block [rank, rank] of the weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lora_ms.adapters.methods.base import (
    Array,
    Cost,
    Shape,
    Target,
    Update,
    option,
    shared_options,
)
from lora_ms.adapters.methods.ranked import RankedConfig, RankSpec
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import Probability, Rank
from lora_ms.storage import Entry
from lora_ms.values import Bounds, Whole, read_with

if TYPE_CHECKING:
    from lora_ms.adapters.methods.base_cells import AdapterCell

TENSOR = "miss_block"  # [rank, out], of mini [rank, mini_r], of bat [out / rank, rank, rank]
INITS = (True, False, "bat", "mini")


def read_init(value: Any) -> bool | str:
    """``init_weights`` in YAML."""
    if value in ("True", "true", "False", "false"):
        return value in ("True", "true")
    if value in INITS and not isinstance(value, int | float) or isinstance(value, bool):
        return value
    raise ValueError("expects True, False, bat or mini")


@dataclass(frozen=True)
class MissConfig(RankedConfig):
    """MiSS, with PEFT's settings.

    Args:
        target_modules, exclude_layers, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in
            ``LoraConfig``, except that the embedding cannot be a target.
        lora_rank: rows of D.
        lora_dropout: in [0, 1), on the adapter's input, in training; not used by bat.
        mini_r: columns of D with ``init_weights="mini"``; must divide each module's number of outputs.
        init_weights: True: D starts as zeros; False: Kaiming uniform; "bat", "mini": these variants of the method.

    Raises:
        LoraMsError: a value out of range.
    """

    NAME: ClassVar[str] = "MiSS"
    PET_TYPE: ClassVar[str] = "miss"
    PEFT_TYPE: ClassVar[str] = "MISS"
    PEFT_REQUIRED: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {"miss_dropout": Probability, "mini_r": Rank, "init_weights": bool | str}
    TENSORS: ClassVar[tuple[str, ...]] = (TENSOR,)
    PARAMETERS: ClassVar[tuple[str, ...]] = (TENSOR,)
    IDLE: ClassVar[Mapping[str, float]] = {TENSOR: 0.0}
    IDLE_CHECK: ClassVar[tuple[str, str]] = ("D not zero", "every miss_block is zero: MiSS changes nothing")
    AGREEING: ClassVar[tuple[str, ...]] = ("mini_r", "init_weights")

    mini_r: int = option(1, Whole, Bounds(ge=1))
    init_weights: bool | str = option(True, read_with(read_init, bool | str))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in INITS:
            raise LoraMsError(f"init_weights {self.init_weights!r} is none of True, False, bat, mini")
        if self.init_weights == "bat" and self.lora_dropout:
            raise LoraMsError("init_weights bat has no dropout: set lora_dropout to 0")

    @property
    def title(self) -> str:
        return f"MiSS ({self.init_weights})" if isinstance(self.init_weights, str) else "MiSS"

    def build(self, target: Target, spec: RankSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import miss_cells

        return miss_cells.build(self, target, spec)

    def block_shape(self, weight: Shape) -> Shape:
        """The shape of D on a weight [out, in]."""
        outputs, rank = weight[0], self.lora_rank
        if self.init_weights == "bat":
            return outputs // rank, rank, rank
        return rank, self.mini_r if self.init_weights == "mini" else outputs

    def misfit(self, weight: Shape) -> str:
        """Why a weight [out, in] cannot have this adapter; "" where it can."""
        outputs, inputs = weight
        if self.lora_rank > inputs:
            return f"lora_rank {self.lora_rank} is more than its {inputs} inputs"
        if self.init_weights == "bat" and (outputs % self.lora_rank or inputs % self.lora_rank):
            return f"bat expects sizes that lora_rank {self.lora_rank} divides, got {outputs} outputs, {inputs} inputs"
        if self.init_weights == "mini" and outputs % self.mini_r:
            return f"mini_r {self.mini_r} does not divide its {outputs} outputs"
        return ""

    # PEFT's files

    def to_peft(self, specs: Mapping[str, RankSpec], targets: Sequence[str]) -> dict[str, Any]:
        return {
            "r": self.lora_rank,
            "miss_dropout": self.lora_dropout,
            "mini_r": self.mini_r,
            "init_weights": self.init_weights or True,  # it only says how D starts, but for the two variants
            "bias": "none",
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "MissConfig":
        cls.check_bias(peft)
        init = peft.get("init_weights")
        return cls(
            lora_rank=peft["r"],
            lora_dropout=peft.get("miss_dropout") or 0.0,
            mini_r=peft.get("mini_r") or 1,
            init_weights=init if isinstance(init, str) else True,
            **shared_options(peft),
        )

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        return {TENSOR: self.block_shape(weight)}

    def update(self, name: str, tensors: Mapping[str, Entry]) -> "MissUpdate":
        return MissUpdate(tensors)

    def rank_of(self, tensors: Mapping[str, Shape]) -> int | None:
        shape = tensors.get(TENSOR, ())
        return None if not shape else shape[-1] if len(shape) == 3 else shape[0]

    def describe(self) -> str:
        return f"{self.title}, rank {self.lora_rank}"

    # training

    def identity(self) -> dict[str, object]:
        return {"init_weights": str(self.init_weights), "lora_dropout": self.lora_dropout}

    def cost(self, spec: RankSpec, inputs: int, outputs: int) -> Cost:
        trained = 1
        for size in self.block_shape((outputs, inputs)):
            trained *= size
        return Cost(trained=trained, kept=spec.lora_rank)


def bat_update(weight: Array, blocks: Array) -> Array:
    """What bat adds to a weight [out, in]: ``W_ij D_i + D_i`` of each block, for D [out / rank, rank, rank]."""
    groups, rank, _ = blocks.shape
    inputs = weight.shape[1]
    parts = weight.reshape(groups, rank, inputs // rank, rank).transpose(2, 0, 1, 3)  # [in / rank, groups, rank, rank]
    return (parts @ blocks + blocks).transpose(1, 2, 0, 3).reshape(-1, inputs)


def spread(block: Array, outputs: int, inputs: int) -> Array:
    """D [rank, out], or of mini [rank, mini_r], as an update of a weight [out, in]."""
    rank, columns = block.shape
    return np.tile(block.T, (outputs // columns, -(-inputs // rank)))[:, :inputs]


class MissUpdate(Update):
    """Adds to each group of the weight's columns, of rank columns, D transposed; or ``bat_update``."""

    by_rows = False  # blocks of rows would have to begin where D does

    def weight(self, weight: Array, rows: slice) -> Array:
        block = self.tensor(TENSOR)
        return weight + (bat_update(weight, block) if block.ndim == 3 else spread(block, *weight.shape))
