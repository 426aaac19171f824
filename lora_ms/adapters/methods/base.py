"""What a method of adapting a model is: its options, and what the rest of the program asks of it.

A method is a subclass of ``AdapterConfig`` in a file of its own that imports no MindSpore, and its cells in another:

    methods/NAME.py          options and their checks, PEFT's keys and tensors, the merged weight in NumPy
    methods/NAME_cells.py    the cells that compute it, and what takes part in the training steps
    methods/__init__.py      one line of METHODS

Options are dataclass fields made by ``option``: each is an argument in Python and a key of ``pet_config`` in YAML. A
method must define what is marked abstract below, in this order: the adapter on one module (``spec``), its cell
(``build``), PEFT's JSON (``to_peft``, ``from_peft``), PEFT's tensors (``shapes``) and the merged weight (``update``).
The rest has defaults, which say of the method that it does nothing out of the ordinary.

Weights are [out, in], as PEFT stores them. A module is named by its dotted path, such as
``model.layers.0.self_attn.q_proj``; a tensor of the module by what follows the path in PEFT's file, ``lora_A.weight``.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.adapters.matching import (
    ALL_LINEAR,
    check_listed,
    ends_with,
    fits_end,
    layer_index,
    leaf_of,
    matches,
    ranges,
)
from lora_ms.adapters.methods.peft_names import ByPeftNames
from lora_ms.errors import LoraMsError
from lora_ms.limits import fullmatch
from lora_ms.values import Bounds, Exclusions, Layers, Targets, Texts

if TYPE_CHECKING:
    from mindspore import nn

    from lora_ms.adapters.methods.base_cells import AdapterCell
    from lora_ms.nn.parallel import Shard
    from lora_ms.ops import Operators

Array = NDArray[np.float32]
Shape = tuple[int, ...]

UNBOUNDED = Bounds()
REQUIRED: Any = object()  # for an option without a default
_SAME: Any = object()


@dataclass(frozen=True)
class Key:
    """How YAML gives an option."""

    type: Any  # one of lora_ms.values, or a dataclass of options, whose keys are a section then
    default: Any  # REQUIRED where there is none
    bounds: Bounds = UNBOUNDED


def option(default: Any, type: Any, bounds: Bounds = UNBOUNDED, yaml_default: Any = _SAME) -> Any:
    """A dataclass field that is also a key of ``pet_config``.

    Args:
        default: in Python; REQUIRED for none.
        type: what YAML may give (see ``lora_ms.values``).
        bounds: of a number, in Python and YAML.
        yaml_default: in YAML, where it is another: MindFormers' own, or None for what follows from other keys.
    """
    in_yaml = default if yaml_default is _SAME else yaml_default
    metadata = {"key": Key(type, list(in_yaml) if isinstance(in_yaml, tuple) else in_yaml, bounds)}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def keys_of(options: type) -> dict[str, Key]:
    """The YAML keys of a dataclass of options, by name."""
    return {field.name: field.metadata["key"] for field in dataclasses.fields(options) if "key" in field.metadata}


class AdapterSpec(Protocol):
    """What the adapter on one module is, such as its rank and alpha: a NamedTuple of the method's own."""

    def _asdict(self) -> dict[str, Any]: ...


class Target(NamedTuple):
    """A layer that gets an adapter."""

    name: str  # of the module
    layer: Any  # a Projection, a nn.Dense or a cell like it, or an Embedding
    shard: "Shard"  # with which processes it is shared
    operators: "Operators"  # what its adapter computes with; a projection has its own
    compute_dtype: Any = None  # type to compute in; None for the input's own


class Pair(NamedTuple):
    """An update of a weight [out, in] as a product: ``scaling B A``."""

    a: NDArray  # [rank, in]
    b: NDArray  # [out, rank]
    scaling: float

    def padded(self, lora_rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A [lora_rank, in] and scaled B [out, lora_rank], which end in zeros."""
        more = (0, lora_rank - len(self.a))
        a, b = np.pad(self.a, (more, (0, 0))), np.pad(self.scaling * self.b, ((0, 0), more))
        return a.astype(np.float32), b.astype(np.float32)


def no_pair(inputs: int, outputs: int) -> Pair:
    """The update of rank 0 of a weight [outputs, inputs]."""
    return Pair(np.zeros((0, inputs), np.float32), np.zeros((outputs, 0), np.float32), 1.0)


class RowUpdate(NamedTuple):
    """What an adapter makes of one layer in the rows of a batch that use it; None: nothing of that kind."""

    pair: Pair | None = None
    magnitude: NDArray | None = None  # [out], to which the rows of ``W + scaling B A`` are brought
    bias: NDArray | None = None  # [out], in the place of the layer's
    added_bias: NDArray | None = None  # [out]


class Update:
    """What an adapter makes of one module, computed from the tensors in its file.

    Args:
        tensors: where they lie, by name.
    """

    by_rows = True  # whether a row of the merged weight depends on the same row of the weight alone
    changes_weight = True
    adds_bias = ""  # the option by which the merged module needs a bias, had it none before
    reaches_tied_head = False  # whether the update of an embedding is that of a head tied to it, too

    def __init__(self, tensors: Mapping[str, storage.Entry]):
        self.tensors = tensors
        self._read: dict[str, Array] = {}

    def tensor(self, name: str) -> Array:
        """The numbers of a tensor, read once."""
        if name not in self._read:
            self._read[name] = storage.read(self.tensors[name], np.float32)
        return self._read[name]

    @property
    def changes_bias(self) -> bool:
        return any(name.endswith("bias") for name in self.tensors)

    def weight(self, weight: Array, rows: slice) -> Array:
        """The merged ``rows`` of the weight, of which ``weight`` are the unmerged."""
        raise NotImplementedError

    def bias(self, bias: Array) -> Array:
        """The merged bias [out]."""
        for name in ("bias", "base_layer.bias"):  # a trained copy replaces the model's own
            bias = bias if name not in self.tensors else self.tensor(name)
        return bias

    def blocks(self, shape: Shape, read: Callable[[slice], Array]) -> Iterator[Array]:
        """The merged weight in blocks of rows, so that no whole weight need fit into memory.

        read: the unmerged rows of a weight of ``shape``.
        """
        for rows in storage.row_blocks(shape) if self.by_rows else [slice(0, shape[0])]:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is for the caller to refuse
                merged = self.weight(read(rows), rows)
            yield merged
        self._read.clear()

    def keeps_tie(self, embedding: "Update") -> bool:
        """Whether a head with this update, tied to an embedding with ``embedding``, stays tied once both are merged."""
        return False


class SeenRows(NamedTuple):
    """What the bare model makes of some rows of a run, for adapters that start from that; computed when it is called.

    Modules are named by their paths.
    """

    # modules and what they all take at label tokens [tokens, in]; some may have no adapter
    inputs: Callable[[], Iterable[tuple[tuple[str, ...], Array]]]
    # modules, and the gradient of the mean loss by the weight of each [out, in]
    gradients: Callable[[Collection[str]], Iterable[tuple[str, Array]]]
    weight: Callable[[str], Array]  # of a module [out, in]


class Cost(NamedTuple):
    """What the adapter on one module costs in training."""

    trained: int  # numbers
    kept: int  # numbers of every token that the backward pass needs besides the module's own input


@dataclass(frozen=True, repr=False)
class AdapterConfig(metaclass=ByPeftNames):
    """The options that all methods share, and the questions that each answers.

    ``target_modules``: a regular expression (matched from the start of the leaf name or of its MindFormers alias, or
    wholly with the dotted path), a list of path suffixes as in PEFT, or ``"all-linear"``. The head and the embedding
    may be targets.

    Raises:
        LoraMsError: a value out of range, or two that exclude each other.
    """

    PET_TYPE: ClassVar[str]  # name in METHODS, and in pet_config
    PEFT_TYPE: ClassVar[str]  # name in adapter_config.json
    PEFT_REQUIRED: ClassVar[tuple[str, ...]] = ("target_modules",)  # keys without which it says too little
    TENSORS: ClassVar[tuple[str, ...]]  # of an adapted module, in PEFT's file; one of them makes it adapted
    # of a module that no adapter is on and that the method trains in another way
    BESIDE_TENSORS: ClassVar[tuple[str, ...]] = ()
    # tensors that have a row (or a number) for each output of the module: they are split with a fused matrix
    ROW_TENSORS: ClassVar[tuple[str, ...]] = ()
    # which keys for the choice of modules PEFT's settings have
    PEFT_PLACING: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "modules_to_save")
    # those of TENSORS that all modules have in common: they stand once in the file, under the adapter's own name, and
    # are read as if each adapted module had them
    SHARED_TENSORS: ClassVar[tuple[str, ...]] = ()
    # keys of tensors that stand in the file by their bare names, and the modules that they belong to
    ROOT_TENSORS: ClassVar[Mapping[str, str]] = {}
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {}  # types of its own keys of adapter_config.json, as pydantic has them
    PARAMETERS: ClassVar[tuple[str, ...]]  # names of the cells' trained parameters
    # by tensor, the number that fills it where the adapter changes nothing (all of a module's must be so); how
    # check-adapter calls this check, and what it says
    IDLE: ClassVar[Mapping[str, float]] = {}
    IDLE_CHECK: ClassVar[tuple[str, str]] = ("", "")
    YAML_KEYS: ClassVar[Mapping[str, Key]] = {}  # keys of pet_config beside the options: of training alone
    # options that an adapter to go on from and pet_config must agree in; which keys decide each field of a spec, and
    # which choose modules besides those that all methods share
    AGREEING: ClassVar[tuple[str, ...]] = ()
    SPEC_KEYS: ClassVar[Mapping[str, frozenset[str]]] = {}
    PLACING: ClassVar[frozenset[str]] = frozenset(
        ("target_modules", "exclude_layers", "exclude_modules", "layers_to_transform", "layers_pattern")
    )
    WITH_MINDFORMERS: ClassVar[bool] = False  # whether MindFormers' own trainer can train it

    # which modules get an adapter; MindFormers' expression is the default in YAML
    target_modules: str | tuple[str, ...] = option(
        "q_proj|k_proj|v_proj|o_proj", Targets, yaml_default=".*wq|.*wk|.*wv|.*wo"
    )
    exclude_layers: tuple[str, ...] = option((), Texts)  # parts of paths to leave out (MindFormers)
    exclude_modules: str | tuple[str, ...] = option((), Exclusions)  # the same as PEFT has it: regex or path suffixes
    layers_to_transform: tuple[int, ...] | None = option(None, Layers)  # indices of layers; None: all
    layers_pattern: tuple[str, ...] = option((), Texts)  # names of the list that these count in, where there are more
    _: KW_ONLY
    modules_to_save: tuple[str, ...] = option((), Texts)  # whole modules to train beside: lm_head, embed_tokens, norm

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(differing(self))})"

    def __post_init__(self) -> None:
        for name in ("exclude_layers", "layers_pattern", "modules_to_save"):  # one name for a list of one
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value or ()))
        layers = self.layers_to_transform
        if layers is not None:
            object.__setattr__(self, "layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers))
        check_bounds(self)

    @property
    def title(self) -> str:
        """The method's name in lines for the user."""
        raise NotImplementedError

    # YAML

    @classmethod  # noqa: B027
    def check_yaml(cls, keys: Any) -> None:
        """Raises ValueError where keys of ``pet_config`` exclude each other."""

    @classmethod
    def from_yaml(cls, keys: Any) -> "AdapterConfig":
        """The adapter that ``pet_config`` asks for; ``keys`` has a value for each of ``keys_of(cls)`` and YAML_KEYS.

        Raises:
            LoraMsError: values that exclude each other.
        """
        return cls(**{name: getattr(keys, name) for name in keys_of(cls)})

    # which modules, and what each gets

    @abstractmethod
    def spec(self, name: str) -> AdapterSpec:
        """The adapter that module ``name`` gets, once it is chosen."""

    def scaling(self, name: str) -> float:
        """The number that multiplies the update of module ``name``."""
        return 1.0

    def patterns(self) -> Mapping[str, Mapping[str, float]]:
        """Options that name modules by regular expressions; each expression must match a module that is adapted."""
        return {}

    def excludes(self, name: str) -> bool:
        """Whether module ``name`` is left out although it may be a target."""
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if excluded and fullmatch(excluded, name):
                return True
        elif ends_with(name, excluded):
            return True
        return any(part in name for part in self.exclude_layers) or ends_with(name, self.modules_to_save)

    def choose(self, name: str) -> AdapterSpec | None:
        """The adapter that module ``name`` gets; None where it gets none."""
        if self.excludes(name) or not self.target_modules or not matches(name, self.target_modules):
            return None
        layers = self.layers_to_transform
        if layers is not None and layer_index(name, self.layers_pattern) not in layers:
            return None
        return self.spec(name)

    def check_names(self, names: Sequence[str]) -> None:  # noqa: B027
        """Raises LoraMsError where options do not suit a model of modules ``names``."""

    def check_listed(self, names: Sequence[str]) -> None:
        """Raises LoraMsError where the lists of a fresh adapter name modules or layers that are not among ``names``.

        The settings of a stored adapter may: PEFT takes them.
        """
        check_listed("target_modules", self.target_modules, names)
        check_listed("exclude_modules", self.exclude_modules, names)
        check_listed("exclude_layers", self.exclude_layers, names, lambda name, part: part in name)
        layers = {index for name in names if (index := layer_index(name, self.layers_pattern)) is not None}
        beyond = sorted({*(self.layers_to_transform or ())} - layers)
        if beyond and self.layers_pattern and not layers:
            raise LoraMsError(
                f"layers_pattern {', '.join(self.layers_pattern)} fits no list of layers of the model: leave it out"
            )
        if beyond:
            raise LoraMsError(
                f"layers_to_transform: layers {ranges(beyond)} are not there: the model has {ranges(layers)}"
            )

    def specs(self, names: Iterable[str]) -> dict[str, Any]:
        """The modules among ``names`` that get adapters, each with its ``AdapterSpec``.

        Raises:
            LoraMsError: an expression that does not parse, a pattern that matches nothing, or no match at all; what
                could match is listed.
        """
        names = list(names)
        found = {name: spec for name in names if (spec := self.choose(name)) is not None}
        self.check_names(names)
        if not found:
            raise LoraMsError(self._no_match(names))
        for key, patterns in self.patterns().items():
            for pattern in patterns:
                if not any(fits_end(name, pattern) for name in found):
                    raise LoraMsError(f"{key} {pattern!r} matches none of the {len(found)} adapted modules")
        return found

    def _no_match(self, names: Sequence[str]) -> str:
        excluded, modules = list(self.exclude_layers), self.exclude_modules
        excluded += [modules] if modules and isinstance(modules, str) else list(modules)
        outside = f" outside {', '.join(excluded)}" if excluded else ""
        if self.layers_to_transform is not None:
            outside += f" in layers {list(self.layers_to_transform)}"
        targets = self.target_modules
        asked = repr(targets) if isinstance(targets, str) else ", ".join(targets)
        if asked.strip("'") == "all":  # LLaMA-Factory's word
            return f"target_modules {asked} matches no layer: for all dense layers write {ALL_LINEAR}"
        leaves = ", ".join(sorted({leaf_of(name) for name in names}))
        return f"target_modules {asked} matches no layer{outside}; could match: {leaves}, or {ALL_LINEAR}"

    @property
    def sees_rows(self) -> bool:
        """Whether the adapter starts from what the model makes of rows, see ``started``."""
        return False

    def started(self, seen: SeenRows, specs: Mapping[str, Any]) -> "tuple[AdapterConfig, dict[str, dict[str, Array]]]":
        """The settings of an adapter that starts from rows, and its first tensors, by module and name.

        Args:
            specs: of the modules that are adapted.

        Raises:
            LoraMsError: the modules or rows do not suit the start.
        """
        raise NotImplementedError

    @property
    def merges(self) -> bool:
        """Whether the adapter can become part of the weights."""
        return True

    @property
    def virtual_tokens(self) -> int:
        """Trained vectors that stand before the tokens of every row."""
        return 0

    def reading(self, tokenizer: Any) -> "AdapterConfig":
        """The settings with the ids of texts in them, by transformers' ``tokenizer``; None where there is none."""
        return self

    def fitted(self, shapes: Mapping[str, Shape]) -> "AdapterConfig":
        """The settings for a model whose modules have weights of these ``shapes``, where the model decides some."""
        return self

    def notes(self, names: Iterable[str], adapted: Iterable[str]) -> list[str]:
        """What the user should know of the adapter on modules ``adapted`` of a model of modules ``names``."""
        return []

    # cells

    @abstractmethod
    def build(self, target: "Target", spec: Any) -> "AdapterCell":
        """A fresh adapter cell; ``spec`` is the module's, from ``spec``.

        Raises:
            LoraMsError: the method does not suit this kind of layer.
        """

    def beside(self, cells: Mapping[str, "nn.Cell"], built: Mapping[str, "nn.Cell"]) -> "Mapping[str, nn.Cell]":
        """Cells for other places of a model than modules, by path.

        Args:
            cells: of the model, by path.
            built: those of the modules.
        """
        return {}

    @property
    def trains_all_biases(self) -> bool:
        """Whether the biases of layers without an adapter train, too."""
        return False

    @property
    def trains_biases(self) -> bool:
        """Whether the biases of adapted layers train."""
        return False

    def trained_rows(self, names: Iterable[str], tied: bool) -> dict[str, int]:
        """How many rows train beside the adapter of each embedding or head among the modules ``names``.

        tied: whether the head is the embedding, and so shares its rows.
        """
        return {}

    # PEFT's files

    def tells_paths_apart(self, specs: Mapping[str, Any]) -> bool:
        """Whether modules of one leaf name get keys of their own in ``adapter_config.json``, which then names paths."""
        return False

    @abstractmethod
    def to_peft(self, specs: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """The method's own keys of ``adapter_config.json``.

        Args:
            specs: of the adapter, by module.
            targets: leaf names, or whole paths, that say which modules these are.
        """

    @classmethod
    @abstractmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "AdapterConfig":
        """The reverse, of the whole file; ``shared_options`` reads the keys that all methods share."""

    @abstractmethod
    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        """Names and shapes of the tensors that the file must hold for module ``name``.

        Args:
            found: those that it holds; at least one of TENSORS or BESIDE_TENSORS is among them.
            weight: shape of the module's weight, [out, in] or, of the embedding, [vocabulary, h].
            has_bias: whether the module has a bias.
        """

    def adapts(self, tensors: Iterable[str]) -> bool:
        """Whether a module with these tensors has an adapter."""
        return any(name in self.TENSORS for name in tensors)

    def knows(self, tensors: Iterable[str]) -> bool:
        """Whether the method trains a module with these tensors; else it is saved whole."""
        return any(name in self.TENSORS or name in self.BESIDE_TENSORS for name in tensors)

    def modules_beside(self, names: Iterable[str]) -> Collection[str]:
        """The modules among ``names`` of a model for which the file holds BESIDE_TENSORS."""
        return ()

    @property
    def keys_beside(self) -> list[str]:
        """Keys of ``pet_config`` by which more trains than adapters."""
        return ["modules_to_save"] if self.modules_to_save else []

    def pack(self, name: str, values: dict[str, Array]) -> dict[str, Array]:
        """The tensors of module ``name`` as they are stored, from those that train."""
        return values

    def unpack(self, name: str, values: dict[str, Array]) -> dict[str, Array]:
        """The reverse."""
        return values

    def as_lora(self, tensors: Mapping[str, Mapping[str, Array]]) -> "tuple[AdapterConfig, dict, dict] | None":
        """The same adapter as plain LoRA, which more programs load; None where there is no such form.

        Args:
            tensors: as stored, by module and name.

        Returns:
            LoRA's settings, the spec of each module, and its tensors by name.
        """
        return None

    @abstractmethod
    def update(self, name: str, tensors: Mapping[str, storage.Entry]) -> Update:
        """What stored ``tensors`` make of module ``name``."""

    def rank_of(self, tensors: Mapping[str, Shape]) -> int | None:
        """The rank by the shapes of a module's tensors; None where they do not belong together."""
        return None

    def ranks(self, name: str) -> tuple[int, ...]:
        """Ranks that module ``name`` may have in the file; () for a method without ranks."""
        return ()

    @property
    def changed_base(self) -> str:
        """How the file's tensors stand on weights that training changed before its start, such as
        ``init_lora_weights pissa``; "" where they stand on the model's own."""
        return ""

    def describe(self) -> str:
        """The options in one line for check-adapter."""
        return self.title

    def vllm_refuses(self) -> list[str]:
        """What vLLM does not serve."""
        return [self.title]

    def vllm_ignores(self) -> list[str]:
        """What vLLM does not read, so that it computes other numbers."""
        return []

    # adapters as products ``scaling B A``; only where ``not_a_pair`` is empty

    def not_a_pair(self) -> list[str]:
        """Why this adapter is more than a product on each module, and so cannot be combined with others."""
        return [self.title]

    def pair(self, name: str, tensors: Mapping[str, NDArray]) -> Pair:
        """The pair that the stored tensors of a module make.

        Raises:
            LoraMsError: they do not belong together.
        """
        raise NotImplementedError

    def not_in_rows(self) -> list[str]:
        """Why this adapter cannot run in some rows of a batch, beside others."""
        return self.not_a_pair()

    def row_update(self, name: str, tensors: Mapping[str, NDArray]) -> RowUpdate:
        """The update that the stored tensors of a module make, if ``not_in_rows`` is empty.

        Raises:
            LoraMsError: they do not belong together.
        """
        return RowUpdate(self.pair(name, tensors))

    def pair_tensors(self, name: str, pair: Pair) -> dict[str, NDArray]:
        """The reverse of ``pair``, but for the scaling."""
        raise NotImplementedError

    def pair_spec(self, pair: Pair) -> AdapterSpec:
        """The adapter on a module that ``pair`` is."""
        raise NotImplementedError

    def combined(self, rank: int, target_modules: tuple[str, ...]) -> "AdapterConfig":
        """The settings of an adapter made of this and others: of one rank and scaling 1."""
        raise NotImplementedError

    def plain_spec(self, name: str) -> Any:
        """The spec of module ``name`` with which an adapter without further options scales it as this one does."""
        return self.spec(name)

    @property
    def selects_by_leaf(self) -> bool:
        """Whether leaf names say which modules are chosen, as far as the file has tensors of them."""
        targets, narrowed = self.target_modules, self.layers_to_transform is not None
        listed = not isinstance(targets, str) and not any("." in target for target in targets)
        return listed and not (narrowed or self.exclude_modules or self.exclude_layers)

    # training

    def continued(self, keys: Any, given: Collection[str]) -> "AdapterConfig":
        """The settings with which a stored adapter trains on: its own, but for what ``pet_config`` says of training.

        Args:
            keys: ``pet_config``.
            given: names of those keys that the user gave.
        """
        return self

    def for_run(self, total_steps: int) -> "AdapterConfig":
        """The settings for a run of so many optimiser steps.

        Raises:
            LoraMsError: the run is too short for the method.
        """
        return self

    def step_hook(self, model: "nn.Cell") -> Any:
        """What takes part in the training steps of ``model``, a ``train.hooks.StepHook``; None for most methods."""
        return None

    def identity(self) -> dict[str, object]:
        """What a resumed run must share besides the adapter's tensors, as JSON values."""
        return {}

    def not_split(self, training: bool) -> list[str]:
        """Keys of ``pet_config`` that ask for what is not computed where processes share each layer."""
        return [f"pet_type {self.PET_TYPE}", *self.keys_beside]

    @property
    def dropout(self) -> float:
        """Probability with which an input of an adapter is dropped in training."""
        return 0.0

    @property
    def separate_dropout(self) -> bool:
        """Whether an operator of its own drops it, even where native operators do so within a product."""
        return False

    @property
    def adds_factors_alone(self) -> bool:
        """Whether ``scaling B A``, whose A and B train, is all that is added to linear layers, and nothing else within
        the layers changes: what ``Operators.trained_layers`` computes."""
        return False

    @abstractmethod
    def cost(self, spec: Any, inputs: int, outputs: int) -> Cost:
        """The cost of the adapter on a module of so many inputs and outputs."""


def check_bounds(options: Any, where: str = "") -> None:
    """Raises LoraMsError where a number of a dataclass of options is out of its range; ``where`` follows its name."""
    for name, key in keys_of(type(options)).items():
        check_number(name + where, getattr(options, name), key.bounds)


def check_number(name: str, value: Any, bounds: Bounds) -> None:
    """Raises LoraMsError where ``value`` is out of ``bounds``; None is never."""
    if bounds and value is not None and not bounds.contains(value):
        raise LoraMsError(f"{name} must be {bounds}, got {value}")


def differing(options: Any) -> Iterator[str]:
    """``name=value`` of what differs from the default in a dataclass."""
    for field in dataclasses.fields(options):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(options, field.name)
        if value != default:
            yield f"{field.name}={value!r}"


def head_notes(dropout: float, adapted: Iterable[str]) -> list[str]:
    """A note where the head is adapted: the loss multiplies its weight, and there is no input to drop out."""
    if dropout and any(leaf_of(name) == "lm_head" for name in adapted):
        return ["lora_dropout does not reach the adapter on the head"]
    return []


def shared_options(peft: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``AdapterConfig`` in a parsed adapter_config.json; PEFT writes null for what is not given."""
    return {
        "target_modules": peft["target_modules"] or (),
        "exclude_modules": peft.get("exclude_modules") or (),
        "layers_to_transform": None if peft.get("layers_to_transform") == [] else peft.get("layers_to_transform"),
        "layers_pattern": peft.get("layers_pattern") or (),
        "modules_to_save": peft.get("modules_to_save") or (),
    }


def plain_number(number: float) -> float:
    """16 for 16.0, as PEFT writes it."""
    return int(number) if number == int(number) else number


def missing_layers(names: Iterable[str], layers: Iterable[int]) -> str:
    """Layers of a model of modules ``names`` that are not among ``layers``, as ranges."""
    there = {index for name in names if (index := layer_index(name)) is not None}
    return ranges(sorted(there - set(layers)))
