"""The adapter that a configuration asks for: checked, and put into the model, fresh or from a folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_ms.adapters.inject import adapted_layers, freeze, inject, select
from lora_ms.adapters.methods import METHODS
from lora_ms.adapters.methods.base import AdapterConfig, SeenRows
from lora_ms.adapters.peft_files import base_quantisation, read_adapter_config
from lora_ms.adapters.peft_format import load_adapter
from lora_ms.config import PetConfig, RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import quantised_layers
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.recipes import session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDS = ("lm_head", "model.embed_tokens")  # modules that are no part of a layer


def adapter_config(pet: PetConfig) -> AdapterConfig:
    """The settings of a fresh adapter; what depends on the length of the run is open until ``attach``.

    Raises:
        LoraMsError: values that exclude each other.
    """
    return METHODS[pet.pet_type].from_yaml(pet)


def leading_ids(config: RunConfig, sizes: DecoderConfig) -> range:
    """What ``CausalLM.leading_ids`` will be, before there is a model."""
    pet = config.pet_config
    count = 0
    if config.load_adapter:
        count = read_adapter_config(config.load_adapter).virtual_tokens
    elif pet is not None:
        count = adapter_config(pet).virtual_tokens
    return range(sizes.vocab_size, sizes.vocab_size + count)


def attach(
    config: RunConfig,
    model: CausalLM,
    total_steps: int,
    shard: Shard = WHOLE,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seen: SeenRows | None = None,
) -> AdapterConfig | None:
    """Puts the adapter that ``pet_config`` or ``load_adapter`` asks for into ``model``; None: all parameters train.

    Args:
        total_steps: optimiser steps of the run.
        shard: with which processes the model is shared.
        tokenizer: for texts that an adapter starts from.
        seen: what the model makes of the rows, for an adapter that starts from that; None: there are no rows.

    Raises:
        LoraMsError: they match nothing, or do not fit (``stored_adapter.check_adapter`` finds more, and sooner).
    """
    pet = config.pet_config
    if pet is None:
        return None
    wanted = adapter_config(pet)
    if config.load_adapter:
        wanted = load_stored(config.load_adapter, pet, model, shard)
    elif wanted.sees_rows:
        if seen is None:
            raise LoraMsError("the adapter starts from rows (init_lora_weights), which lora-ms finetune alone has")
        wanted, tensors = wanted.started(seen, select(model, wanted))
        inject(model, wanted, shard=shard)
        for name, cell in adapted_layers(model).items():
            cell.begin_with(tensors[name])
    else:
        inject(model, wanted.reading(tokenizer), shard=shard)
    freeze(model, pet.freeze_include, pet.freeze_exclude)
    return wanted.for_run(total_steps)


def load_stored(path: str, pet: PetConfig, model: CausalLM, shard: Shard) -> AdapterConfig:
    """Puts the adapter in ``path`` into ``model`` for further training; returns its settings.

    Raises:
        LoraMsError: it does not fit.
    """
    config = read_adapter_config(path).continued(pet, pet.model_fields_set)
    loaded, found = load_adapter(model, path, config, shard)
    for line in (*found.notes, *quantisation_notes(path, model)):
        print(line)
    return loaded


def quantisation_notes(path: str, model: CausalLM) -> list[str]:
    """A line where the adapter in ``path`` was trained on weights of four bits, and those of ``model`` are whole."""
    trained_on = base_quantisation(Path(path))
    if trained_on is None or quantised_layers(model):
        return []
    return [
        f"{path} was trained on weights of four bits, and these are whole: --quantize {trained_on.name()} is closer"
    ]


def check_training(config: RunConfig, adapter: AdapterConfig | None) -> None:
    """Raises LoraMsError where processes that share a model cannot train what is asked for.

    adapter: the new adapter; None where all parameters train.
    """
    if config.evaluation.prompts:
        session.check_alone(config, "evaluation.prompts")
    n = session.sharing(config)
    if n > 1 and adapter is None:
        raise LoraMsError(f"{session.MODEL_PARALLEL} {n} trains adapters only: give pet_config, or set it to 1")
    if n > 1 and adapter is not None:
        check_shared(config, adapter, training=True)


def check_parallel(config: RunConfig, sizes: DecoderConfig) -> None:
    """Raises LoraMsError where ``parallel_config`` is impossible with the model's sizes, or with ``load_adapter``."""
    session.check_sharing(config, sizes)
    if session.sharing(config) > 1 and config.load_adapter:
        check_shared(config, read_adapter_config(config.load_adapter), training=False)


def check_shared(config: RunConfig, adapter: AdapterConfig, training: bool) -> None:
    """Raises LoraMsError for what is not computed on layers that processes share, by pet_config's keys."""
    found = adapter.not_split(training)
    found += [f"{name} in target_modules" for name in ENDS if adapter.choose(name) is not None]
    if found:
        raise LoraMsError(
            f"{session.MODEL_PARALLEL} {session.sharing(config)} does not support {', '.join(found)}: leave it out, "
            "or set it to 1"
        )
