"""AdaLoRA (Zhang et al., 2023): a rank that is shared out by importance while an adapter trains.

``y = x W^T + b + scaling x (E A)^T B^T`` with a number in E [rank, 1] for each rank, as in a singular value
decomposition. A triplet is one rank of one module: a row of A, a column of B, and their number in E. All modules start
with ``lora_rank``; by a schedule the least important triplets of all are set to zero, until ``target_rank`` is left on
average.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lora_ms.adapters.methods import lowrank
from lora_ms.adapters.methods.base import (
    AdapterConfig,
    Array,
    Cost,
    Key,
    Shape,
    Target,
    Update,
    head_notes,
    keys_of,
    option,
    plain_number,
    shared_options,
)
from lora_ms.adapters.methods.lora import (
    ALPHA_KEYS,
    DENSE_PAIR,
    LORA_KEYS,
    RANK,
    LoraConfig,
    LoraSpec,
    LowRankOptions,
    rank_of_pair,
)
from lora_ms.errors import LoraMsError
from lora_ms.storage import Entry
from lora_ms.values import Bounds, Number, Whole

if TYPE_CHECKING:
    from mindspore import nn

    from lora_ms.adapters.methods.adalora_cells import RankAllocator
    from lora_ms.adapters.methods.base_cells import AdapterCell

Mask = NDArray[np.bool_]
PREFIX = "base_model.model."  # of module paths in older files of PEFT's
SCHEDULE = ("target_rank", "delta_t", "beta1", "beta2", "orth_reg_weight")  # a run that goes on may give them anew
GUARD = 1e-5  # PEFT adds it to the rank that alpha is divided by, against modules without a rank


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaLoraConfig(AdapterConfig, LowRankOptions):
    """An adapter that distributes its rank by importance while it trains (Zhang et al., 2023).

    Args:
        lora_rank: rank that every module starts with (PEFT's ``init_r``).
        lora_alpha, lora_dropout, target_modules, exclude_layers, exclude_modules, layers_to_transform, layers_pattern,
            modules_to_save, bias: as in ``LoraConfig``.
        target_rank: average rank per module at the end.
        tinit: optimiser steps before any module loses rank; None: a tenth of the run.
        tfinal: optimiser steps at the end with fixed ranks; None: three tenths of the run.
        delta_t: optimiser steps between two allocations of rank.
        beta1, beta2: smoothing of the importance and of its uncertainty.
        orth_reg_weight: weight of the loss term that keeps A's rows and B's columns orthogonal.
        total_steps: optimiser steps of the run; 0 until the run sets it.
        kept: by path, which ranks are left; empty before the first allocation.
    """

    PET_TYPE: ClassVar[str] = "adalora"
    PEFT_TYPE: ClassVar[str] = "ADALORA"
    PEFT_REQUIRED: ClassVar[tuple[str, ...]] = ("init_r", "lora_alpha", "target_modules")
    TENSORS: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")
    ROW_TENSORS: ClassVar[tuple[str, ...]] = ("lora_B", "base_layer.bias")
    PARAMETERS: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b", "lora_e")
    IDLE: ClassVar[Mapping[str, float]] = {"lora_B": 0.0, "lora_E": 0.0}
    IDLE_CHECK: ClassVar[tuple[str, str]] = ("B not zero", "every B is zero: AdaLoRA changes nothing")
    YAML_KEYS: ClassVar[Mapping[str, Key]] = {"init_rank": Key(Whole, None, RANK)}  # lora_rank under its other name
    AGREEING: ClassVar[tuple[str, ...]] = ("bias",)
    SPEC_KEYS: ClassVar[Mapping[str, frozenset[str]]] = {"lora_rank": LORA_KEYS, "lora_alpha": ALPHA_KEYS}

    target_rank: int = option(8, Whole, RANK, yaml_default=None)  # in YAML: half of the rank at the start
    tinit: int | None = option(None, Whole, Bounds(ge=0))
    tfinal: int | None = option(None, Whole, Bounds(ge=1))
    delta_t: int = option(1, Whole, Bounds(ge=1))
    beta1: float = option(0.85, Number, Bounds(gt=0, lt=1))
    beta2: float = option(0.85, Number, Bounds(gt=0, lt=1))
    orth_reg_weight: float = option(0.5, Number, Bounds(ge=0))
    total_steps: int = 0
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_bias()
        if self.target_rank > self.lora_rank:
            raise LoraMsError(f"target_rank must be from 1 to lora_rank {self.lora_rank}, got {self.target_rank}")

    @property
    def title(self) -> str:
        return "AdaLoRA"

    @property
    def trains_all_biases(self) -> bool:
        return self.bias == "all"

    @property
    def trains_biases(self) -> bool:
        return self.bias != "none"

    # YAML

    @classmethod
    def check_yaml(cls, keys: Any) -> None:
        default = keys_of(cls)["lora_rank"].default
        if keys.init_rank not in (None, keys.lora_rank) and keys.lora_rank != default:
            raise ValueError(f"init_rank {keys.init_rank} and lora_rank {keys.lora_rank} differ: give one of the two")

    @classmethod
    def from_yaml(cls, keys: Any) -> "AdaLoraConfig":
        values = {name: getattr(keys, name) for name in keys_of(cls)}
        values["lora_rank"] = keys.init_rank or keys.lora_rank
        values["target_rank"] = keys.target_rank or max(1, values["lora_rank"] // 2)
        return cls(**values)

    # which modules, and what each gets

    def spec(self, name: str) -> LoraSpec:
        return LoraSpec(self.lora_rank, self.lora_alpha)

    def notes(self, names: Iterable[str], adapted: Iterable[str]) -> list[str]:
        return head_notes(self.lora_dropout, adapted)

    # cells

    def build(self, target: Target, spec: LoraSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import adalora_cells

        return adalora_cells.build(self, target, spec)

    # PEFT's files

    def to_peft(self, specs: Mapping[str, LoraSpec], targets: Sequence[str]) -> dict[str, Any]:
        """``rank_pattern`` holds, by module, which ranks are left; the tensors in the file have these alone."""
        return {
            "layers_to_transform": None,
            "lora_alpha": plain_number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "bias": self.bias,
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "r": self.lora_rank,
            "init_r": self.lora_rank,
            "target_r": self.target_rank,
            "tinit": self.tinit or 0,
            "tfinal": self.tfinal or 0,
            "deltaT": self.delta_t,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orth_reg_weight,
            "total_step": self.total_steps or None,
            "rank_pattern": {f"{name}.lora_E": list(kept) for name, kept in self.kept.items()} or None,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "AdaLoraConfig":
        kept = {}
        for key, mask in (peft.get("rank_pattern") or {}).items():
            name = key.removeprefix(PREFIX).split(".lora_E")[0]
            kept[name] = tuple(bool(flag) for flag in mask)
        return cls(
            lora_rank=peft["init_r"],
            lora_alpha=peft["lora_alpha"],
            lora_dropout=peft.get("lora_dropout") or 0.0,
            bias=peft.get("bias") or "none",
            target_rank=min(peft.get("target_r", 8), peft["init_r"]),  # PEFT's default stands beside smaller ones
            tinit=peft.get("tinit") or None,
            tfinal=peft.get("tfinal") or None,
            delta_t=peft.get("deltaT") or 1,
            beta1=peft.get("beta1", 0.85),
            beta2=peft.get("beta2", 0.85),
            orth_reg_weight=peft.get("orth_reg_weight", 0.5),
            total_steps=peft.get("total_step") or 0,
            kept=kept,
            **shared_options(peft),
        )

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        rank, kept = self.lora_rank, self.kept.get(name)
        outputs, inputs = weight[0], weight[-1]
        # older files keep all ranks, with zeros in E
        if kept is not None and found.get("lora_E", (0,))[0] == sum(kept):
            rank = sum(kept)
        wanted: dict[str, Shape] = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_E": (rank, 1)}
        if self.bias != "none" and has_bias:
            wanted["base_layer.bias"] = (outputs,)
        return wanted

    def as_lora(
        self, tensors: Mapping[str, Mapping[str, Array]]
    ) -> tuple[LoraConfig, dict[str, LoraSpec], dict[str, dict[str, Array]]]:
        """E goes into A; alpha falls with the rank, so that all modules are scaled alike. A module of which nothing is
        left is left out."""
        specs: dict[str, LoraSpec] = {}
        found: dict[str, dict[str, Array]] = {}
        guard = self.lora_rank / (self.lora_rank + GUARD)  # this scaling has it, LoRA's has not
        for name, stored in tensors.items():
            a = stored["lora_A"] * stored["lora_E"] * np.float32(guard)
            b = stored["lora_B"]
            rest = {tensor: value for tensor, value in stored.items() if tensor not in self.TENSORS}
            if rest and not len(a):  # a trained bias needs an adapter beside it
                a, b = np.zeros((1, a.shape[1]), np.float32), np.zeros((len(b), 1), np.float32)
            if len(a):
                specs[name] = LoraSpec(len(a), self.lora_alpha * len(a) / self.lora_rank)
                found[name] = {**rest, **dict(zip(DENSE_PAIR, (a, np.ascontiguousarray(b)), strict=True))}
        return LoraConfig(self.target_rank, self.lora_alpha, self.lora_dropout, bias=self.bias), specs, found

    def pack(self, name: str, values: dict[str, Array]) -> dict[str, Array]:
        """The ranks that are left alone."""
        if name not in self.kept:
            return values
        kept = np.array(self.kept[name])
        ranks = {"lora_A": (kept,), "lora_E": (kept,), "lora_B": (slice(None), kept)}
        return {tensor: value[ranks[tensor]] if tensor in ranks else value for tensor, value in values.items()}

    def unpack(self, name: str, values: dict[str, Array]) -> dict[str, Array]:
        """Ranks that were dropped come back as zeros."""
        if name not in self.kept:
            return values
        kept, full = np.array(self.kept[name]), {}
        for tensor, value in values.items():
            axis = {"lora_A": 0, "lora_E": 0, "lora_B": 1}.get(tensor)
            if axis is not None and value.shape[axis] == kept.sum():
                shape = tuple(len(kept) if i == axis else n for i, n in enumerate(value.shape))
                wide = np.zeros(shape, np.float32)
                wide[(slice(None),) * axis + (kept,)] = value
                value = wide
            full[tensor] = value
        return full

    def update(self, name: str, tensors: Mapping[str, Entry]) -> Update:
        return AdaLoraUpdate(tensors, self.lora_alpha / (self.lora_rank + GUARD))

    def rank_of(self, tensors: Mapping[str, Shape]) -> int | None:
        if "lora_A" not in tensors or "lora_B" not in tensors:
            return None
        return rank_of_pair(tensors["lora_A"], tensors["lora_B"])

    def ranks(self, name: str) -> tuple[int, ...]:
        return (self.lora_rank, sum(self.kept[name])) if name in self.kept else (self.lora_rank,)

    def describe(self) -> str:
        scaling = lowrank.scaling_of(self.lora_rank, self.lora_alpha)
        return f"AdaLoRA, rank {self.lora_rank}, alpha {self.lora_alpha:g}, scaling {scaling:g}"

    def not_a_pair(self) -> list[str]:
        found = {
            f"bias: {self.bias}": self.bias != "none",
            f"modules_to_save: {', '.join(self.modules_to_save)}": self.modules_to_save,
        }
        return ["AdaLoRA", *(name for name, present in found.items() if present)]

    # training

    def continued(self, keys: Any, given: Collection[str]) -> "AdaLoraConfig":
        """With the schedule of this run, where ranks were not shared out before.

        Raises:
            LoraMsError: they were, and a key of the schedule is another.
        """
        dropout = keys.lora_dropout if "lora_dropout" in given else self.lora_dropout
        asked = {name: getattr(keys, name) for name in SCHEDULE if name in given}
        asked = {name: value for name, value in asked.items() if value is not None}
        if not self.kept:
            return replace(self, lora_dropout=dropout, tinit=keys.tinit, tfinal=keys.tfinal, **asked)
        odd = [name for name, value in asked.items() if value != getattr(self, name)]
        if odd:
            faults = (f"{name}: {asked[name]} in pet_config, {getattr(self, name)} in the adapter" for name in odd)
            raise LoraMsError(f"{'; '.join(faults)}, whose ranks are shared out")
        return replace(self, lora_dropout=dropout)

    def for_run(self, total_steps: int) -> "AdaLoraConfig":
        """A tenth of the run before ranks fall and three tenths after, unless given; ranks that were shared out before
        stay as they are.

        Raises:
            LoraMsError: the run has no step in which ranks could fall.
        """
        if self.kept:
            return self
        first = total_steps // 10 if self.tinit is None else self.tinit
        last = max(1, round(0.3 * total_steps)) if self.tfinal is None else self.tfinal
        if first + last >= total_steps:
            raise LoraMsError(f"tinit {first} and tfinal {last} leave no step of {total_steps} for ranks to fall in")
        return replace(self, total_steps=total_steps, tinit=first, tfinal=last)

    def step_hook(self, model: "nn.Cell") -> "RankAllocator":
        from lora_ms.adapters.methods import adalora_cells

        return adalora_cells.RankAllocator(model, self)

    def identity(self) -> dict[str, object]:
        names = "lora_alpha lora_dropout bias target_rank tinit tfinal delta_t beta1 beta2 orth_reg_weight total_steps"
        return {name: getattr(self, name) for name in names.split()}

    def not_split(self, training: bool) -> list[str]:
        given = ["bias"] if self.bias != "none" else []
        return [f"pet_type {self.PET_TYPE}", *given, *(["modules_to_save"] if self.modules_to_save else [])]

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    def cost(self, spec: LoraSpec, inputs: int, outputs: int) -> Cost:
        return Cost(trained=spec.lora_rank * (inputs + outputs + 1), kept=spec.lora_rank)

    # the schedule

    @property
    def last_cut(self) -> int:
        """The step (from 0) after which ranks are fixed."""
        return self.total_steps - max(self.tfinal or 0, 1)

    def budget(self, modules: int, step: int) -> int:
        """Triplets that are left after optimiser step ``step`` (from 0): falls from all to the target, as a cube."""
        start, target, tinit = modules * self.lora_rank, modules * self.target_rank, self.tinit or 0
        if step <= tinit:
            return start
        if step >= self.last_cut:
            return target
        left = 1 - (step - tinit) / (self.last_cut - tinit)
        return int((start - target) * left**3 + target)

    def is_cut(self, step: int) -> bool:
        """Whether ranks are shared out anew after step ``step``; in the last of these steps always."""
        return step == self.last_cut or ((self.tinit or 0) < step < self.last_cut and step % self.delta_t == 0)


class AdaLoraUpdate(Update):
    """``W + scaling B (E A)``."""

    def __init__(self, tensors: Mapping[str, Entry], scaling: float):
        super().__init__(tensors)
        self.scaling = scaling

    def weight(self, weight: Array, rows: slice) -> Array:
        a = self.tensor("lora_A") * self.tensor("lora_E")
        return lowrank.merged_weight(weight, a, self.tensor("lora_B")[rows], self.scaling)


def triplet_scores(a: Array, b: Array, e: Array) -> Array:
    """Scores [rank] of triplets from those of the numbers in A [rank, in], B [out, rank] and E [rank, 1]."""
    return e[:, 0] + (a.mean(1) + b.mean(0))


def best(scores: Array, number: int) -> Mask:
    """Which of ``scores`` are the ``number`` highest; of equal ones the first."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:number]] = True
    return kept
