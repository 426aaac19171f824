"""VeRA (Kopiczko et al., 2024): one random pair of projections for all modules, and two trained vectors for each.

``y = x W^T + b + lambda_b * (lambda_d * dropout(x) A^T) B^T`` with A [rank, in] and B [out, rank], frozen: the first
columns of a common A and the first rows of a common B, which have the size of the largest adapted module. lambda_d
[rank] starts as ``d_initial``, lambda_b [out] as zeros.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
from lora_ms.folder_schema import Factor, Probability
from lora_ms.storage import Entry
from lora_ms.values import Bounds, Flag, Number, Whole

if TYPE_CHECKING:
    from lora_ms.adapters.methods.base_cells import AdapterCell

TRAINED = ("vera_lambda_b", "vera_lambda_d")
PROJECTIONS = ("vera_A", "vera_B")


@lru_cache(maxsize=2)
def projections(key: int, rank: int, outputs: int, inputs: int) -> tuple[Array, Array]:
    """A [rank, inputs] and B [outputs, rank] as PEFT draws them: Kaiming uniform, by torch's Mersenne twister.

    Equal to torch's to the last bit or the one beside it.
    """
    bits = np.random.RandomState(key % 2**32)._bit_generator  # numpy seeds it as torch does

    def uniform(rows: int, columns: int) -> Array:
        bound = np.float32(math.sqrt(3) * math.sqrt(2) / math.sqrt(columns))
        drawn = (bits.random_raw(rows * columns) & 0xFFFFFF) * 2.0**-24  # torch's float32 has 24 bits of 32
        numbers = (drawn * float(bound + bound) - float(bound)).astype(np.float32).reshape(rows, columns)
        numbers.flags.writeable = False
        return numbers

    return uniform(rank, inputs), uniform(outputs, rank)


@dataclass(frozen=True)
class VeraConfig(RankedConfig):
    """VeRA, with PEFT's settings.

    Args:
        target_modules, exclude_layers, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in
            ``LoraConfig``, except that the embedding cannot be a target.
        lora_rank: rank of the shared projections; higher than LoRA's, as each costs only one trained number a module.
        lora_dropout: in [0, 1), on the adapter's input, in training.
        projection_prng_key: seed of the projections; PEFT draws the same numbers from it.
        save_projection: whether the file holds the projections; if not, they are drawn again on loading.
        d_initial: initial value of every lambda_d.

    Raises:
        LoraMsError: a value out of range.
    """

    NAME: ClassVar[str] = "VeRA"
    PET_TYPE: ClassVar[str] = "vera"
    PEFT_TYPE: ClassVar[str] = "VERA"
    PEFT_REQUIRED: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    PEFT_PLACING: ClassVar[tuple[str, ...]] = ("target_modules", "modules_to_save")
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {
        "projection_prng_key": int,
        "save_projection": bool,
        "vera_dropout": Probability,
        "d_initial": Factor,
    }
    TENSORS: ClassVar[tuple[str, ...]] = (*TRAINED, *PROJECTIONS)
    SHARED_TENSORS: ClassVar[tuple[str, ...]] = PROJECTIONS
    ROW_TENSORS: ClassVar[tuple[str, ...]] = ("vera_lambda_b",)
    PARAMETERS: ClassVar[tuple[str, ...]] = TRAINED
    IDLE: ClassVar[Mapping[str, float]] = {"vera_lambda_b": 0.0}
    IDLE_CHECK: ClassVar[tuple[str, str]] = ("b not zero", "every lambda_b is zero: VeRA changes nothing")
    AGREEING: ClassVar[tuple[str, ...]] = ("projection_prng_key",)

    lora_rank: int = option(256, Whole, Bounds(ge=1))
    projection_prng_key: int = option(0, Whole, Bounds(ge=0))
    save_projection: bool = option(True, Flag)
    d_initial: float = option(0.1, Number)
    sizes: Shape = field(default=(0, 0), kw_only=True)  # outputs and inputs of the largest module; see ``fitted``

    @property
    def title(self) -> str:
        return "VeRA"

    def fitted(self, shapes: Mapping[str, Shape]) -> "VeraConfig":
        found = [shape for name, shape in shapes.items() if self.choose(name) is not None]
        return replace(self, sizes=tuple(map(max, zip(*found, strict=True)))) if found else self

    def projections(self) -> tuple[Array, Array]:
        """The whole A and B; of ``fitted`` settings."""
        return projections(self.projection_prng_key, self.lora_rank, *self.sizes)

    def build(self, target: Target, spec: RankSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import vera_cells

        return vera_cells.build(self, target, spec)

    # PEFT's files

    def to_peft(self, specs: Mapping[str, RankSpec], targets: Sequence[str]) -> dict[str, Any]:
        return {
            "r": self.lora_rank,
            "vera_dropout": self.lora_dropout,
            "projection_prng_key": self.projection_prng_key,
            "save_projection": self.save_projection,
            "d_initial": self.d_initial,
            "bias": "none",
            "init_weights": True,
            "fan_in_fan_out": False,
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "VeraConfig":
        cls.check_bias(peft)
        saved = peft.get("save_projection")
        return cls(
            lora_rank=peft["r"],
            lora_dropout=peft.get("vera_dropout") or 0.0,
            projection_prng_key=peft.get("projection_prng_key") or 0,
            save_projection=saved is None or saved,
            d_initial=0.1 if peft.get("d_initial") is None else peft["d_initial"],
            **shared_options(peft),
        )

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        wanted: dict[str, Shape] = {"vera_lambda_b": (weight[0],), "vera_lambda_d": (self.lora_rank,)}
        if self.save_projection or "vera_A" in found:
            wanted |= {"vera_A": (self.lora_rank, self.sizes[1]), "vera_B": (self.sizes[0], self.lora_rank)}
        return wanted

    def update(self, name: str, tensors: Mapping[str, Entry]) -> "VeraUpdate":
        return VeraUpdate(tensors, self)

    def rank_of(self, tensors: Mapping[str, Shape]) -> int | None:
        return tensors["vera_lambda_d"][0] if "vera_lambda_d" in tensors else None

    def describe(self) -> str:
        where = "in the file" if self.save_projection else f"drawn with key {self.projection_prng_key}"
        return f"{self.title}, rank {self.lora_rank}, projections {where}"

    # training

    def identity(self) -> dict[str, object]:
        return {"projection_prng_key": self.projection_prng_key, "lora_dropout": self.lora_dropout}

    def cost(self, spec: RankSpec, inputs: int, outputs: int) -> Cost:
        """The gradients of the two vectors need what each multiplies."""
        return Cost(trained=spec.lora_rank + outputs, kept=spec.lora_rank + outputs)


class VeraUpdate(Update):
    """``W + (lambda_b B) (lambda_d A)``."""

    def __init__(self, tensors: Mapping[str, Entry], config: VeraConfig):
        super().__init__(tensors)
        self.config = config

    def weight(self, weight: Array, rows: slice) -> Array:
        stored = "vera_A" in self.tensors
        a, b = (self.tensor("vera_A"), self.tensor("vera_B")) if stored else self.config.projections()
        scaled = self.tensor("vera_lambda_b")[rows, None] * b[rows]
        return weight + scaled @ (self.tensor("vera_lambda_d")[:, None] * a[:, : weight.shape[1]])
