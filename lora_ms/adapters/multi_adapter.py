"""One batch with another adapter in each line: all live in the model, side by side, and each line chooses."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.adapters.combine import read_adapter
from lora_ms.adapters.inject import install, target_layers
from lora_ms.adapters.matching import ALL_LINEAR, leaf_of, matches
from lora_ms.adapters.methods.base import Pair
from lora_ms.adapters.peft_files import read_adapter_config
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding, Head
from lora_ms.nn.projection import projection_of
from lora_ms.ops import PORTABLE
from lora_ms.text import listed


class AdapterRows(nn.Cell):
    """``y = x W^T + b + x A^T B^T``, with A and B of the adapter that each line of a batch has chosen.

    Args:
        layer: the layer under the adapters.
        places: adapters that fit, the one at place 0 included, which is none.
        lora_rank: the largest rank of an adapter; a smaller one ends in zeros.
        choice: [lines] int32, shared by all layers: the place of each line's adapter.
    """

    def __init__(self, layer: nn.Cell, places: int, lora_rank: int, choice: Parameter):
        super().__init__(auto_prefix=False)
        self.base = projection_of(layer, PORTABLE)
        self.choice = choice
        self.lora_a = zeros((places, lora_rank, self.base.in_channels), "lora_a")
        self.lora_b = zeros((places, self.base.out_channels, lora_rank), "lora_b")
        self.product_t = ops.BatchMatMul(transpose_b=True)

    def fill(self, place: int, pair: Pair | None) -> None:
        """Takes the numbers of an adapter whose rank fits; None for none."""
        a, b = (parameter.asnumpy().copy() for parameter in (self.lora_a, self.lora_b))
        a[place], b[place] = 0.0, 0.0
        if pair is not None:
            a[place, : len(pair.a)] = pair.a
            b[place, :, : len(pair.a)] = pair.scaling * pair.b
        self.lora_a.set_data(Tensor(a))
        self.lora_b.set_data(Tensor(b))

    def construct(self, x: Tensor) -> Tensor:
        """x [t, in] -> [t, out]: tokens of all lines, as many of each; or of one, and then all have chosen the same."""
        lines = self.choice.shape[0]
        lines = lines if x.shape[0] % lines == 0 else 1
        places = self.choice[:lines]
        a = ops.gather(self.lora_a, places, 0).astype(x.dtype)  # [lines, rank, in]
        b = ops.gather(self.lora_b, places, 0).astype(x.dtype)  # [lines, out, rank]
        low = self.product_t(x.reshape((lines, -1, x.shape[1])), a)  # [lines, s, rank]
        update = self.product_t(low, b).reshape((x.shape[0], -1))
        return self.base.finish(self.base.multiply(x) + update)


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
        """Of an adapter; 0 for a name that is none, which stands for the model without one."""
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

    Raises:
        LoraMsError: ``target_modules`` matches no layer.
    """

    def __init__(self, model: nn.Cell, lines: int, adapters: int, lora_rank: int, target_modules: Any = ALL_LINEAR):
        super().__init__(lines)
        self.lora_rank = lora_rank
        layers = {name: layer for name, layer in target_layers(model).items() if type(layer) not in (Head, Embedding)}
        self.cells = {
            name: AdapterRows(layer, adapters + 1, lora_rank, self.parameter)
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
            LoraMsError: the name or all places are taken, no adapter there, more than LoRA, one made for another model,
                or one that does not fit ``lora_rank`` or the layers.
        """
        if name in self._loaded:
            raise LoraMsError(f"adapter name {name!r} is taken: give another, or unload that one first")
        pairs = self._read(Path(path))
        if not self._free:
            raise LoraMsError(f"adapter {name!r}: all {len(self._by_serial)} places are taken: unload another first")
        self._serial += 1
        loaded = _Loaded(self._free.pop(0), self._serial)
        for path_in_model, cell in self.cells.items():
            cell.fill(loaded.place, pairs.get(path_in_model))
        self._loaded[name] = self._by_serial[loaded.serial] = loaded

    def _read(self, path: Path) -> Mapping[str, Pair]:
        extra = read_adapter_config(path).not_a_pair()
        if extra:
            raise LoraMsError(
                f"{path}: an adapter with {'; '.join(extra)} cannot run beside others: only LoRA and rsLoRA can"
            )
        pairs = read_adapter(path).tensors
        faults = []
        for name, pair in pairs.items():
            cell = self.cells.get(name)
            if cell is None:
                faults.append(f"{name} is no layer that may have one")
            elif (pair.a.shape[1], len(pair.b)) != (cell.base.in_channels, cell.base.out_channels):
                sizes = f"{cell.base.in_channels} to {cell.base.out_channels}"
                faults.append(f"{name} maps {pair.a.shape[1]} to {len(pair.b)} numbers, and the model's {sizes}")
            elif len(pair.a) > self.lora_rank:
                faults.append(f"{name} has rank {len(pair.a)}, and there is room for {self.lora_rank}")
        if faults:
            raise LoraMsError(f"{path}: the adapter does not fit: {listed(faults)}")
        return pairs

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
