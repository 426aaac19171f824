"""One batch with another adapter in each line: all live in the model, side by side, and each line chooses."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.adapters.combine import read_rows
from lora_ms.adapters.inject import install, target_layers
from lora_ms.adapters.matching import ALL_LINEAR, leaf_of, matches
from lora_ms.adapters.methods.base import RowUpdate, no_pair
from lora_ms.adapters.methods.lowrank import merged_weight, row_norms
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding, Head
from lora_ms.nn.linear import LinearLayer, Operands
from lora_ms.nn.projection import projection_of
from lora_ms.ops import PORTABLE
from lora_ms.text import listed


class AdapterRows(nn.Cell, LinearLayer):
    """``y = scale (x W^T + x A^T B^T) + b + shift``; A, B, scale and shift are those of each line's chosen adapter.

    Args:
        layer: the layer under the adapters.
        places: adapters that fit, the one at place 0 included, which is none.
        lora_rank: the largest rank of an adapter; a smaller one ends in zeros.
        choice: [lines] int32, shared by all layers: the place of each line's adapter.
        more: whether an adapter may be more than A and B: scale for DoRA, and shift for biases. Without, there are
            neither.
    """

    def __init__(self, layer: nn.Cell, places: int, lora_rank: int, choice: Parameter, more: bool = False):
        super().__init__(auto_prefix=False)
        self.base = projection_of(layer, PORTABLE)
        self.choice = choice
        self.more = more
        outputs = self.base.out_channels
        self.lora_a = zeros((places, lora_rank, self.base.in_channels), "lora_a")
        self.lora_b = zeros((places, lora_rank, outputs), "lora_b")  # transposed: tokens add up its rows
        if more:
            self.scale_less_one = zeros((places, outputs), "scale_less_one")
            self.shift = zeros((places, outputs), "shift")
        self.row_updates = self.base.operators.row_updates()
        self.write = ops.ScatterUpdate()

    def fill(self, place: int, update: RowUpdate) -> None:
        """Takes the numbers of an adapter that ``fits``; nothing else is written."""
        _, rank, inputs = self.lora_a.shape
        pair = update.pair or no_pair(inputs, self.base.out_channels)
        a, b = pair.padded(rank)
        numbers = {self.lora_a: a, self.lora_b: b.T}
        if self.more:
            numbers |= {self.scale_less_one: self._scale(update) - 1, self.shift: self._shift(update)}
        for parameter, value in numbers.items():
            self.write(parameter, Tensor(np.array([place], np.int32)), Tensor(value[None].astype(np.float32)))
            parameter.asnumpy()  # waits until it is written: ``Operators.cached_layers`` reads it where it lies

    def faults(self, update: RowUpdate) -> list[str]:
        """Why ``update`` does not fit the layer, and this cell."""
        inputs, outputs = self.base.in_channels, self.base.out_channels
        found = []
        if update.pair is not None:
            a, b, _ = update.pair
            if (a.shape[1], len(b)) != (inputs, outputs):
                found.append(f"maps {a.shape[1]} to {len(b)} numbers, and the model's {inputs} to {outputs}")
            elif len(a) > self.lora_a.shape[1]:
                found.append(f"has rank {len(a)}, and there is room for {self.lora_a.shape[1]}")
        for name in ("magnitude", "bias", "added_bias"):
            value = getattr(update, name)
            if value is not None and value.shape != (outputs,):
                found.append(f"has a {name} of shape {list(value.shape)}, and the model [{outputs}]")
            elif value is not None and not self.more:
                found.append(f"has a {name}, for which there is no room here")
        return found

    def _scale(self, update: RowUpdate) -> NDArray:
        if update.magnitude is None or update.pair is None:
            return np.ones(self.base.out_channels, np.float32)
        a, b, scaling = update.pair
        return update.magnitude / row_norms(merged_weight(self.base.numbers(), a, b, scaling))

    def _shift(self, update: RowUpdate) -> NDArray:
        shift = np.zeros(self.base.out_channels, np.float32)
        if update.bias is not None:
            shift += update.bias
            if self.base.has_bias:
                shift -= self.base.bias.asnumpy().astype(np.float32)
        return shift if update.added_bias is None else shift + update.added_bias

    def operands(self) -> Operands | None:
        found = self.base.operands()
        if found is None or self.more:
            return None
        return found.updated("of lines", self.lora_a, self.lora_b, self.choice)

    def construct(self, x: Tensor) -> Tensor:
        """x [t, in] -> [t, out]: tokens of all lines, as many of each; or of one, and then all have chosen the same."""
        lines = self.choice.shape[0]
        lines = lines if x.shape[0] % lines == 0 else 1
        places = self.choice[:lines]
        y = self.row_updates(self.base.multiply(x), x, self.lora_a, self.lora_b, places)
        if self.more:
            of_tokens = ops.tile(places.reshape((-1, 1)), (1, x.shape[0] // lines)).reshape((-1,))  # [t]
            y = y + y * ops.gather(self.scale_less_one, of_tokens, 0).astype(x.dtype)
            y = y + ops.gather(self.shift, of_tokens, 0).astype(x.dtype)
        return self.base.finish(y)


def zeros(shape: tuple[int, ...], name: str) -> Parameter:
    """A frozen parameter of zeros, whose memory the system hands out when it is first written."""
    parameter = Parameter(Tensor(np.zeros(1, np.float32)), name, requires_grad=False)
    parameter.assign_value(Tensor.from_numpy(np.zeros(shape, np.float32)))
    return parameter


class LineChoice:
    """Which of the adapters that live in a model each line of a batch uses, by their places.

    Attributes:
        parameter: the places [lines] int32, which ``AdapterRows`` read.
    """

    def __init__(self, lines: int):
        self.places = np.zeros(lines, np.int32)
        self.parameter = Parameter(Tensor(self.places), name="choice", requires_grad=False)

    def choose(self, places: Sequence[int]) -> None:
        """From now on, each line of a batch uses the adapter at its place; one place is for all lines."""
        chosen = np.broadcast_to(np.array(places, np.int32), self.places.shape)
        if not np.array_equal(chosen, self.places):
            self.places = chosen.copy()
            self.parameter.set_data(Tensor(self.places))


class FixedAdapters(LineChoice):
    """Adapters that stay in a model, at places from 1 on in the order of ``names``."""

    def __init__(self, names: Sequence[str], lines: int):
        super().__init__(lines)
        self.names = list(names)

    def place(self, name: str) -> int:
        """The place of an adapter; 0 for a name of none, which stands for the model without an adapter."""
        return self.names.index(name) + 1 if name in self.names else 0

    def acquire(self, name: str) -> tuple[int, int]:
        """See ``AdapterPool``; here nothing ever leaves its place."""
        return self.place(name), 0

    def release(self, lease: tuple[int, int]) -> None:
        """The reverse of ``acquire``."""


@dataclass
class _Loaded:
    """An adapter at a place."""

    place: int
    serial: int  # no other adapter has it
    users: int = 0  # requests that have acquired it


class AdapterPool(LineChoice):
    """Adapters that live in ``model``, a bare one, all at once: each line of a batch uses another, or none.

    To load and to unload compiles nothing. An adapter that is unloaded while requests use it keeps its place until they
    have released it.

    Args:
        lines: of a batch.
        adapters: the most that are there at once.
        lora_rank: the largest rank that fits.
        target_modules: which layers may have adapters (see ``AdapterConfig``); the head and the embedding may not.
        more: whether DoRA and biases fit, too.

    Raises:
        LoraMsError: ``target_modules`` matches no layer.
    """

    def __init__(
        self,
        model: nn.Cell,
        lines: int,
        adapters: int,
        lora_rank: int,
        target_modules: Any = ALL_LINEAR,
        more: bool = False,
    ):
        super().__init__(lines)
        layers = {name: layer for name, layer in target_layers(model).items() if type(layer) not in (Head, Embedding)}
        self.cells = {
            name: AdapterRows(layer, adapters + 1, lora_rank, self.parameter, more)
            for name, layer in layers.items()
            if matches(name, target_modules)
        }
        if not self.cells:
            leaves = ", ".join(sorted({leaf_of(name) for name in layers}))
            raise LoraMsError(
                f"target_modules {target_modules} matches no layer; could match: {leaves}, or {ALL_LINEAR}"
            )
        self._loaded: dict[str, _Loaded] = {}
        self._free = list(range(1, adapters + 1))
        self._by_serial: dict[int, _Loaded] = {}
        self._serial = 0
        install(model, self.cells)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that may be acquired, in the order in which they were loaded."""
        return tuple(self._loaded)

    def load(self, name: str, path: str | os.PathLike) -> None:
        """Adds the adapter of directory ``path``.

        Raises:
            LoraMsError: the name or all places are taken, no adapter there, one of another kind or made for another
                model, or one that does not fit ``lora_rank`` or the layers.
        """
        if name in self._loaded:
            raise LoraMsError(f"adapter name {name!r} is taken: give another, or unload that one first")
        updates = self._read(Path(path))
        if not self._free:
            raise LoraMsError(f"adapter {name!r}: all {len(self._by_serial)} places are taken: unload another first")
        self._serial += 1
        loaded = _Loaded(self._free.pop(0), self._serial)
        for path_in_model, cell in self.cells.items():
            cell.fill(loaded.place, updates.get(path_in_model, RowUpdate()))
        self._loaded[name] = self._by_serial[loaded.serial] = loaded

    def _read(self, path: Path) -> Mapping[str, RowUpdate]:
        updates = read_rows(path)
        faults = []
        for name, update in updates.items():
            if name in self.cells:
                faults += [f"{name} {fault}" for fault in self.cells[name].faults(update)]
            else:
                faults.append(f"{name} is no layer that may have one")
        if faults:
            raise LoraMsError(f"{path}: the adapter does not fit: {listed(faults)}")
        return updates

    def unload(self, name: str) -> None:
        """Removes an adapter; requests that have acquired it go on.

        Raises:
            LoraMsError: no such adapter.
        """
        self._find(name)
        self._free_unused(self._loaded.pop(name))

    def acquire(self, name: str) -> tuple[int, int]:
        """The adapter's place and serial number; it stays there until it is released as often as it was acquired.

        Raises:
            LoraMsError: no such adapter.
        """
        loaded = self._find(name)
        loaded.users += 1
        return loaded.place, loaded.serial

    def release(self, lease: tuple[int, int]) -> None:
        """The reverse of ``acquire``."""
        loaded = self._by_serial[lease[1]]
        loaded.users -= 1
        self._free_unused(loaded)

    def _find(self, name: str) -> _Loaded:
        if name not in self._loaded:
            raise LoraMsError(f"no adapter {name!r}; there are: {', '.join(self._loaded) or 'none'}")
        return self._loaded[name]

    def _free_unused(self, loaded: _Loaded) -> None:
        """Frees the place of an adapter that was unloaded and is not used."""
        if not loaded.users and loaded not in self._loaded.values():
            del self._by_serial[loaded.serial]
            self._free.append(loaded.place)
