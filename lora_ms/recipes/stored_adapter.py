"""The adapter that is to train, held against the configuration and the model's sizes before any weight is read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.adapters.offline_merge import made_for_another, shape_faults
from lora_ms.adapters.peft_files import by_module, read_adapter_config, read_entries
from lora_ms.config import PetConfig, RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.recipes.adapter import adapter_config
from lora_ms.recipes.convert import shapes_of
from lora_ms.recipes.estimate import check_modules, saved_numbers
from lora_ms.runtime import memory_estimate


class StoredAdapter(NamedTuple):
    """What the files of an adapter say of it.

    specs: of the modules that it adapts, as its method has them. saved: the modules that it holds whole.
    """

    config: AdapterConfig
    specs: Mapping[str, Any]
    saved: frozenset[str]


def read_stored(path: Path, sizes: DecoderConfig) -> StoredAdapter:
    """Reads the headers of the adapter in ``path``.

    Raises:
        LoraMsError: there is none, or it was made for a model of other sizes.
    """
    config, entries = read_adapter_config(path), read_entries(path)
    modules = by_module(entries)
    specs = {name: config.spec(name) for name, tensors in modules.items() if config.adapts(tensors)}
    shapes = shapes_of(replace(sizes, tie_word_embeddings=False))
    faults = shape_faults(entries, shapes, config)
    if faults or not specs:
        raise LoraMsError(made_for_another(path, faults, config))
    return StoredAdapter(config, specs, frozenset(name for name, tensors in modules.items() if "weight" in tensors))


def check_adapter(config: RunConfig, sizes: DecoderConfig) -> None:
    """Raises LoraMsError where the adapter cannot train in a model of these sizes: a fresh one is on no module of it,
    or names what it has not; that of ``load_adapter`` is not there, another model's, or not as ``pet_config`` says."""
    if not config.load_adapter:
        if config.pet_config is not None:
            fresh = adapter_config(config.pet_config)
            check_modules(fresh, sizes)
            fresh.specs(memory_estimate.modules(sizes))
        return
    if config.pet_config is None:
        raise LoraMsError("load_adapter is given and pet_config is null: remove one of them")
    stored = read_stored(Path(config.load_adapter), sizes)
    try:
        faults = disagreements(config.pet_config, stored, sizes)
    except LoraMsError as problem:
        raise LoraMsError(f"load_adapter {config.load_adapter}: {problem}") from problem
    if faults:
        raise LoraMsError(f"load_adapter {config.load_adapter}: {'; '.join(faults)}")


def disagreements(pet: PetConfig, stored: StoredAdapter, sizes: DecoderConfig) -> list[str]:
    """Where the adapter is another than ``pet`` says, in keys that the user gave.

    Raises:
        LoraMsError: its training cannot go on as ``pet`` says, or ``pet`` names modules that the model has not.
    """
    wanted, given = adapter_config(pet), pet.model_fields_set
    layers = list(memory_estimate.modules(sizes))
    check_modules(wanted, sizes)
    stored.config.continued(pet, given)
    faults = []

    def compare(key: str, deciding: frozenset[str] | set[str], here: object, there: object, where: str = "") -> None:
        if here != there and not given.isdisjoint(deciding):
            faults.append(f"{key}{where}: {here} in pet_config, {there} in the adapter")

    compare("pet_type", {"pet_type"}, wanted.PET_TYPE, stored.config.PET_TYPE)
    free = given.isdisjoint(wanted.PLACING)  # the adapter alone says which modules it is on
    if free and wanted.virtual_tokens:  # which stand on no module
        chosen = stored.specs
    else:
        chosen = (replace(wanted, target_modules=tuple(stored.specs)) if free else wanted).specs(layers)
    both = [name for name in chosen if name in stored.specs]
    for field, deciding in wanted.SPEC_KEYS.items():
        here = {name: chosen[name]._asdict().get(field) for name in both}
        there = {name: stored.specs[name]._asdict().get(field) for name in both}
        odd = [name for name in both if here[name] != there[name]]
        if odd:
            where = "" if len(odd) == len(both) else f" of {odd[0]}"
            compare(field, deciding, here[odd[0]], there[odd[0]], where)
    options: dict[str, Any] = vars(stored.config)
    for key in wanted.AGREEING:
        compare(key, {key}, getattr(wanted, key), options.get(key))
    if not free and chosen.keys() != stored.specs.keys():
        faults.append(f"target_modules: {len(chosen)} modules by pet_config, {len(stored.specs)} in the adapter")
    compare("modules_to_save", {"modules_to_save"}, sorted(saved_numbers(wanted, sizes)), sorted(stored.saved))
    return faults
