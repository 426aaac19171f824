"""What a run leaves under ``output_dir``, and how it writes and reads what it trains: an adapter, or all parameters."""

from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.adapters.peft_files import BASE_QUANTIZATION
from lora_ms.adapters.peft_format import adapter_tensors, restore_adapter, save_adapter, save_as_lora
from lora_ms.data.tokenizer import save_tokenizer
from lora_ms.models import hub
from lora_ms.models.decoder import CausalLM
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.quant.int4_folder import METHODS
from lora_ms.quant.settings import read_quantisation
from lora_ms.train.checkpoint import AS_LORA, REPLACED, Weights

DATA_REPORT = "data_report.json"  # what became of the rows
RUN_LOG = "run.log"  # what was printed


def earlier_outputs(output_dir: Path) -> list[str]:
    """Folders that an earlier run has left with what it trained."""
    return [name for name in REPLACED[1:] if (output_dir / name).is_dir()]


def adapter_line(output_dir: Path, folder: str) -> str:
    """Where the results of a run are, for the user; ``folder``: adapter or model."""
    return f"{folder}: {output_dir / folder}   loss plot: {output_dir / 'loss.png'}"


def base_quantization(model: CausalLM) -> dict[str, Any] | None:
    """transformers' ``quantization_config`` of a model that was loaded in four bits."""
    stored = model.hf_config.get("quantization_config")
    if stored is None or not hub.quantised_layers(model):
        return None
    if stored.get("quant_method") in METHODS:
        return None  # a folder of its own, which the adapter's settings name
    return read_quantisation(stored, strict=False).to_config()


def quantization_text(model: CausalLM) -> str | None:
    """How the weights are quantised that an adapter trains on, in a checkpoint; None where they are whole."""
    found = base_quantization(model)
    if found is None:
        return None
    settings = read_quantisation(found)
    return f"{settings.name()} without {', '.join(settings.skip)}" if settings.skip else settings.name()


def weights_of(
    model: CausalLM,
    adapter: AdapterConfig | None,
    tokenizer,
    hook: Any = None,
    shard: Shard = WHOLE,
) -> Weights:
    """How what was trained is written and read.

    Args:
        adapter: its settings; None where all parameters train.
        hook: the method's ``StepHook``, which decides the adapter's settings at the end; None for none.
        shard: with which processes the model is shared.
    """
    gathered: dict[str, NDArray] = {}  # the adapter's tensors, where processes share the model

    def collect() -> None:
        if adapter is not None and shard.count > 1:
            gathered.update(adapter_tensors(model, adapter, shard))

    def add_tokenizer(path: Path) -> None:
        if tokenizer is not None:
            save_tokenizer(tokenizer, path)

    def add_beside(path: Path) -> None:
        add_tokenizer(path)
        quantization = base_quantization(model)
        if quantization is not None:
            storage.write_json(path / BASE_QUANTIZATION, quantization)

    def save(path: Path, config: AdapterConfig | None) -> None:
        if config is None:
            hub.write_directory(model, path)
        else:
            save_adapter(
                model, path, config, model.source, gathered or None, base_quantization=base_quantization(model)
            )
        add_tokenizer(path)

    def read(path: Path) -> None:
        if adapter is None:
            hub.restore(model, path)
        else:
            restore_adapter(model, path, adapter, shard)

    def finish(path: Path) -> None:
        # a checkpoint holds what may yet come back; the end of the run does not
        config = hook.config()
        as_lora = path.with_name(saving.final_of(path).name + AS_LORA)
        save(path, config)
        line = hook.summary()
        if save_as_lora(model, as_lora, config, model.source, add_beside):
            line += f"; as plain LoRA in {as_lora}"
        print(line)

    return Weights(
        folder="model" if adapter is None else "adapter",
        write=partial(save, config=adapter),
        read=read,
        identity={} if adapter is None else {**adapter.identity(), "quantization": quantization_text(model)},
        finish=None if hook is None else finish,
        collect=collect,
    )
