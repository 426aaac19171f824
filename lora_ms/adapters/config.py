"""What an adapter is, apart from its numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_ms.errors import LoraMsError

INITS = ("gaussian", "orthogonal", "pissa", "olora")  # and pissa_niter_N; True for the default
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a rank: one entry of ``layer_groups``."""

    layers: tuple[int, ...]
    lora_rank: int
    lora_alpha: float
    target_modules: str | tuple[str, ...] | None = None  # None: the adapter's own


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter, and what PEFT and the literature make of it.

    Args:
        lora_rank: rank of the update; at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: in [0, 1), on the adapter's input, in training.
        target_modules: a regular expression (matched from the start of the leaf name or of its MindFormers alias,
            or wholly with the dotted path), a list of path suffixes as in PEFT, or ``"all-linear"``. The head and
            the embedding may be targets.
        exclude_layers: path suffixes or sub-strings of modules to leave out (MindFormers).
        exclude_modules: a regular expression for the whole path, or a list of path suffixes, to leave out (PEFT).
        layers_to_transform: indices of the layers that get adapters; None for all.
        layers_pattern: names of the list of layers that the indices count in, where there are several.
        rank_pattern, alpha_pattern: other ranks and alphas, by a regular expression for the end of the path.
        layer_groups: ranks by ranges of layers, in place of the three above.
        modules_to_save: path suffixes of whole modules to train: norms, embedding, head, dense layers.
        use_rslora: scale by ``lora_alpha / sqrt(rank)``.
        use_dora: train the length of each row of the weight apart from its direction.
        lora_bias: a bias beside each B.
        bias: which biases of the base train: none, all, or lora_only (of the adapted layers).
        init_lora_weights: True (A Kaiming uniform, B zero), gaussian, orthogonal, pissa, pissa_niter_N or olora.

    Raises:
        LoraMsError: a value out of range, or two that exclude each other.
    """

    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "q_proj|k_proj|v_proj|o_proj"
    exclude_layers: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layer_groups: tuple[LayerGroup, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True

    def __post_init__(self):
        groups = [(f"lora_rank of layer_groups {i}", group.lora_rank) for i, group in enumerate(self.layer_groups)]
        for name, value in (("lora_rank", self.lora_rank), *self.rank_pattern.items(), *groups):
            if value < 1:
                raise LoraMsError(f"{name} must be at least 1, got {value}")
        alphas = [(f"lora_alpha of layer_groups {i}", group.lora_alpha) for i, group in enumerate(self.layer_groups)]
        for name, alpha in (("lora_alpha", self.lora_alpha), *self.alpha_pattern.items(), *alphas):
            if alpha <= 0:
                raise LoraMsError(f"{name} must be above 0, got {alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise LoraMsError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        for name in ("exclude_layers", "layers_pattern", "modules_to_save"):  # one name for a list of one
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value or ()))
        layers = self.layers_to_transform
        if layers is not None:
            object.__setattr__(self, "layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers))
        if self.bias not in BIASES:
            raise LoraMsError(f"bias {self.bias!r} is none of {', '.join(BIASES)}")
        self._check_init()
        if self.use_dora and self.lora_bias:
            raise LoraMsError("use_dora and lora_bias exclude each other")
        if self.layer_groups and (self.rank_pattern or self.alpha_pattern or self.layers_to_transform is not None):
            raise LoraMsError("layer_groups stands in place of rank_pattern, alpha_pattern and layers_to_transform")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, bool):
            return
        if init not in INITS and not re.fullmatch(r"pissa_niter_[1-9]\d*", str(init)):
            raise LoraMsError(f"init_lora_weights {init!r} is none of True, {', '.join(INITS)}, pissa_niter_N")
        groups = [group.lora_rank for group in self.layer_groups]
        odd = [rank for rank in groups or [self.lora_rank, *self.rank_pattern.values()] if rank % 2]
        if init == "orthogonal" and odd:
            raise LoraMsError(f"init_lora_weights orthogonal wants even ranks, got {odd[0]}")
        if init not in ("gaussian", "orthogonal") and (self.use_dora or self.lora_bias):
            raise LoraMsError(f"init_lora_weights {init} goes with neither use_dora nor lora_bias")

    def identity(self) -> dict[str, object]:
        """What a resumed run must share besides the adapter's tensors."""
        names = "lora_alpha lora_dropout use_rslora use_dora bias".split()
        start = str(self.init_lora_weights)
        return {name: getattr(self, name) for name in names} | {"init_lora_weights": start}


@dataclass(frozen=True)
class AdaLoraConfig(LoraConfig):
    """An adapter whose rank is shared out by importance while it trains (Zhang et al., 2023).

    ``lora_rank`` is the rank that every module starts with (PEFT's ``init_r``).

    Args:
        target_rank: average rank of a module at the end.
        tinit: optimiser steps before the first module loses rank.
        tfinal: optimiser steps at the end, with ranks fixed.
        delta_t: optimiser steps between two allocations.
        beta1, beta2: smoothing of the importance and of its spread.
        orth_reg_weight: weight in the loss of the distance of A and B from orthogonal rows and columns.
        total_steps: optimiser steps of the run; 0 until a run sets it.
        kept: by path, which of the ranks are left; empty before the first allocation.
    """

    target_rank: int = 8
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_steps: int = 0
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.target_rank <= self.lora_rank:
            raise LoraMsError(f"target_rank must be from 1 to lora_rank {self.lora_rank}, got {self.target_rank}")
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            if getattr(self, name) < 0:
                raise LoraMsError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.delta_t < 1:
            raise LoraMsError(f"delta_t must be at least 1, got {self.delta_t}")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise LoraMsError(f"beta1 and beta2 must be between 0 and 1, got {self.beta1} and {self.beta2}")
        plain = LoraConfig()
        names = "use_rslora use_dora lora_bias init_lora_weights rank_pattern alpha_pattern layer_groups".split()
        given = [name for name in names if getattr(self, name) != getattr(plain, name)]
        if given:
            raise LoraMsError(f"AdaLoRA goes without {', '.join(given)}")
