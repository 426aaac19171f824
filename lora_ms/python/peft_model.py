"""A model with adapters in it, with PEFT's names for what can be done with them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from lora_ms import saving
from lora_ms.adapters.check import missing_modules
from lora_ms.adapters.combine import Adapter, combine
from lora_ms.adapters.inject import build, report, select, target_layers, weight_shape
from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.peft_files import ADAPTER_FILES
from lora_ms.adapters.peft_format import incomplete, read_adapter_config, read_cells, save_adapter
from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Generator
from lora_ms.infer.interrupt import interruptible
from lora_ms.nn.graph import Graph
from lora_ms.python.adapter_set import AdapterSet, Installation, attached, detached, padded
from lora_ms.recipes.download import local_folder
from lora_ms.recipes.outputs import base_quantization

DEFAULT = "default"


class Logits(Graph):
    """The model's logits as a graph of their own, compiled with the cells that are in the model then."""

    title = "the model"

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask)


class PeftModel:
    """A model with one or more named adapters, one of them active.

    Calling it returns the model's logits; ``model`` is the Cell into which the active adapter is installed.
    Graphs are compiled once per shape of adapter, and kept as long as an adapter has it.
    """

    def __init__(self, model: nn.Cell):
        self.model = model
        self.adapters = AdapterSet(model, model.cells_have_changed)
        self.graphs: WeakKeyDictionary[Installation, tuple[Logits, Generator]] = WeakKeyDictionary()
        self.hotswap: tuple[int, dict[str, tuple[int, int]]] | None = None  # rank, shapes of modules by path
        for parameter in model.get_parameters():
            parameter.requires_grad = False

    @classmethod
    def from_pretrained(cls, model: nn.Cell, path: str | os.PathLike, adapter_name: str = DEFAULT) -> "PeftModel":
        """The bare ``model`` with an adapter from directory ``path``, or from a hub by ``owner/name``.

        Raises:
            LoraMsError: no adapter there, an unsupported kind, or one made for another model.
        """
        peft = cls(model)
        peft.load_adapter(path, adapter_name)
        return peft

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The settings of all adapters, by name."""
        return self.adapters.configs

    @property
    def active_adapter(self) -> str | None:
        """The name of the active adapter; None if all are deleted."""
        return self.adapters.active

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The settings of the active adapter."""
        if self.adapters.active is None:
            raise LoraMsError("no adapter is active: load one")
        return self.adapters.configs[self.adapters.active]

    # logits and text

    @property
    def config(self):
        """The base model's sizes."""
        return self.model.config

    @property
    def device(self) -> str:
        """The device it computes on: CPU or Ascend."""
        return self.model.device

    def __repr__(self) -> str:
        names = ", ".join(f"{name}: {config!r}" for name, config in self.peft_config.items())
        return f"PeftModel({self.model!r}, active {self.active_adapter}; {names or 'no adapters'})"

    def _graphs(self) -> tuple[Logits, Generator]:
        key = self.adapters.installed
        if key not in self.graphs:
            self.graphs[key] = (Logits(self.model).set_train(False), Generator(self.model))
        return self.graphs[key]

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, adapter_names: Sequence[str] | None = None
    ) -> Tensor:
        """Logits [b, s, v] float32 of input_ids [b, s].

        adapter_names: one adapter for each row, ``__base__`` for none; None: the active adapter for all.
        """
        if adapter_names is None:
            self.model.set_train(False)
            ids, mask = (None if value is None else _int32(value) for value in (input_ids, attention_mask))
            with interruptible():
                return self._graphs()[0](ids, mask)
        self._check_rows(adapter_names, len(input_ids))
        with self.adapters.mixed(adapter_names):
            return self(input_ids, attention_mask)

    def generate(self, input_ids, *args, adapter_names: Sequence[str] | None = None, **kwargs) -> NDArray[np.int32]:
        """Like ``ModelForCausalLM.generate``; ``adapter_names`` as when the model is called."""
        if adapter_names is None:
            return self.model.generate(input_ids, *args, generator=self._graphs()[1], **kwargs)
        self._check_rows(adapter_names, len(input_ids))
        with self.adapters.mixed(adapter_names) as there:
            generator = self._graphs()[1].with_adapters(there, adapter_names)
            return self.model.generate(input_ids, *args, generator=generator, **kwargs)

    def _check_rows(self, adapter_names: Sequence[str], rows: int) -> None:
        if len(adapter_names) != rows:
            raise LoraMsError(f"adapter_names has {len(adapter_names)} names for {rows} rows")

    # the adapters

    def add_adapter(self, adapter_name: str, config: AdapterConfig) -> None:
        """Adds a fresh adapter; the first becomes active.

        Raises:
            LoraMsError: the name is taken, or ``config`` matches nothing.
        """
        with self.adapters.disabled():
            cells = build(self.model, config.reading(None), select(self.model, config))
        self._add(adapter_name, config, cells)

    def load_adapter(self, path: str | os.PathLike, adapter_name: str) -> None:
        """Adds an adapter from directory ``path``, or from a hub by ``owner/name``; the first becomes active.

        Raises:
            LoraMsError: as in ``from_pretrained``, or the name is taken.
        """
        folder = local_folder(path, "adapter")
        config = read_adapter_config(folder)
        with self.adapters.disabled():
            cells = read_cells(self.model, folder, config)
            missing = missing_modules(config, cells, target_layers(self.model))
        if missing:
            print(incomplete(folder, missing))
        self._add(adapter_name, config, cells)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Combines ``adapters`` with ``weights`` into a new adapter (see ``adapters.combine.combine``).

        Raises:
            LoraMsError: adapters or arguments that cannot be combined.
        """
        parts = self._detached(adapters)
        combined = combine(
            parts,
            weights,
            combination_type,
            density=density,
            rank=svd_rank,
            rng=seed,
            majority_sign_method=majority_sign_method,
        )
        self._add(adapter_name, combined.config, self._attached(combined))

    def prepare_for_hotswap(self, target_rank: int, target_modules: str | tuple[str, ...] = "all-linear") -> None:
        """Widens LoRA adapters, present and future, to one shape, so that switching between them compiles nothing.

        Adapters of any rank up to ``target_rank``, on any of ``target_modules``, then share one compiled graph: neither
        ``set_adapter`` nor the first use of an adapter that is loaded later compiles anything. A saved adapter has the
        wider shape, and computes the same.

        Raises:
            LoraMsError: an adapter of a larger rank, on other modules, or of another kind than LoRA and rsLoRA.
        """
        names = list(self.peft_config)
        there = dict(zip(names, self._detached(names), strict=True))
        with self.adapters.disabled():
            layers = target_layers(self.model)
            chosen = select(self.model, LoraConfig(target_rank, float(target_rank), target_modules=target_modules))
        shapes = {name: weight_shape(layers[name]) for name in chosen}
        wide = {name: padded(adapter, target_rank, shapes) for name, adapter in there.items()}  # all, or none
        active = self.adapters.active
        self.adapters.uninstall()
        self._release()
        self.hotswap = (target_rank, shapes)
        for name, adapter in wide.items():
            self._place(name, adapter.config, self._attached(adapter))
        if active is not None:
            self.set_adapter(active)

    def _add(self, name: str, config: AdapterConfig, cells: Mapping[str, nn.Cell]) -> None:
        if self.hotswap is not None:
            wide = padded(detached(config, cells), *self.hotswap)
            config, cells = wide.config, self._attached(wide)
        self._place(name, config, cells)

    def _detached(self, names: Sequence[str]) -> list[Adapter]:
        with self.adapters.swapping():
            return [detached(self.peft_config[name], self.adapters.cells_of(name)) for name in names]

    def _attached(self, adapter: Adapter) -> Mapping[str, nn.Cell]:
        with self.adapters.disabled():
            return attached(self.model, adapter)

    def _place(self, name: str, config: AdapterConfig, cells: Mapping[str, nn.Cell]) -> None:
        active = self.adapters.active
        self.adapters.add(name, config, cells)
        self.adapters.activate(name if active is None else active)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes another adapter active. Switching between adapters of equal shapes compiles nothing."""
        self.adapters.activate(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was active, the first of the others becomes active."""
        self.adapters.remove(adapter_name)

    def disable_adapter(self):
        """A context in which the model is the base model, to the last bit."""
        return self.adapters.disabled()

    def merge_adapter(self, safe_merge: bool = False) -> None:
        """Replaces the active adapter by merged weights; ``unmerge_adapter`` restores it exactly.

        safe_merge: refuse merged weights that are not finite, and leave the model as it was.
        """
        self.adapters.merge(safe_merge)

    def unmerge_adapter(self) -> None:
        """Undoes ``merge_adapter``."""
        if self.adapters.active is not None:
            self.adapters.activate(self.adapters.active)

    def merge_and_unload(self, safe_merge: bool = False) -> nn.Cell:
        """The model with the adapter merged into its weights; this wrapper then has no adapter."""
        self.adapters.merge(safe_merge)
        return self._release()

    def unload(self) -> nn.Cell:
        """The base model without any adapter; this wrapper then has no adapter."""
        self.adapters.uninstall()
        return self._release()

    def _release(self) -> nn.Cell:
        model = self.model
        self.adapters = AdapterSet(model, model.cells_have_changed)
        return model

    # files and figures

    def print_trainable_parameters(self) -> None:
        """Prints the number of modules, trainable and total parameters, and the percentage."""
        config = None if self.active_adapter is None else self.active_peft_config
        print(report(self.model, config).line())

    def save_pretrained(self, path: str | os.PathLike, selected_adapters: Sequence[str] | None = None) -> None:
        """Writes the active adapter in PEFT's format.

        selected_adapters: write these instead, each into a sub-folder with its name; ``default`` goes into ``path``.
        """
        active = self.adapters.active
        if active is None:
            raise LoraMsError("no adapter is active: nothing to save")
        for name in selected_adapters or (active,):
            self.adapters.activate(name)
            folder = Path(path) if selected_adapters is None or name == DEFAULT else Path(path) / name
            with saving.new_folder(folder, replaced=ADAPTER_FILES) as part:
                quantization = base_quantization(self.model)
                config = self.peft_config[name]
                save_adapter(self.model, part, config, self.model.source, base_quantization=quantization)
        self.adapters.activate(active)


def _int32(values) -> Tensor:
    return values if isinstance(values, Tensor) else Tensor(np.asarray(values, np.int32))


def get_peft_model(model: nn.Cell, config: AdapterConfig, adapter_name: str = DEFAULT) -> PeftModel:
    """The bare ``model`` with a fresh adapter; the model's own parameters are frozen.

    Raises:
        LoraMsError: ``config.target_modules`` matches nothing, or lists a name that no module has; what could match
            is listed.
    """
    peft = PeftModel(model)
    peft.add_adapter(adapter_name, config)
    return peft
