"""LoRA (Hu et al., 2021) with its variants that PEFT counts as LoRA: rsLoRA, DoRA, PiSSA, OLoRA and a bias beside B.

``y = x W^T + b + scaling x A^T B^T`` with A [rank, in] and B [out, rank]; scaling is ``lora_alpha / lora_rank``.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ms.adapters.matching import by_pattern, check_listed, layer_index, matches, ranges
from lora_ms.adapters.methods import embedding, lowrank, starts, trained_tokens
from lora_ms.adapters.methods.base import (
    REQUIRED,
    AdapterConfig,
    AdapterSpec,
    Array,
    Cost,
    Key,
    Pair,
    RowUpdate,
    SeenRows,
    Shape,
    Target,
    Update,
    check_bounds,
    check_number,
    head_notes,
    keys_of,
    missing_layers,
    option,
    plain_number,
    shared_options,
)
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import TokenIndices
from lora_ms.storage import Entry
from lora_ms.values import Bounds, Flag, Layers, Number, Targets, Whole, WholeOrNumber, pattern_of, read_with

if TYPE_CHECKING:
    from mindspore import nn

    from lora_ms.adapters.methods.base_cells import AdapterCell

RANK, ALPHA, DROPOUT = Bounds(ge=1), Bounds(gt=0), Bounds(ge=0, lt=1)
BIASES = ("none", "all", "lora_only")
INITS = (  # and pissa_niter_N; True for the default
    *("gaussian", "orthogonal", "pissa", "olora", "loftq"),
    *("eva", "corda", "lora_ga"),  # from rows: see ``starts``
)
# values of init_lora_weights that leave the weight as it was: the file holds what came of them
FORGOTTEN_INITS = ("eva", "mica", "gaussian", "orthogonal")


def is_init(value: Any) -> bool:
    """Whether ``value`` is a text that init_lora_weights may be."""
    return value in INITS or (isinstance(value, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", value) is not None)


def read_init(value: Any) -> bool | str:
    """``init_lora_weights`` in YAML."""
    if value in ("True", "true"):
        return True
    if value is True or is_init(value):
        return value
    near = difflib.get_close_matches(str(value), INITS, 1)
    raise ValueError(f"expects True, {', '.join(INITS)} or pissa_niter_N{f' ({near[0]}?)' if near else ''}")


class LoraSpec(NamedTuple):
    """LoRA on one module."""

    lora_rank: int
    lora_alpha: float


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a rank: one entry of ``layer_groups``."""

    layers: tuple[int, ...] = option(REQUIRED, Layers)  # indices from 0; in YAML 3, [0, 1, 8], "0-10" or "0-3,8"
    lora_rank: int = option(REQUIRED, Whole, RANK)
    lora_alpha: float = option(REQUIRED, WholeOrNumber, ALPHA, yaml_default=None)  # None: that of the same scaling
    target_modules: str | tuple[str, ...] | None = option(None, Targets)  # None: the adapter's own
    bits: str | None = option(None, Literal["nf4"])  # how these layers' weights are loaded; None: as the others


@dataclass(frozen=True)
class LowRankOptions:
    """What adapters of a low rank share.

    Dataclasses take the fields of their last base first: these three open the constructors of LoRA and AdaLoRA.
    """

    lora_rank: int = option(8, Whole, RANK, yaml_default=16)  # rows of A, columns of B
    lora_alpha: float = option(16.0, WholeOrNumber, ALPHA, yaml_default=16)  # the update is scaled by alpha / rank
    lora_dropout: float = option(0.0, Number, DROPOUT, yaml_default=0.05)  # probability, on the adapter's input
    _: KW_ONLY
    bias: str = option("none", Literal["none", "all", "lora_only"])  # which biases of the base model train

    def check_bias(self) -> None:
        if self.bias not in BIASES:
            raise LoraMsError(f"bias {self.bias!r} is none of {', '.join(BIASES)}")


LORA_KEYS = frozenset(("lora_rank", "init_rank", "rank_pattern", "layer_groups"))
ALPHA_KEYS = frozenset(("lora_alpha", "alpha_pattern", "layer_groups"))


@dataclass(frozen=True, kw_only=True, repr=False)
class LoraConfig(AdapterConfig, LowRankOptions):
    """LoRA with its variants: rsLoRA, DoRA, LoRA-FA, PiSSA, OLoRA, LoftQ, LoRA+.

    Args:
        lora_rank: rank of the update; at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: in [0, 1), on the adapter's input, in training.
        target_modules: a regular expression (matched from the start of the leaf name or of its MindFormers alias,
            or against the whole dotted path), a list of path suffixes as in PEFT, or ``"all-linear"``. The head and
            the embedding may be targets.
        exclude_layers: path suffixes or sub-strings of modules to leave out (MindFormers).
        exclude_modules: a regular expression for the whole path, or a list of path suffixes, to leave out (PEFT).
        layers_to_transform: indices of the layers that get adapters; None for all.
        layers_pattern: name of the list of layers that these indices refer to, for models with several lists.
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions that match the ends of paths.
        layer_groups: ranks and alphas by ranges of layers, in place of layers_to_transform, rank_pattern and
            alpha_pattern; ``bits: nf4`` quantises these layers.
        modules_to_save: path suffixes of whole modules to train: norms, embedding, head, dense layers.
        trainable_token_indices: ids of tokens whose rows of the embedding train, and of a head that is tied to it; or
            a mapping from ``embed_tokens`` and ``lm_head`` to such lists.
        use_rslora: scale by ``lora_alpha / sqrt(rank)``.
        use_lorafa: LoRA-FA (Zhang et al., 2023): A keeps its start, and only B trains; not on the embedding.
        use_dora: train the length of each row of the weight separately from its direction.
        lora_bias: a bias beside each B.
        bias: which of the base model's biases train: none, all, or lora_only (those of the adapted layers).
        init_lora_weights: True (A Kaiming uniform, B zero), gaussian, orthogonal, pissa, pissa_niter_N, olora,
            or loftq: for quantised weights, the leading part of the quantisation error (one step, as in PEFT). From
            rows of the run: eva (Paischer et al., 2024): A from the principal directions of each module's input at
            label tokens; corda (Yang et al., 2024): A and B from the weight, as it acts on these inputs; lora_ga (Wang
            et al., 2024): A and B from the gradient of the weight.
        eva_rho: with eva, a module gets at most this many times ``lora_rank``; ranks go where a direction explains
            most, and their sum stays the same. 1: all modules have ``lora_rank``.
        corda_method: with corda, ipm trains the part of the weight that acts most on the rows, to learn them fast; kpm
            the part that acts least on them, to keep what they stand for.
        begun: whether A and B are found, of a start from rows; a run sets it.

    Raises:
        LoraMsError: a value out of range, or two that exclude each other.
    """

    PET_TYPE: ClassVar[str] = "lora"
    PEFT_TYPE: ClassVar[str] = "LORA"
    PEFT_REQUIRED: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "target_modules")
    TENSORS: ClassVar[tuple[str, ...]] = (
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_magnitude_vector",
        *embedding.TENSORS,
    )
    ROW_TENSORS: ClassVar[tuple[str, ...]] = (
        "lora_B.weight",
        "lora_B.bias",
        "lora_magnitude_vector",
        "base_layer.bias",
    )
    BESIDE_TENSORS: ClassVar[tuple[str, ...]] = (trained_tokens.TENSOR,)
    PARAMETERS: ClassVar[tuple[str, ...]] = (
        *("lora_a", "lora_b", "lora_bias", "lora_magnitude"),
        trained_tokens.PARAMETER,
    )
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {trained_tokens.OPTION: TokenIndices}
    IDLE: ClassVar[Mapping[str, float]] = {"lora_B.weight": 0.0, "lora_embedding_A": 0.0, "lora_embedding_B": 0.0}
    IDLE_CHECK: ClassVar[tuple[str, str]] = ("B not zero", "every B is zero: LoRA changes nothing")
    YAML_KEYS: ClassVar[Mapping[str, Key]] = {
        # LoRA+: learning rate of B over that of A; 1: one rate for both
        "loraplus_lr_ratio": Key(Number, 1.0, Bounds(gt=0)),
        # and the highest rate of an adapter on the embedding then
        "loraplus_lr_embedding": Key(Number, 1e-6, Bounds(gt=0)),
    }
    AGREEING: ClassVar[tuple[str, ...]] = ("use_rslora", "use_dora", "lora_bias", "bias", trained_tokens.OPTION)
    SPEC_KEYS: ClassVar[Mapping[str, frozenset[str]]] = {"lora_rank": LORA_KEYS, "lora_alpha": ALPHA_KEYS}
    PLACING: ClassVar[frozenset[str]] = AdapterConfig.PLACING | {"layer_groups"}
    WITH_MINDFORMERS: ClassVar[bool] = True

    rank_pattern: Mapping[str, int] = option({}, pattern_of(RANK.on(Whole)))
    alpha_pattern: Mapping[str, float] = option({}, pattern_of(ALPHA.on(WholeOrNumber)))
    layer_groups: tuple[LayerGroup, ...] = option((), list[LayerGroup])  # in YAML, an entry is a section
    trainable_token_indices: trained_tokens.TokenIndices = option(
        (), read_with(trained_tokens.read, list[int] | dict[str, list[int]] | None), yaml_default=None
    )
    use_rslora: bool = option(False, Flag)
    use_dora: bool = option(False, Flag)
    use_lorafa: bool = option(False, Flag)
    lora_bias: bool = option(False, Flag)
    init_lora_weights: bool | str = option(True, read_with(read_init, bool | str))
    eva_rho: float = option(1.0, Number, Bounds(ge=1))
    corda_method: str = option("ipm", Literal["ipm", "kpm"])
    begun: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, trained_tokens.OPTION, trained_tokens.checked(self.trainable_token_indices))
        for pattern, rank in self.rank_pattern.items():
            check_number(pattern, rank, RANK)
        for pattern, alpha in self.alpha_pattern.items():
            check_number(pattern, alpha, ALPHA)
        for index, group in enumerate(self.layer_groups):
            check_bounds(group, f" of layer_groups {index}")
            if group.bits not in (None, "nf4"):
                raise LoraMsError(f"bits {group.bits!r} of layer_groups {index}: give nf4, or leave it out")
        self.check_bias()
        self._check_init()
        if self.use_dora and self.lora_bias:
            raise LoraMsError("use_dora and lora_bias exclude each other: leave one of them out")
        if self.layer_groups and (self.rank_pattern or self.alpha_pattern or self.layers_to_transform is not None):
            raise LoraMsError(
                "layer_groups replaces rank_pattern, alpha_pattern and layers_to_transform: leave these out, or it"
            )

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if self.corda_method not in ("ipm", "kpm"):
            raise LoraMsError(f"corda_method {self.corda_method!r} is none of ipm, kpm")
        if isinstance(init, bool):
            return
        if not is_init(init):
            raise LoraMsError(f"init_lora_weights {init!r} is none of True, {', '.join(INITS)}, pissa_niter_N")
        if init == "eva" and (self.layer_groups or self.rank_pattern or self.alpha_pattern):
            raise LoraMsError(
                "init_lora_weights eva finds ranks itself: leave out layer_groups, rank_pattern, alpha_pattern"
            )
        groups = [group.lora_rank for group in self.layer_groups]
        odd = [rank for rank in groups or [self.lora_rank, *self.rank_pattern.values()] if rank % 2]
        if init == "orthogonal" and odd:
            raise LoraMsError(f"init_lora_weights orthogonal expects even ranks, got {odd[0]}")
        if init not in ("gaussian", "orthogonal") and (self.use_dora or self.lora_bias):
            raise LoraMsError(f"init_lora_weights {init} does not support use_dora or lora_bias: leave them out")

    @property
    def title(self) -> str:
        return ("DoRA" if self.use_dora else "LoRA") + ("-FA" if self.use_lorafa else "")

    @property
    def changed_base(self) -> str:
        init = str(self.init_lora_weights)
        return f"init_lora_weights {init}" if lowrank.changes_weight(init) else ""

    @property
    def trains_all_biases(self) -> bool:
        return self.bias == "all"

    @property
    def trains_biases(self) -> bool:
        return self.bias != "none"

    def trained_rows(self, names: Iterable[str], tied: bool) -> dict[str, int]:
        choose = trained_tokens.stored_modules if tied else trained_tokens.modules
        return {name: len(tokens) for name, tokens in choose(self.trainable_token_indices, names).items()}

    @property
    def quantises_some(self) -> bool:
        """Whether some of ``layer_groups`` are quantised, and others perhaps not."""
        return any(group.bits is not None for group in self.layer_groups)

    def wants_bits(self, name: str) -> bool:
        """Whether the layer group of module ``name`` says that its weights have four bits."""
        return any(group.bits is not None for group in self._groups_of(name))

    # YAML

    @classmethod
    def from_yaml(cls, keys: Any) -> "LoraConfig":
        values = {name: getattr(keys, name) for name in keys_of(cls)}
        groups = [
            LayerGroup(
                layers=tuple(group.layers),
                lora_rank=group.lora_rank,
                # without an alpha of its own it keeps the adapter's alpha / rank
                lora_alpha=group.lora_alpha or keys.lora_alpha * group.lora_rank / keys.lora_rank,
                target_modules=_tuple_of(group.target_modules),
                bits=group.bits,
            )
            for group in keys.layer_groups
        ]
        return cls(**{**values, "layer_groups": tuple(groups)})

    # which modules, and what each gets

    def spec(self, name: str) -> LoraSpec:
        return LoraSpec(
            int(by_pattern(name, self.rank_pattern, self.lora_rank)),
            by_pattern(name, self.alpha_pattern, self.lora_alpha),
        )

    def scaling(self, name: str) -> float:
        """The number that multiplies B A of module ``name``."""
        return self.scaling_of(self.spec(name))

    def patterns(self) -> Mapping[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def _groups_of(self, name: str) -> list[LayerGroup]:
        """The layer groups that want module ``name``; one at most, where they do not overlap."""
        index, found = layer_index(name, self.layers_pattern), []
        for group in self.layer_groups:
            targets = self.target_modules if group.target_modules is None else group.target_modules
            if index in group.layers and matches(name, targets):
                found.append(group)
        return found

    def choose(self, name: str) -> AdapterSpec | None:
        if not self.layer_groups:
            return super().choose(name)
        if self.excludes(name):
            return None
        group = next(iter(self._groups_of(name)), None)
        return None if group is None else LoraSpec(group.lora_rank, group.lora_alpha)

    def check_names(self, names: Sequence[str]) -> None:
        """Raises LoraMsError where two layer groups want one module, or a group's layer is not there."""
        layers = {index for name in names if (index := layer_index(name)) is not None}
        beyond = sorted({layer for group in self.layer_groups for layer in group.layers} - layers)
        if beyond:
            raise LoraMsError(f"layer_groups: layers {ranges(beyond)} are not there: the model has {ranges(layers)}")
        twice = {layer_index(name) or 0 for name in names if len(self._groups_of(name)) > 1}
        if twice:
            raise LoraMsError(f"layer_groups overlap in layers {ranges(twice)}: give each module once")

    def check_listed(self, names: Sequence[str]) -> None:
        super().check_listed(names)
        for group in self.layer_groups:
            check_listed("layer_groups: target_modules", group.target_modules or (), names)

    def notes(self, names: Iterable[str], adapted: Iterable[str]) -> list[str]:
        grouped = [layer for group in self.layer_groups for layer in group.layers]
        adapted = list(adapted)
        left = missing_layers(names, grouped) if grouped else ""
        found = [f"layers without an adapter: {left}"] if left else []
        if self.init_lora_weights == "loftq" and any(self.scaling(name) != 1 for name in adapted):
            found.append("loftq expects lora_alpha equal to lora_rank: the error is added alpha / rank times")
        if self.changed_base and self.lora_dropout:
            found.append(
                f"lora_dropout {self.lora_dropout:g} also drops inputs of what {self.init_lora_weights} takes from the "
                "weights, so that the loss starts higher: 0 does not"
            )
        return [*found, *head_notes(self.lora_dropout, adapted)]

    @property
    def sees_rows(self) -> bool:
        return self.init_lora_weights in starts.STARTS and not self.begun

    def started(
        self, seen: SeenRows, specs: Mapping[str, LoraSpec]
    ) -> "tuple[LoraConfig, dict[str, dict[str, Array]]]":
        return starts.STARTS[str(self.init_lora_weights)](self, seen, specs)

    def scaling_of(self, spec: LoraSpec) -> float:
        """The number that multiplies B A of a module with ``spec``."""
        return lowrank.scaling_of(spec.lora_rank, spec.lora_alpha, self.use_rslora)

    # cells

    def build(self, target: Target, spec: LoraSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import lora_cells

        return lora_cells.build(self, target, spec)

    def beside(self, cells: "Mapping[str, nn.Cell]", built: "Mapping[str, nn.Cell]") -> "Mapping[str, nn.Cell]":
        from lora_ms.adapters.methods import trained_tokens_cells

        return trained_tokens_cells.build(self.trainable_token_indices, cells, built)

    def modules_beside(self, names: Iterable[str]) -> Collection[str]:
        return trained_tokens.stored_modules(self.trainable_token_indices, names)

    @property
    def keys_beside(self) -> list[str]:
        return [*super().keys_beside, *([trained_tokens.OPTION] if self.trainable_token_indices else [])]

    # PEFT's files

    def to_peft(self, specs: Mapping[str, LoraSpec], targets: Sequence[str]) -> dict[str, Any]:
        """``r`` and ``lora_alpha`` are the commonest; those that differ go into the two patterns, by whole path.

        The update that PiSSA, OLoRA, CorDA and LoRA-GA subtract from the weight at the start goes into the file: an
        adapter of twice the rank on the weight as it was. ``alpha / rank`` stays, and so does ``alpha / sqrt(rank)``.
        """
        if self.changed_base:
            wider = 2**0.5 if self.use_rslora else 2.0
            specs = {name: LoraSpec(2 * rank, wider * alpha) for name, (rank, alpha) in specs.items()}
        rank = _commonest([spec.lora_rank for spec in specs.values()])
        alpha = _commonest([spec.lora_alpha for spec in specs.values()])
        tokens = self.trainable_token_indices
        return {
            "layers_to_transform": None,  # target_modules says it all
            "lora_alpha": plain_number(alpha),
            "lora_dropout": self.lora_dropout,
            "bias": self.bias,
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "r": rank,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "rank_pattern": {name: spec.lora_rank for name, spec in specs.items() if spec.lora_rank != rank},
            "alpha_pattern": {
                name: plain_number(spec.lora_alpha) for name, spec in specs.items() if spec.lora_alpha != alpha
            },
            # an older PEFT refuses a key that it does not know
            **({"lora_bias": True} if self.lora_bias else {}),
            **({trained_tokens.OPTION: trained_tokens.to_peft(tokens)} if tokens else {}),
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "LoraConfig":
        init = peft.get("init_lora_weights", True)
        lost = "was random" if str(init).startswith("pissa_niter_") else "came from rows"
        if lost == "was random" or init in ("corda", "lora_ga"):
            raise LoraMsError(
                f"what {init} took out of the weights {lost} and is not in the file; "
                "save it in PEFT with path_initial_model_for_weight_conversion"
            )
        if init == "loftq":
            raise LoraMsError(
                "loftq put the weights themselves into four bits, and these are not in the file: save PEFT's base "
                "model beside it, load that, and set init_lora_weights to true in adapter_config.json"
            )
        forgotten = isinstance(init, bool) or init is None or init in FORGOTTEN_INITS
        return cls(
            lora_rank=peft["r"],
            lora_alpha=peft["lora_alpha"],
            lora_dropout=peft.get("lora_dropout") or 0.0,
            bias=peft.get("bias") or "none",
            rank_pattern=peft.get("rank_pattern") or {},
            alpha_pattern=peft.get("alpha_pattern") or {},
            use_rslora=bool(peft.get("use_rslora")),
            use_dora=bool(peft.get("use_dora")),
            lora_bias=bool(peft.get("lora_bias")),
            trainable_token_indices=peft.get(trained_tokens.OPTION) or (),
            init_lora_weights=True if forgotten else init,
            **shared_options(peft),
        )

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        rank = self.spec(name).lora_rank
        if trained_tokens.TENSOR in found:
            return trained_tokens.shapes(trained_tokens.tokens_of(self.trainable_token_indices, name), weight)
        if embedding.is_stored(found):
            return embedding.shapes(rank, weight, self.use_dora)
        outputs, inputs = weight[0], weight[-1]
        wanted: dict[str, Shape] = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
        if self.lora_bias:
            wanted["lora_B.bias"] = (outputs,)
        if self.use_dora:
            wanted["lora_magnitude_vector"] = (outputs,)
        if self.bias != "none" and has_bias:
            wanted["base_layer.bias"] = (outputs,)
        return wanted

    def update(self, name: str, tensors: Mapping[str, Entry]) -> Update:
        if trained_tokens.TENSOR in tensors:
            return trained_tokens.RowsUpdate(tensors, trained_tokens.tokens_of(self.trainable_token_indices, name))
        if embedding.is_stored(tensors):
            return embedding.EmbeddingUpdate(tensors, self.scaling(name))
        init = str(self.init_lora_weights) if self.changed_base else ""
        return LoraUpdate(tensors, self.spec(name).lora_rank, self.scaling(name), init)

    def rank_of(self, tensors: Mapping[str, Shape]) -> int | None:
        for names in (DENSE_PAIR, embedding.TENSORS):
            if all(name in tensors for name in names):
                return rank_of_pair(*(tensors[name] for name in names))
        return None

    def ranks(self, name: str) -> tuple[int, ...]:
        return (self.spec(name).lora_rank,)

    def describe(self) -> str:
        text = self.title
        if self.use_rslora:
            text += " with rsLoRA"
        if isinstance(self.init_lora_weights, str):
            text += f", begun by {self.init_lora_weights}"
        scaling = lowrank.scaling_of(self.lora_rank, self.lora_alpha, self.use_rslora)
        return f"{text}, rank {self.lora_rank}, alpha {self.lora_alpha:g}, scaling {scaling:g}"

    def vllm_refuses(self) -> list[str]:
        return [
            *(["DoRA"] if self.use_dora else []),
            *([trained_tokens.OPTION] if self.trainable_token_indices else []),
        ]

    def vllm_ignores(self) -> list[str]:
        """vLLM reads ``r`` and ``lora_alpha`` alone."""
        patterns = [name for name, given in self.patterns().items() if given]
        return [*patterns, *([self.changed_base] if self.changed_base else [])]

    # as products

    def not_a_pair(self) -> list[str]:
        found = {
            "DoRA": self.use_dora,
            "lora_bias": self.lora_bias,
            f"bias: {self.bias}": self.bias != "none",
            f"modules_to_save: {', '.join(self.modules_to_save)}": self.modules_to_save,
            trained_tokens.OPTION: self.trainable_token_indices,
        }
        return [name for name, present in found.items() if present]

    def pair(self, name: str, tensors: Mapping[str, NDArray]) -> Pair:
        a, b = (tensors.get(tensor) for tensor in pair_names(name))
        rank = self.spec(name).lora_rank
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
            shapes = {tensor: value.shape for tensor, value in tensors.items()}
            raise LoraMsError(f"{name} has {shapes}, should have A and B of rank {rank}")
        return Pair(a, b, self.scaling(name))

    def not_in_rows(self) -> list[str]:
        saved = [f"modules_to_save: {', '.join(self.modules_to_save)}"] if self.modules_to_save else []
        return [*saved, *([trained_tokens.OPTION] if self.trainable_token_indices else [])]

    def row_update(self, name: str, tensors: Mapping[str, NDArray]) -> RowUpdate:
        if tensors.keys() == {"bias"} and self.trains_all_biases:
            return RowUpdate(bias=tensors["bias"])
        pair = self.pair(name, tensors)
        magnitude, added = tensors.get("lora_magnitude_vector"), tensors.get("lora_B.bias")
        if (magnitude is None) == self.use_dora or (added is None) == self.lora_bias:
            raise LoraMsError(f"{name} has {', '.join(sorted(tensors))}, which is not what its settings say")
        if added is not None:
            added = np.float32(pair.scaling) * added
        return RowUpdate(pair, magnitude, tensors.get("base_layer.bias"), added)

    def pair_tensors(self, name: str, pair: Pair) -> dict[str, NDArray]:
        return dict(zip(pair_names(name), (pair.a, pair.b), strict=True))

    def pair_spec(self, pair: Pair) -> LoraSpec:
        rank = len(pair.a)
        return LoraSpec(rank, round(pair.scaling / lowrank.scaling_of(rank, 1.0, self.use_rslora), 9))

    def plain_spec(self, name: str) -> LoraSpec:
        rank, alpha = self.spec(name)
        return LoraSpec(rank, alpha * rank**0.5 if self.use_rslora else alpha)

    def combined(self, rank: int, target_modules: tuple[str, ...]) -> "LoraConfig":
        return LoraConfig(rank, float(rank), self.lora_dropout, target_modules)

    @property
    def selects_by_leaf(self) -> bool:
        return super().selects_by_leaf and not self.layer_groups

    # training

    def continued(self, keys: Any, given: Collection[str]) -> "LoraConfig":
        dropout = {"lora_dropout": keys.lora_dropout} if "lora_dropout" in given else {}
        return replace(self, use_lorafa=keys.use_lorafa, **dropout)  # the file does not say what trained

    def identity(self) -> dict[str, object]:
        names = "lora_alpha lora_dropout use_rslora use_dora bias".split()
        found = {name: getattr(self, name) for name in names} | {"init_lora_weights": str(self.init_lora_weights)}
        if self.trainable_token_indices:
            found[trained_tokens.OPTION] = trained_tokens.to_peft(self.trainable_token_indices)
        if self.init_lora_weights == "corda":
            found["corda_method"] = self.corda_method
        return found | ({"use_lorafa": True} if self.use_lorafa else {})

    def not_split(self, training: bool) -> list[str]:
        plain, keys = LoraConfig(), ["use_dora", "lora_bias", "bias", "modules_to_save", trained_tokens.OPTION]
        keys += ["init_lora_weights"] if training else []
        return [key for key in keys if getattr(self, key) != getattr(plain, key)]

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def separate_dropout(self) -> bool:
        return self.lora_bias

    @property
    def adds_factors_alone(self) -> bool:
        changed = self.use_dora or self.use_lorafa or self.lora_bias or self.bias != "none"
        return not changed and {*self.modules_to_save} <= {"lm_head", "embed_tokens"}

    def cost(self, spec: LoraSpec, inputs: int, outputs: int) -> Cost:
        factors = outputs if self.use_lorafa else inputs + outputs
        beside = outputs * (self.use_dora + self.lora_bias)  # the magnitudes, or the bias beside B
        return Cost(trained=spec.lora_rank * factors + beside, kept=spec.lora_rank)


DENSE_PAIR = ("lora_A.weight", "lora_B.weight")


def pair_names(name: str) -> tuple[str, str]:
    """What PEFT calls A and B of the module at path ``name``."""
    return embedding.TENSORS if embedding.is_embedding(name) else DENSE_PAIR


def rank_of_pair(a: Shape, b: Shape) -> int | None:
    """The rank of A [rank, in] and B [out, rank]; None where they are no pair."""
    return a[0] if len(a) == len(b) == 2 and a[0] == b[1] else None


def _commonest(values: list) -> Any:
    return max(values, key=values.count)


def _tuple_of(targets: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return targets if targets is None or isinstance(targets, str) else tuple(targets)


class LoraUpdate(Update):
    """``W + scaling B A``, with the magnitudes of DoRA and the bias beside B where the file has them.

    Args:
        init: ``init_lora_weights`` of PiSSA and OLoRA, which subtract their initial update from the weight; "" for
            others. The initial update is found again from the whole weight.
    """

    def __init__(self, tensors: Mapping[str, Entry], lora_rank: int, scaling: float, init: str = ""):
        super().__init__(tensors)
        self.lora_rank, self.scaling, self.init = lora_rank, scaling, init
        self.by_rows = not init
        self.adds_bias = "lora_bias" if "lora_B.bias" in tensors else ""

    def weight(self, weight: Array, rows: slice) -> Array:
        if self.init:
            rng = np.random.default_rng(0)  # nothing is drawn from it
            a, b = lowrank.initial_factors(self.init, weight, self.lora_rank, self.scaling, rng)
            weight = lowrank.merged_weight(weight, a, b, -self.scaling)
        magnitude = self.tensor("lora_magnitude_vector")[rows] if "lora_magnitude_vector" in self.tensors else None
        a, b = self.tensor("lora_A.weight"), self.tensor("lora_B.weight")
        return lowrank.merged_weight(weight, a, b[rows], self.scaling, magnitude)

    def bias(self, bias: Array) -> Array:
        bias = super().bias(bias)
        if "lora_B.bias" in self.tensors:
            bias = bias + np.float32(self.scaling) * self.tensor("lora_B.bias")
        return bias

    def keeps_tie(self, other: Update) -> bool:
        """Where the embedding's update is this one transposed: its A is the head's B, and its B the head's A."""
        if not embedding.is_stored(other.tensors) or self.init:
            return False
        if any("lora_magnitude_vector" in update.tensors for update in (self, other)):
            return False
        same_scaling = isinstance(other, embedding.EmbeddingUpdate) and other.scaling == self.scaling
        return same_scaling and all(
            np.array_equal(self.tensor(ours), other.tensor(theirs).T)
            for ours, theirs in zip(DENSE_PAIR, reversed(embedding.TENSORS), strict=True)
        )
