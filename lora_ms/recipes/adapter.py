"""The adapter that a configuration asks for: checked, put into the model, and loaded where it goes on from another."""

from dataclasses import replace
from typing import Any

from lora_ms.adapters import inject as injection
from lora_ms.adapters.config import AdaLoraConfig, LayerGroup, LoraConfig
from lora_ms.adapters.matching import place_of, places
from lora_ms.adapters.methods.adalora_ranks import RankAllocator, scheduled
from lora_ms.adapters.peft_format import adapted, load_adapter, read_adapter_config
from lora_ms.config import PetConfig, RunConfig
from lora_ms.config.model import LayerGroupKeys
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.nn.parallel import Shard
from lora_ms.recipes import session

# keys in which load_adapter and pet_config must agree where the user gave them; those of ranks, by the place they fill
AGREEING = ("use_rslora", "use_dora", "lora_bias", "bias")
RANKED = {
    "lora_rank": {"lora_rank", "init_rank", "rank_pattern", "layer_groups"},
    "lora_alpha": {"lora_alpha", "alpha_pattern", "layer_groups"},
}
PLACING = {
    "target_modules",
    "exclude_layers",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_groups",
}
ENDS = ("lm_head", "model.embed_tokens")  # modules that are no layers of a block


def adapter_config(pet: PetConfig) -> LoraConfig:
    """``pet_config`` as the adapters take it; AdaLoRA's schedule awaits the length of the run.

    Raises:
        LoraMsError: values that exclude each other.
    """
    targets, excluded = (
        names if isinstance(names, str) else tuple(names) for names in (pet.target_modules, pet.exclude_modules)
    )
    common: dict[str, Any] = {
        "lora_alpha": pet.lora_alpha,
        "lora_dropout": pet.lora_dropout,
        "target_modules": targets,
        "exclude_layers": tuple(pet.exclude_layers),
        "exclude_modules": excluded,
        "layers_to_transform": pet.layers_to_transform,
        "layers_pattern": tuple(pet.layers_pattern),
        "modules_to_save": tuple(pet.modules_to_save),
        "bias": pet.bias,
    }
    if pet.pet_type == "adalora":
        rank = pet.init_rank or pet.lora_rank
        return AdaLoraConfig(
            rank,
            **common,
            target_rank=pet.target_rank or max(1, rank // 2),
            tinit=pet.tinit or 0,
            tfinal=pet.tfinal or 0,
            delta_t=pet.delta_t,
            beta1=pet.beta1,
            beta2=pet.beta2,
            orth_reg_weight=pet.orth_reg_weight,
        )
    return LoraConfig(
        pet.lora_rank,
        **common,
        rank_pattern=pet.rank_pattern,
        alpha_pattern=pet.alpha_pattern,
        layer_groups=tuple(layer_group(group, pet) for group in pet.layer_groups),
        use_rslora=pet.use_rslora,
        use_dora=pet.use_dora,
        lora_bias=pet.lora_bias,
        init_lora_weights=pet.init_lora_weights,
    )


def layer_group(group: LayerGroupKeys, pet: PetConfig) -> LayerGroup:
    """One entry of ``pet_config.layer_groups``; without an alpha it keeps the adapter's alpha / rank."""
    alpha = pet.lora_alpha * group.lora_rank / pet.lora_rank if group.lora_alpha is None else group.lora_alpha
    targets = tuple(group.target_modules) if isinstance(group.target_modules, list) else group.target_modules
    return LayerGroup(tuple(group.layers), group.lora_rank, alpha, targets)


def attach(config: RunConfig, model: CausalLM, total_steps: int, shard: Shard) -> LoraConfig | None:
    """Swaps in what ``pet_config`` or ``load_adapter`` asks for; None where all parameters train.

    Raises:
        LoraMsError: the two disagree, or match nothing.
    """
    pet = config.pet_config
    if pet is None:
        if config.load_adapter:
            raise LoraMsError("load_adapter is given and pet_config is null: remove one of them")
        return None
    wanted = adapter_config(pet)
    if config.load_adapter:
        wanted = load_agreeing(config.load_adapter, pet, wanted, model, shard)
    else:
        injection.inject(model, wanted, shard=shard)
    injection.freeze(model, pet.freeze_include, pet.freeze_exclude)
    if isinstance(wanted, AdaLoraConfig) and not wanted.kept:
        return scheduled(wanted, total_steps, pet.tinit, pet.tfinal)
    return wanted


def scheduled_for(adapter: LoraConfig, total_steps: int) -> LoraConfig:
    """``adapter`` with the schedule of a run of ``total_steps``, where its method has one."""
    if isinstance(adapter, AdaLoraConfig) and not adapter.kept:
        return scheduled(adapter, total_steps, adapter.tinit or None, adapter.tfinal or None)
    return adapter


def load_agreeing(path: str, pet: PetConfig, wanted: LoraConfig, model: CausalLM, shard: Shard) -> LoraConfig:
    """Swaps the adapter in ``path`` in for further training; returns its settings.

    Raises:
        LoraMsError: it is another than ``pet_config`` says, in keys that the user gave; all are listed.
    """
    given, stored = pet.model_fields_set, read_adapter_config(path)
    layers, saved = list(injection.target_layers(model)), set(injection.saved_layers(model, wanted))
    dropout = wanted.lora_dropout if "lora_dropout" in given else stored.lora_dropout
    loaded, _ = load_adapter(model, path, dropout, shard)
    there = adapted(model)
    faults = []

    def compare(key: str, others: set[str], here: object, stored: object, where: str = "") -> None:
        if here != stored and not given.isdisjoint(others):
            faults.append(f"{key}{where}: {here} in pet_config, {stored} in the adapter")

    kinds = ["adalora" if isinstance(c, AdaLoraConfig) else "lora" for c in (wanted, stored)]
    compare("pet_type", {"pet_type"}, *kinds)
    free = given.isdisjoint(PLACING)  # where the adapter alone says which modules it stands on
    chosen = places(layers, replace(wanted, target_modules=tuple(there.places)) if free else wanted)
    for index, (key, others) in enumerate(RANKED.items()):
        both = [name for name in chosen if name in there.places]
        odd = [name for name in both if chosen[name][index] != there.places[name][index]]
        if odd:
            here, stored_value = chosen[odd[0]][index], there.places[odd[0]][index]
            compare(key, others, here, stored_value, "" if len(odd) == len(both) else f" of {odd[0]}")
    for key in AGREEING:
        compare(key, {key}, getattr(wanted, key), getattr(stored, key))
    if not free and chosen.keys() != there.places.keys():
        faults.append(f"target_modules: {len(chosen)} modules by pet_config, {len(there.places)} in the adapter")
    compare("modules_to_save", {"modules_to_save"}, sorted(saved), sorted(there.saved))
    if faults:
        raise LoraMsError(f"load_adapter {path}: {'; '.join(faults)}")
    return loaded


def step_hook(model: CausalLM, adapter: LoraConfig | None) -> RankAllocator | None:
    """What takes part in every training step of ``adapter``, which stands in ``model``; None for most."""
    return RankAllocator(model, adapter) if isinstance(adapter, AdaLoraConfig) else None


def check_training(config: RunConfig, adapter: LoraConfig | None) -> None:
    """Raises LoraMsError where processes that share a model cannot train what is asked for.

    adapter: the new adapter; None where all parameters train.
    """
    if config.evaluation.prompts:
        session.check_alone(config, "evaluation.prompts")
    n = session.sharing(config)
    if n > 1 and adapter is None:
        raise LoraMsError(f"{session.MODEL_PARALLEL} {n} trains adapters only: give pet_config, or set it to 1")
    if n > 1 and adapter is not None:
        check_shared(config, adapter, ("init_lora_weights",))


def check_parallel(config: RunConfig, sizes: DecoderConfig) -> None:
    """Raises LoraMsError where ``parallel_config`` is impossible with the model's sizes, or with ``load_adapter``."""
    session.check_sharing(config, sizes)
    if session.sharing(config) > 1 and config.load_adapter:
        check_shared(config, read_adapter_config(config.load_adapter), ())


def check_shared(config: RunConfig, adapter: LoraConfig, more: tuple[str, ...]) -> None:
    """Raises LoraMsError for what split layers do not support, by pet_config's keys; ``more``: further keys."""
    plain = LoraConfig()
    found = ["pet_type adalora"] if isinstance(adapter, AdaLoraConfig) else []
    for key in ("use_dora", "lora_bias", "bias", "modules_to_save", *more):
        found += [key] if getattr(adapter, key) != getattr(plain, key) else []
    found += [f"{name} in target_modules" for name in ENDS if place_of(name, adapter) is not None]
    if found:
        raise LoraMsError(
            f"{session.MODEL_PARALLEL} {session.sharing(config)} does not support {', '.join(found)}: leave it out, "
            "or set it to 1"
        )
