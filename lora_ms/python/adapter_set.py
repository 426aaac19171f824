"""Several adapters of one model by name, of which one is active: its cells are installed in the model."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mindspore import Tensor, nn

from lora_ms.adapters.combine import Adapter
from lora_ms.adapters.inject import build, cell_at, install
from lora_ms.adapters.matching import leaf_of
from lora_ms.adapters.merge import merged_cells
from lora_ms.adapters.methods.base import AdapterConfig, Pair, RowUpdate, no_pair
from lora_ms.adapters.methods.base_cells import AdapterCell, State
from lora_ms.adapters.multi_adapter import AdapterRows, FixedAdapters
from lora_ms.errors import LoraMsError

BASE = "__base__"  # in a mixed batch, as in PEFT: a row without an adapter
HEAD = "lm_head"  # whose weight the loss and the logits multiply themselves: no rows of it can differ
Cells = Mapping[str, AdapterCell]


@dataclass(frozen=True, eq=False)
class Installation:
    """Cells that stand in the model together, by path; a key for what was compiled with them, which goes with it."""

    cells: Mapping[str, Any]


def shape_of(cells: Cells) -> Hashable:
    """Equal for adapters that differ in their numbers alone, and so can share cells and compiled graphs."""
    return tuple((name, cell.shape_key()) for name, cell in sorted(cells.items()))


class AdapterSet:
    """The adapters of ``model``, a bare one at first, by name.

    The plain layers are kept: removing an adapter puts them back, exactly. Adapters of equal shapes share one set of
    cells, which holds the numbers of one of them; those of the others wait in ``_waiting``.

    Args:
        changed: called after other cells have been installed in the model.
    """

    def __init__(self, model: nn.Cell, changed: Callable[[], None]):
        self.model, self.changed = model, changed
        self.base: dict[str, nn.Cell] = {}
        self.configs: dict[str, AdapterConfig] = {}
        self.active: str | None = None
        self.bare = Installation({})
        self.installed = self.bare  # what is in the model
        self.merged = False
        self._shapes: dict[str, Hashable] = {}
        self._cells: dict[Hashable, Installation] = {}
        self._holder: dict[Hashable, str] = {}  # the adapter whose numbers the cells of a shape hold
        self._waiting: dict[str, dict[str, State]] = {}
        self._mixed: dict[Hashable, tuple[FixedAdapters, Installation]] = {}

    def install(self, wanted: Installation) -> None:
        """Puts its cells into the model, and plain layers everywhere else."""
        if self.installed is not wanted:
            install(self.model, {**self.base, **wanted.cells})
            self.installed = wanted
            self.changed()

    def uninstall(self) -> None:
        """Puts plain layers everywhere."""
        self.install(self.bare)
        self.merged = False

    def add(self, name: str, config: AdapterConfig, cells: Cells) -> None:
        """Adds ``cells``, built on the bare model, as the adapter ``name``; it is not yet active.

        Raises:
            LoraMsError: the name is taken, or no name.
        """
        if name in self.configs or name == BASE or not name:
            raise LoraMsError(f"adapter name {name!r} is taken: give another")
        self.uninstall()
        self.base |= {path: cell_at(self.model, path) for path in cells if path not in self.base}
        shape = shape_of(cells)
        self.configs[name], self._shapes[name] = config, shape
        if shape in self._cells:
            self._waiting[name] = {path: cell.state() for path, cell in cells.items()}
        else:
            self._cells[shape], self._holder[shape] = Installation(cells), name
        self._mixed.clear()

    def cells_of(self, name: str) -> Cells:
        """The adapter's cells with its numbers in them."""
        if name not in self.configs:
            raise LoraMsError(f"no adapter {name!r}; there are: {', '.join(self.configs) or 'none'}")
        shape = self._shapes[name]
        cells, holder = self._cells[shape].cells, self._holder.get(shape)
        if holder != name:
            if holder is not None:
                self._waiting[holder] = {path: cell.state() for path, cell in cells.items()}
            for path, state in self._waiting.pop(name).items():
                cells[path].load_state(state)
            self._holder[shape] = name
        return cells

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """Inside, ``cells_of`` may be asked for any adapter; then the cells hold the active one's numbers again."""
        try:
            yield
        finally:
            if self.active is not None:
                self.cells_of(self.active)

    def activate(self, name: str) -> None:
        """Makes ``name`` the active adapter: no base weight moves, and equal shapes compile nothing."""
        self.cells_of(name)
        self.install(self._cells[self._shapes[name]])
        self.active, self.merged = name, False

    def remove(self, name: str) -> None:
        """Removes the adapter ``name``; where it was active, the first of the others is then."""
        self.cells_of(name)  # so that the cells hold its numbers and those of others wait
        was_active = self.active == name
        if was_active:
            self.uninstall()
            self.active = next((other for other in self.configs if other != name), None)
        with self.swapping():
            shape = self._shapes.pop(name)
            del self.configs[name], self._holder[shape]
            self._mixed.clear()
            if shape not in self._shapes.values():
                del self._cells[shape]
        if was_active and self.active is not None:
            self.activate(self.active)

    def merge(self, safe_merge: bool = False) -> None:
        """Installs plain layers with merged weights in place of the adapter; a second time changes nothing."""
        if self.active is not None and not self.merged:
            self.activate(self.active)
            self.install(Installation(merged_cells(self.model, safe_merge)))
            self.merged = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block, the model without any adapter."""
        installed, merged = self.installed, self.merged
        self.uninstall()
        try:
            yield
        finally:
            self.install(installed)
            self.merged = merged

    @contextmanager
    def mixed(self, names: Sequence[str]) -> Iterator[FixedAdapters]:
        """Inside the block row i of a batch uses the adapter ``names[i]``, or none where it is ``__base__``.

        Gives all adapters, of which each row may choose another.
        """
        order = list(self.configs)
        unknown = sorted(set(names) - {*order, BASE})
        if unknown:
            raise LoraMsError(f"no adapter {', '.join(unknown)}; there are: {', '.join(order)}, {BASE}")
        installed = self.installed
        with self.swapping():
            pairs = self._pairs(order)
        key = ("mixed", tuple(order), len(names))
        if key not in self._mixed:
            there = FixedAdapters(order, len(names))
            ranks = {path: max(len(pair.a) for pair in found.values()) for path, found in pairs.items()}
            cells = {
                path: AdapterRows(self.base[path], len(order) + 1, rank, there.parameter)
                for path, rank in ranks.items()
            }
            self._mixed[key] = (there, Installation(cells))
        there, rows = self._mixed[key]
        for path, found in pairs.items():
            for name, pair in found.items():
                rows.cells[path].fill(there.place(name), RowUpdate(pair))
        there.choose([there.place(name) for name in names])
        self.install(rows)
        try:
            yield there
        finally:
            self.install(installed)

    def _pairs(self, order: Sequence[str]) -> dict[str, dict[str, Pair]]:
        """By path and name of the adapter; raises LoraMsError where one cannot share a batch with others."""
        pairs: dict[str, dict[str, Pair]] = {}
        for name in order:
            for path, cell in self.cells_of(name).items():
                pair = cell.pair()
                if pair is None or not cell.joins_batches or path.endswith(HEAD):
                    raise LoraMsError(
                        f"adapter {name!r} cannot share a batch with others: {path} is more than LoRA on a dense layer"
                    )
                pairs.setdefault(path, {})[name] = pair
        return pairs


def detached(config: AdapterConfig, cells: Cells) -> Adapter:
    """The adapter that ``cells`` hold, apart from any model; errors as in ``combine.Adapter``."""
    Adapter(config, {})  # kinds that have other tensors are refused first
    pairs = {path: cell.pair() for path, cell in cells.items()}
    return Adapter(config, {path: pair for path, pair in pairs.items() if pair is not None})


def padded(adapter: Adapter, lora_rank: int, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """The same adapter with ``lora_rank`` on every module of ``shapes``, [out, in]: A and B end in zeros, and are zeros
    where it has none. Its scaling is in B.

    Raises:
        LoraMsError: it has another module, or a larger rank.
    """
    for name, pair in adapter.tensors.items():
        if name not in shapes:
            raise LoraMsError(f"hot swap: {name} is none of the modules that were prepared: name it in target_modules")
        if len(pair.a) > lora_rank:
            raise LoraMsError(
                f"hot swap: rank {len(pair.a)} of {name} is above target_rank {lora_rank}: prepare a higher one"
            )
    pairs = {}
    for name, (outputs, inputs) in shapes.items():
        pair = adapter.tensors.get(name, no_pair(inputs, outputs))
        pairs[name] = Pair(*pair.padded(lora_rank), 1.0)
    targets = tuple(sorted({leaf_of(name) for name in shapes}))
    return Adapter(adapter.config.combined(lora_rank, targets), pairs)


def attached(model: nn.Cell, adapter: Adapter) -> Cells:
    """Cells of ``adapter`` for the bare ``model``, not yet in it."""
    config = adapter.config
    specs = {path: config.pair_spec(pair) for path, pair in adapter.tensors.items()}
    cells = build(model, config, specs)
    for path, pair in adapter.tensors.items():
        parameters = cells[path].tensors()
        for tensor, value in config.pair_tensors(path, pair).items():
            parameters[tensor].set_data(Tensor(value))
    return cells
