"""Several adapters of one model by name: which cells stand in the model says which of them is at work."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from lora_ms.adapters.combine import Adapter, factor_names
from lora_ms.adapters.config import LoraConfig
from lora_ms.adapters.inject import build, cell_at, place
from lora_ms.adapters.matching import Place
from lora_ms.adapters.merge import merged_cells
from lora_ms.adapters.methods.lora_cells import AdaLoRADense, DoRADense, LoRADense
from lora_ms.adapters.multi_adapter import Factors, MixedLoRADense, choice_values
from lora_ms.adapters.peft_format import packed
from lora_ms.errors import LoraMsError

BASE = "__base__"  # in a mixed batch, as in PEFT: a row without an adapter
Cells = Mapping[str, nn.Cell]


class Numbers(NamedTuple):
    """What a cell holds that another adapter of the same shape could put there."""

    tensors: dict[str, NDArray[np.float32]]
    lora_alpha: float | None
    scaling: float | None


def numbers_of(cell: nn.Cell) -> Numbers:
    tensors = {factor: parameter.asnumpy().copy() for factor, parameter in cell.tensors().items()}
    if isinstance(cell, LoRADense) or "lora_embedding_A" in tensors:
        return Numbers(tensors, cell.lora_alpha, float(cell.scaling.asnumpy()))
    return Numbers(tensors, None, None)


def put(cell: nn.Cell, numbers: Numbers) -> None:
    for factor, parameter in cell.tensors().items():
        parameter.set_data(Tensor(numbers.tensors[factor]))
    if numbers.scaling is not None:
        cell.lora_alpha = numbers.lora_alpha
        cell.scaling.set_data(Tensor(np.float32(numbers.scaling)))


def shape_of(cells: Cells) -> Hashable:
    """Equal for adapters that differ in their numbers alone, and so can share cells and compiled graphs."""
    parts = []
    for name, cell in sorted(cells.items()):
        shapes = tuple((factor, tuple(p.shape)) for factor, p in cell.tensors().items())
        dense = isinstance(cell, LoRADense)
        dropout = cell.lora_dropout.probability if dense else 0.0
        own_weight = id(cell) if dense and cell.start is not None else 0  # what PiSSA left is of no use to another
        parts.append((name, type(cell).__name__, shapes, dropout, own_weight))
    return tuple(parts)


class NamedAdapters:
    """The adapters of ``model``, a bare one at first.

    The plain layers are kept: to take an adapter out is to put them back, exactly.

    Args:
        changed: called after other cells have come to stand in the model.
    """

    def __init__(self, model: nn.Cell, changed: Callable[[], None]):
        self.model, self.changed = model, changed
        self.base: dict[str, nn.Cell] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active: str | None = None
        self.standing: Hashable = BASE  # a key for compiled graphs
        self.merged = False
        self._shapes: dict[str, Hashable] = {}
        self._cells: dict[Hashable, Cells] = {}
        self._holder: dict[Hashable, str] = {}  # whose numbers the cells of a shape hold
        self._waiting: dict[str, dict[str, Numbers]] = {}
        self._mixed: dict[Hashable, tuple] = {}

    def stand(self, key: Hashable, cells: Cells) -> None:
        """Lets ``cells`` stand in the model, and plain layers elsewhere."""
        if self.standing != key:
            place(self.model, {**self.base, **cells})
            self.standing = key
            self.changed()

    def bare(self) -> None:
        """Takes every adapter out."""
        self.stand(BASE, {})
        self.merged = False

    def add(self, name: str, config: LoraConfig, cells: Cells) -> None:
        """Takes ``cells``, built on the bare model, in as the adapter ``name``; it is not yet at work.

        Raises:
            LoraMsError: the name is taken, or no name.
        """
        if name in self.configs or name == BASE or not name:
            raise LoraMsError(f"adapter name {name!r} is taken: give another")
        self.bare()
        self.base |= {path: cell_at(self.model, path) for path in cells if path not in self.base}
        shape = shape_of(cells)
        self.configs[name], self._shapes[name] = config, shape
        if shape in self._cells:
            self._waiting[name] = {path: numbers_of(cell) for path, cell in cells.items()}
        else:
            self._cells[shape], self._holder[shape] = cells, name
        self._mixed.clear()

    def cells_of(self, name: str) -> Cells:
        """The adapter's cells with its numbers in them."""
        if name not in self.configs:
            raise LoraMsError(f"no adapter {name!r}; there are: {', '.join(self.configs) or 'none'}")
        shape = self._shapes[name]
        cells, holder = self._cells[shape], self._holder.get(shape)
        if holder != name:
            if holder is not None:
                self._waiting[holder] = {path: numbers_of(cell) for path, cell in cells.items()}
            for path, numbers in self._waiting.pop(name).items():
                put(cells[path], numbers)
            self._holder[shape] = name
        return cells

    def use(self, name: str) -> None:
        """Puts the adapter ``name`` to work: no base weight moves, and equal shapes compile nothing."""
        cells = self.cells_of(name)
        self.stand(self._shapes[name], cells)
        self.active, self.merged = name, False

    def remove(self, name: str) -> None:
        """Forgets the adapter ``name``; the first of the others is at work then."""
        self.cells_of(name)  # so that the cells hold its numbers and those of others wait
        shape = self._shapes.pop(name)
        del self.configs[name], self._holder[shape]
        self._mixed.clear()
        if shape not in self._shapes.values():
            self.bare()
            del self._cells[shape]
        if self.active == name:
            self.bare()
            self.active = next(iter(self.configs), None)
            if self.active is not None:
                self.use(self.active)

    def merge(self, safe_merge: bool = False) -> None:
        """Lets plain layers with merged weights stand in for the adapter; a second time changes nothing."""
        if self.active is not None and not self.merged:
            self.use(self.active)
            self.stand(("merged", object()), merged_cells(self.model, safe_merge))
            self.merged = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Without any adapter inside the block; as before after it."""
        standing, merged = self.standing, self.merged
        cells = {path: cell_at(self.model, path) for path in self.base}
        self.bare()
        try:
            yield
        finally:
            self.stand(standing, cells)
            self.merged = merged

    @contextmanager
    def mixed(self, names: Sequence[str]) -> Iterator[None]:
        """Inside the block row i of a batch uses the adapter ``names[i]``, or none where it is ``__base__``."""
        order = list(self.configs)
        unknown = sorted(set(names) - {*order, BASE})
        if unknown:
            raise LoraMsError(f"no adapter {', '.join(unknown)}; there are: {', '.join(order)}, {BASE}")
        rows = [None if name == BASE else order.index(name) for name in names]
        active, merged, values = self.active, self.merged, choice_values(rows, len(order))
        factors = self._factors(order)
        key = ("mixed", tuple(order), len(names))
        if key not in self._mixed:
            choice = Parameter(Tensor(values), name="choice", requires_grad=False)
            cells = {path: MixedLoRADense(self.base[path], found, choice) for path, found in factors.items()}
            self._mixed[key] = (object(), choice, cells)
        stamp, choice, cells = self._mixed[key]
        choice.set_data(Tensor(values))
        for path, found in factors.items():
            cells[path].fill(found)
        self.stand((key, stamp), cells)
        try:
            yield
        finally:
            if active is not None:
                self.use(active)
            if merged:
                self.merge()

    def _factors(self, order: Sequence[str]) -> dict[str, dict[int, Factors]]:
        factors: dict[str, dict[int, Factors]] = {}
        for index, name in enumerate(order):
            for path, cell in self.cells_of(name).items():
                factors.setdefault(path, {})[index] = factors_of(name, path, cell, self.configs[name])
        return factors


def apart(config: LoraConfig, cells: Cells) -> Adapter:
    """The adapter that ``cells`` hold, apart from any model; errors as in ``combine.Adapter``."""
    Adapter(config, {})  # kinds that have other tensors are refused first
    return Adapter(config, {path: factors_at(path, cell, config) for path, cell in cells.items()})


def together(model: nn.Cell, adapter: Adapter) -> Cells:
    """Cells of ``adapter`` for the bare ``model``, not yet in it."""
    where = {path: Place(len(a), scaling * len(a)) for path, (a, _, scaling) in adapter.tensors.items()}
    cells = build(model, adapter.config, where)
    for path, (a, b, scaling) in adapter.tensors.items():
        put(cells[path], Numbers(dict(zip(factor_names(path), (a, b), strict=True)), where[path].lora_alpha, scaling))
    return cells


def factors_of(name: str, path: str, cell: nn.Cell, config: LoraConfig) -> Factors:
    """A, B and scaling of one cell for a mixed batch.

    Raises:
        LoraMsError: a kind of adapter that rows of one batch cannot share.
    """
    plain = isinstance(cell, LoRADense) and not isinstance(cell, DoRADense)
    if not plain or path.endswith("lm_head") or cell.has_lora_bias or cell.trains_bias:
        raise LoraMsError(
            f"adapter {name!r} cannot share a batch with others: {path} is more than LoRA on a dense layer"
        )
    return factors_at(path, cell, config)


def factors_at(path: str, cell: nn.Cell, config: LoraConfig) -> Factors:
    """Copies of A, B and scaling of an adapter cell: ``scaling B A`` is its update of the untouched weight."""
    values = {factor: parameter.asnumpy().copy() for factor, parameter in cell.tensors().items()}
    scaling = float(cell.scaling.asnumpy())
    if isinstance(cell, AdaLoRADense):
        return Factors(values["lora_A"] * values["lora_E"], values["lora_B"], scaling)
    values = packed(path, cell, values, config)
    a, b = (values[factor] for factor in factor_names(path))
    return Factors(a, b, scaling)
