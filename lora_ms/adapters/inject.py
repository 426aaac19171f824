"""Puts adapter cells in the place of the layers that ``target_modules`` names, and freezes the rest."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from lora_ms.adapters.matching import nearest_modules
from lora_ms.adapters.methods import modules_to_save_cells
from lora_ms.adapters.methods.base import AdapterConfig, Target
from lora_ms.adapters.methods.base_cells import AdapterCell
from lora_ms.errors import LoraMsError
from lora_ms.nn.int4 import Int4Projection
from lora_ms.nn.layers import Embedding, Head
from lora_ms.nn.nf4 import NF4Projection
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.nn.projection import DenseProjection
from lora_ms.nn.quantised import QuantisedProjection
from lora_ms.ops import PORTABLE, Operators

# exactly these: a subclass computes something else
TARGETS = (nn.Dense, DenseProjection, NF4Projection, Int4Projection, Head, Embedding)


@dataclass(frozen=True)
class InjectReport:
    """What got an adapter, and how many numbers train."""

    modules: tuple[str, ...]
    title: str  # of the method
    trainable: int
    total: int
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for the user, and one for each note."""
        share = 100 * self.trainable / self.total
        what = f"{self.title} on {len(self.modules)} modules" if self.modules else "no adapter"
        train = f"{what}: {self.trainable:,} of {self.total:,} parameters train ({share:.2f}%)"
        return "\n".join((train, *self.notes))


def cells_of(model: nn.Cell) -> dict[str, nn.Cell]:
    """Every cell by dotted path, but for what is inside a layer or an adapter."""
    found: dict[str, nn.Cell] = {}
    inside = None
    for name, cell in model.cells_and_names():
        if inside is None or not name.startswith(inside):
            found[name] = cell
            if isinstance(cell, AdapterCell) or type(cell) in modules_to_save_cells.COPIES:
                inside = f"{name}."
    return found


def target_layers(model: nn.Cell) -> dict[str, nn.Cell]:
    """Every layer that can take an adapter by dotted path: dense layers, the head, the embedding."""
    return {name: cell for name, cell in cells_of(model).items() if type(cell) in TARGETS}


def weight_shape(layer: nn.Cell) -> tuple[int, int]:
    """The weight's shape in one of ``target_layers``: [out, in], or [vocabulary, h]."""
    if isinstance(layer, Embedding):
        return tuple(layer.weight.shape)
    dense: Any = layer
    return dense.out_channels, dense.in_channels


def adapter_cells(model: nn.Cell) -> dict[str, AdapterCell]:
    """Every cell that belongs to the adapter, modules saved whole included, by dotted path."""
    return {name: cell for name, cell in cells_of(model).items() if isinstance(cell, AdapterCell)}


def adapted_layers(model: nn.Cell) -> dict[str, AdapterCell]:
    """Every adapter by dotted path, modules saved whole left out."""
    return {name: cell for name, cell in adapter_cells(model).items() if cell.spec is not None}


def select(model: nn.Cell, config: AdapterConfig) -> dict[str, Any]:
    """Paths of the layers that ``config``, of a fresh adapter, asks for, with their specs.

    Raises:
        LoraMsError: as ``AdapterConfig.specs`` and ``check_listed``.
    """
    layers = list(target_layers(model))
    specs = config.specs(layers)
    config.check_listed(layers)
    return specs


def cell_at(model: nn.Cell, name: str) -> nn.Cell:
    """The cell at the dotted path ``name``."""
    for part in name.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def install(model: nn.Cell, cells: Mapping[str, nn.Cell]) -> None:
    """Puts ``cells`` at their dotted paths, and gives every parameter its path as its name."""
    for name, cell in cells.items():
        path, _, leaf = name.rpartition(".")
        parent = cell_at(model, path) if path else model
        if leaf.isdigit():
            parent[int(leaf)] = cell  # a SequentialCell runs a list of its own, which setattr leaves as it is
        else:
            setattr(parent, leaf, cell)
    for name, parameter in model.parameters_and_names():  # what is shared keeps the first
        parameter.name = name
    # MindSpore finds compiled graphs by the cell that is called and its inputs: it would go on with the old cells
    model.compile_cache.clear()


def saved_layers(model: nn.Cell, config: AdapterConfig) -> dict[str, nn.Cell]:
    """The whole layers that ``modules_to_save`` names, by path.

    Raises:
        LoraMsError: a name that matches nothing, or nothing that can be trained whole.
    """
    cells, copies, found = cells_of(model), modules_to_save_cells.COPIES, dict[str, nn.Cell]()
    for suffix in config.modules_to_save:
        # by the end of the name, even amid a word, as PEFT has it: norm is every norm
        matching = {name: cell for name, cell in cells.items() if name.endswith(suffix)}
        if not matching:
            raise LoraMsError(
                f"modules_to_save {suffix!r} fits no module of the model; "
                f"{nearest_modules([suffix], [name for name, cell in cells.items() if type(cell) in copies])}"
            )
        wrong = [name for name, cell in matching.items() if type(cell) not in copies]
        if wrong:
            raise LoraMsError(f"modules_to_save {suffix!r}: {wrong[0]} is no dense layer, norm, embedding or head")
        found |= matching
    return found


def build(
    model: nn.Cell,
    config: AdapterConfig,
    specs: Mapping[str, Any],
    shard: Shard = WHOLE,
    operators: Operators = PORTABLE,
) -> dict[str, nn.Cell]:
    """The cells of a fresh adapter by path, not yet in ``model``.

    Args:
        specs: of the modules to adapt.
        shard: with which processes the layers are shared.
        operators: what adapters on layers that are no projections compute with.
    """
    layers, copies = target_layers(model), modules_to_save_cells.COPIES
    config = config.fitted({name: weight_shape(layer) for name, layer in layers.items()})
    cells = {name: copies[type(layer)](layer) for name, layer in saved_layers(model, config).items()}
    for name, spec in specs.items():
        cells[name] = config.build(Target(name, layers[name], shard, operators), spec)
    cells |= config.beside(cells_of(model), cells)
    if config.trains_all_biases:
        for name, layer in layers.items():
            if name not in cells and copies.get(type(layer)) is modules_to_save_cells.TrainedDense and layer.has_bias:
                cells[name] = modules_to_save_cells.TrainedDense(layer, weight=False)
    return cells


def freeze_all(model: nn.Cell) -> None:
    for parameter in model.get_parameters():
        parameter.requires_grad = False


def inject(
    model: nn.Cell,
    config: AdapterConfig,
    specs: Mapping[str, Any] | None = None,
    shard: Shard = WHOLE,
    operators: Operators = PORTABLE,
) -> InjectReport:
    """Puts a fresh adapter into ``model``, whose parameters it freezes; arguments as in ``build``.

    specs: None for the modules that ``config.target_modules`` names.
    """
    cells = build(model, config, select(model, config) if specs is None else specs, shard, operators)
    freeze_all(model)
    install(model, cells)
    return report(model, config, shard)


def report(model: nn.Cell, config: AdapterConfig | None = None, shard: Shard = WHOLE) -> InjectReport:
    """Counts what trains in ``model``, on all processes of ``shard`` together; ``config`` adds its notes."""
    quantised = [cell for _, cell in model.cells_and_names() if isinstance(cell, QuantisedProjection)]
    packed = {parameter for cell in quantised for parameter in cell.weights()}
    sizes = [
        (math.prod(shard.whole_shape(p.name, tuple(p.shape))), p.requires_grad)
        for p in model.get_parameters()
        if p.ndim and p not in packed  # a scalar is a setting, no weight
    ]
    sizes += [(cell.weight_size * shard.count, False) for cell in quantised]
    adapted = adapted_layers(model)
    return InjectReport(
        modules=tuple(adapted),
        title=next((cell.TITLE for cell in adapted.values()), ""),
        trainable=sum(size for size, trained in sizes if trained),
        total=sum(size for size, _ in sizes),
        notes=() if config is None else tuple(config.notes(cells_of(model), adapted)),
    )


def freeze(model: nn.Cell, freeze_include: Iterable[str] = (), freeze_exclude: Iterable[str] = ()) -> None:
    """Freezes parameters whose path matches a shell pattern of ``freeze_include`` and none of ``freeze_exclude``.

    Raises:
        LoraMsError: a pattern that matches no parameter, or nothing left to train.
    """
    names = [name for name, _ in model.parameters_and_names()]
    for pattern in (*freeze_include, *freeze_exclude):
        if not fnmatch.filter(names, pattern):
            raise LoraMsError(f"freeze pattern {pattern!r} fits no parameter; the first are: {', '.join(names[:3])}")
    for name, parameter in model.parameters_and_names():
        included = any(fnmatch.fnmatch(name, pattern) for pattern in freeze_include)
        if included and not any(fnmatch.fnmatch(name, pattern) for pattern in freeze_exclude):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.get_parameters()):
        raise LoraMsError("nothing is left to train: freeze_include covers every trainable parameter")
