"""Swaps adapter cells in for the layers that ``target_modules`` names, and freezes the rest."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.common.initializer import initializer

from lora_ms.adapters.config import AdaLoraConfig, LoraConfig
from lora_ms.adapters.matching import Place, gaps, leaf_of, places, ranges
from lora_ms.adapters.methods.embedding_cells import DoRAEmbedding, LoRAEmbedding
from lora_ms.adapters.methods.lora_cells import AdaLoRADense, DoRADense, LoRADense, default_a
from lora_ms.adapters.methods.modules_to_save_cells import TrainedDense, TrainedEmbedding, TrainedHead, TrainedNorm
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding, Head, RMSNorm
from lora_ms.nn.parallel import WHOLE, Shard, split_axis
from lora_ms.nn.projection import DenseProjection
from lora_ms.ops import PORTABLE, Operators

ADAPTERS = (LoRADense, LoRAEmbedding)
TRAINED = (TrainedHead, TrainedDense, TrainedEmbedding, TrainedNorm)
TARGETS = (nn.Dense, DenseProjection, Head, Embedding)  # exactly these: their subclasses are adapters
COPIES = {
    nn.Dense: TrainedDense,
    DenseProjection: TrainedDense,
    Head: TrainedHead,
    Embedding: TrainedEmbedding,
    RMSNorm: TrainedNorm,
}


@dataclass(frozen=True)
class InjectReport:
    """What was swapped, and how many numbers train."""

    modules: tuple[str, ...]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for the user, and one for each note."""
        share = 100 * self.trainable / self.total
        what = f"LoRA on {len(self.modules)} modules" if self.modules else "no adapter"
        train = f"{what}: {self.trainable:,} of {self.total:,} parameters train ({share:.2f}%)"
        return "\n".join((train, *self.notes))


def target_layers(model: nn.Cell) -> dict[str, nn.Cell]:
    """Every layer that can take an adapter by dotted path: dense layers, the head, the embedding."""
    return {name: cell for name, cell in model.cells_and_names() if type(cell) in TARGETS}


def rate_factors(model: nn.Cell, ratio: float, embedding: float) -> dict[str, float]:
    """What the learning rate of each trainable parameter is multiplied by (LoRA+, Hayou et al., 2024; groups as in
    PEFT), by path: ``ratio`` for B and all that has one dimension, ``embedding`` for A and B on the embedding, 1 for
    the rest."""
    cells = (cell for _, cell in model.cells_and_names() if isinstance(cell, LoRAEmbedding))
    embeddings = {id(p) for cell in cells for p in (cell.lora_a, cell.lora_b)}
    found = {}
    for name, parameter in model.parameters_and_names():
        if id(parameter) in embeddings:
            found[name] = embedding
        else:
            found[name] = ratio if name.endswith("lora_b") or parameter.ndim == 1 else 1.0
    return found


def lora_layers(model: nn.Cell) -> dict[str, nn.Cell]:
    """Every adapter by dotted path."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, ADAPTERS)}


def adapter_cells(model: nn.Cell) -> dict[str, nn.Cell]:
    """Every cell that belongs to the adapter, whole trained layers included, by dotted path."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, (*ADAPTERS, *TRAINED))}


def select(model: nn.Cell, config: LoraConfig) -> dict[str, Place]:
    """Paths of the layers that ``config`` asks for, with rank and alpha; errors as in ``matching.places``."""
    return places(target_layers(model), config)


def cell_at(model: nn.Cell, name: str) -> nn.Cell:
    """The cell at the dotted path ``name``."""
    for part in name.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def place(model: nn.Cell, cells: Mapping[str, nn.Cell]) -> None:
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


def starting_a(name: str, layer: nn.Cell, rank: int, shard: Shard) -> Tensor | None:
    """This rank's columns of the A that one rank would have drawn; None where it is not split."""
    if shard.count == 1 or split_axis(f"{name}.lora_a") is None:
        return None
    whole = initializer(default_a(), (rank, layer.in_channels * shard.count), ms.float32).init_data()
    return Tensor(np.ascontiguousarray(shard.part(f"{name}.lora_a", whole.asnumpy())))


def adapter_on(
    layer: nn.Cell,
    config: LoraConfig,
    where: Place,
    a_init: Tensor | None = None,
    compute_dtype: ms.Type | None = None,
    operators: Operators = PORTABLE,
) -> nn.Cell:
    """A fresh adapter cell on ``layer``.

    a_init: the A to start from, of plain LoRA. operators: for a ``nn.Dense``; a projection has its own.
    """
    if type(layer) is Embedding:
        if isinstance(config, AdaLoraConfig) or config.lora_bias or not isinstance(config.init_lora_weights, bool):
            raise LoraMsError("on the embedding LoRA, rsLoRA and DoRA are supported, without bias or init_lora_weights")
        return (DoRAEmbedding if config.use_dora else LoRAEmbedding)(layer, *where, use_rslora=config.use_rslora)
    if isinstance(config, AdaLoraConfig):
        return AdaLoRADense.from_dense(
            layer, *where, config.lora_dropout, train_bias=config.bias != "none", operators=operators
        )
    return (DoRADense if config.use_dora else LoRADense).from_dense(
        layer,
        *where,
        config.lora_dropout,
        config.init_lora_weights,
        config.bias != "none",
        use_rslora=config.use_rslora,
        lora_bias=config.lora_bias,
        lora_a_init=a_init,
        compute_dtype=compute_dtype,
        operators=operators,
    )


def saved_layers(model: nn.Cell, config: LoraConfig) -> dict[str, nn.Cell]:
    """The whole layers that ``modules_to_save`` names, by path.

    Raises:
        LoraMsError: a name that fits nothing, or nothing that can be trained whole.
    """
    found: dict[str, nn.Cell] = {}
    for wanted in config.modules_to_save:
        # by the end of the name, even amid a word, as PEFT has it: norm is every norm
        fitting = {name: cell for name, cell in model.cells_and_names() if name.endswith(wanted)}
        if not fitting:
            raise LoraMsError(f"modules_to_save {wanted!r} fits no module of the model")
        wrong = [name for name, cell in fitting.items() if type(cell) not in COPIES]
        if wrong:
            raise LoraMsError(f"modules_to_save {wanted!r}: {wrong[0]} is no dense layer, norm, embedding or head")
        found |= fitting
    return found


def build(model: nn.Cell, config: LoraConfig, where: Mapping[str, Place], shard: Shard = WHOLE) -> dict[str, nn.Cell]:
    """The cells of a fresh adapter by path, not yet in ``model``; ``shard``: with which ranks the layers are shared."""
    layers = target_layers(model)
    cells = {name: COPIES[type(cell)](cell) for name, cell in saved_layers(model, config).items()}
    for name, place in where.items():
        cells[name] = adapter_on(layers[name], config, place, starting_a(name, layers[name], place.lora_rank, shard))
    if config.bias == "all":
        rest = {
            name: layer
            for name, layer in layers.items()
            if name not in cells and COPIES.get(type(layer)) is TrainedDense
        }
        cells |= {name: TrainedDense(layer, weight=False) for name, layer in rest.items() if layer.has_bias}
    return cells


def inject(
    model: nn.Cell, config: LoraConfig, where: Mapping[str, Place] | None = None, shard: Shard = WHOLE
) -> InjectReport:
    """Swaps a fresh adapter in, in place; ``where`` overrides the choice of ``config.target_modules``.

    Afterwards the adapter's parameters alone are trainable.
    """
    cells = build(model, config, select(model, config) if where is None else where, shard)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    place(model, cells)
    return report(model, config, shard)


def report(model: nn.Cell, config: LoraConfig | None = None, shard: Shard = WHOLE) -> InjectReport:
    """Counts what stands in ``model`` now, on all ranks of ``shard`` together."""
    sizes = [
        (math.prod(shard.whole_shape(p.name, tuple(p.shape))), p.requires_grad)
        for p in model.get_parameters()
        if p.ndim  # a scalar is a setting, no weight
    ]
    notes = []
    if config is not None:
        left = gaps(config, (name for name, _ in model.cells_and_names()))
        notes += [f"layers without an adapter: {ranges(left)}"] if left else []
        if config.lora_dropout and any(leaf_of(name) == "lm_head" for name in lora_layers(model)):
            notes.append("lora_dropout does not reach the adapter on the head")
    return InjectReport(
        tuple(lora_layers(model)),
        sum(size for size, trained in sizes if trained),
        sum(size for size, _ in sizes),
        tuple(notes),
    )


def freeze(model: nn.Cell, freeze_include: Iterable[str] = (), freeze_exclude: Iterable[str] = ()) -> None:
    """Freezes parameters whose path fits a shell pattern of ``freeze_include`` and none of ``freeze_exclude``.

    Raises:
        LoraMsError: a pattern that fits no parameter, or nothing left to train.
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
