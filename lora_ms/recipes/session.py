"""What several commands begin with: the runtime, the tokenizer and the model that a configuration asks for."""

import os
from dataclasses import replace
from pathlib import Path

import mindspore as ms

from lora_ms.adapters.peft_format import load_adapter
from lora_ms.config import ModelSizes, RunConfig
from lora_ms.data.example import IGNORE_INDEX
from lora_ms.errors import LoraMsError
from lora_ms.models import hub
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.ops import PORTABLE, Operators
from lora_ms.recipes import parallel
from lora_ms.runtime import device as runtime_module
from lora_ms.runtime.device import Runtime

# YAML key -> DecoderConfig's; where both a YAML and a config.json give one, they must agree
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "theta": "rope_theta",
    "qkv_has_bias": "attention_bias",
    "tie_word_embeddings": "tie_word_embeddings",
}


def start(config: RunConfig) -> Runtime:
    """The runtime of ``config``; prints what the user should know of it."""
    context = config.context
    runtime, notices = runtime_module.setup(
        context.device_target,
        context.device_id,
        seed=config.seed,
        use_parallel=config.use_parallel,
        max_device_memory=context.max_device_memory,
        graph_kernel=context.enable_graph_kernel,
        model_parallel=config.parallel_config.model_parallel,
        cpu_operators=context.cpu_operators,
        plain_operators=context.low_memory,
    )
    notices += parallel.notices(config, runtime)
    if runtime.is_main:
        for line in (*config.notices(), *notices):
            print(line)
    return runtime


def compute_dtype(config: RunConfig, runtime: Runtime) -> ms.Type:
    """Type of weights and activations: the YAML's, else float32 on the CPU and float16 on Ascend."""
    default = "float32" if runtime.device == "CPU" else "float16"
    asked = config.model.sizes.compute_dtype or default
    if asked == "bfloat16":
        if runtime.is_main:
            print(f"compute_dtype bfloat16 is not supported yet: computing in {default}")
        asked = default
    return {"float32": ms.float32, "float16": ms.float16}[asked]


def decoder_config(sizes: ModelSizes) -> DecoderConfig:
    """Sizes of a model that has no config.json, by MindFormers' conventions.

    Raises:
        LoraMsError: sizes that nothing can stand in for are missing; all are listed.
    """
    hidden, layers, heads, vocab = sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.vocab_size
    if hidden is None or layers is None or heads is None or vocab is None:
        needed = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "vocab_size": vocab}
        missing = [f"model.model_config.{name}" for name, value in needed.items() if value is None]
        raise LoraMsError(f"without a Hugging Face directory in load_checkpoint these are needed: {', '.join(missing)}")
    qwen3 = sizes.type == "Qwen3Config"
    eos = sizes.eos_token_id
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=sizes.intermediate_size or _llama_width(sizes, hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=sizes.n_kv_heads or heads,
        head_dim=sizes.head_dim or (128 if qwen3 else hidden // heads),
        rms_norm_eps=sizes.rms_norm_eps or 1e-5,
        rope_theta=sizes.theta or 10000.0,
        rope_scaling=rope_scaling_of(sizes),
        max_position_embeddings=sizes.max_position_embedding or sizes.seq_length or 2048,
        attention_bias=bool(sizes.qkv_has_bias) or sizes.type == "Qwen2Config",
        qk_norm=qwen3,
        tie_word_embeddings=bool(sizes.tie_word_embeddings),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def rope_scaling_of(sizes: ModelSizes) -> dict | None:
    """``extend_method`` and ``scaling_factor`` in config.json's words.

    Raises:
        LoraMsError: a method that is not computed here.
    """
    scaling = sizes.scaling_factor
    if sizes.extend_method not in ("None", "PI", "linear", "LLAMA3"):
        raise LoraMsError(f"extend_method {sizes.extend_method} is not supported; supported: PI, LLAMA3")
    if sizes.extend_method in ("PI", "linear"):
        return {"rope_type": "linear", "factor": scaling or 1.0}
    if sizes.extend_method == "LLAMA3":
        names = {"original_max_position_embedding": "original_max_position_embeddings"}
        given = scaling if isinstance(scaling, dict) else {}
        return {"rope_type": "llama3", **{names.get(k, k): v for k, v in given.items()}}
    return None


def _llama_width(sizes: ModelSizes, hidden_size: int) -> int:
    # Llama's own rule: two thirds of four times the hidden size, perhaps widened, rounded up
    width = int(8 * hidden_size / 3)
    if sizes.ffn_dim_multiplier is not None:
        width = int(sizes.ffn_dim_multiplier * width)
    unit = sizes.multiple_of or 256
    return -(-width // unit) * unit


def check_sizes(sizes: ModelSizes, found: DecoderConfig, where: Path) -> None:
    """Raises LoraMsError where the YAML gives sizes other than config.json's; all are listed with both values."""
    given = sizes.model_dump()
    faults = [
        f"{key}: {given[key]} in the YAML, {getattr(found, name)} in config.json"
        for key, name in SIZES.items()
        if given[key] is not None and given[key] != getattr(found, name)
    ]
    scaling = rope_scaling_of(sizes)
    if scaling is not None and scaling != found.rope_scaling:
        faults.append(f"extend_method: {scaling} in the YAML, {found.rope_scaling} in config.json")
    if faults:
        raise LoraMsError(f"{where}: the YAML's model_config describes another model: {'; '.join(faults)}")


def read_sizes(config: RunConfig) -> DecoderConfig:
    """The model's sizes, before any weight is read: from the Hugging Face directory, else from the YAML.

    Raises:
        LoraMsError: the checkpoint does not exist, is unsupported or contradicts the YAML.
    """
    sizes, path = config.model.sizes, Path(config.load_checkpoint)
    if sizes.ignore_token_id != IGNORE_INDEX:
        raise LoraMsError(f"ignore_token_id {sizes.ignore_token_id} is not supported: labels use {IGNORE_INDEX}")
    if not config.load_checkpoint:
        return decoder_config(sizes)
    if not path.exists():
        raise LoraMsError(f"load_checkpoint: {path} does not exist; give a Hugging Face directory or a .ckpt file")
    if path.is_dir():
        found, _ = hub.read_config(path)
        check_sizes(sizes, found, path)
        return found
    if path.suffix not in (".ckpt", ".safetensors"):
        raise LoraMsError(f"load_checkpoint: {path} is neither a folder nor a .ckpt or .safetensors file")
    if (path.parent / "config.json").is_file() and sizes.hidden_size is None:
        raise LoraMsError(f"load_checkpoint: {path} is a file of a Hugging Face folder; give the folder, {path.parent}")
    return decoder_config(sizes)


def build_model(
    config: RunConfig,
    sizes: DecoderConfig,
    dtype: ms.Type,
    operators: Operators = PORTABLE,
    shard: Shard = WHOLE,
) -> CausalLM:
    """The bare model with its weights; with ``load_checkpoint: ''`` freshly initialised from ``seed``."""
    path = Path(config.load_checkpoint)
    sizes = replace(sizes, flash_attention=config.model.sizes.use_flash_attention)
    if not config.load_checkpoint:
        return hub.new_model(sizes, dtype, config.seed, operators)
    if path.is_dir():
        return hub.load_directory(path, dtype, flash_attention=sizes.flash_attention, operators=operators, shard=shard)
    if config.model.sizes.qkv_concat:
        raise LoraMsError(
            f"{path}: qkv_concat is not supported; give the model's Hugging Face directory, or make one with "
            f"lora-ms convert --input {path} --output DIR --load_checkpoint DIR_WITH_CONFIG_JSON"
        )
    return hub.load_checkpoint(path, sizes, dtype, operators, shard)


def check_output(output_dir: Path) -> None:
    """Raises LoraMsError where ``output_dir`` can be neither made nor written, so that a run does not train for hours
    and then fail. Makes nothing."""
    place = output_dir.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise LoraMsError(f"output_dir {output_dir} cannot be written: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise LoraMsError(f"output_dir {output_dir} cannot be written: no permission to write in {place}")


def model_for_use(config: RunConfig, runtime: Runtime) -> CausalLM:
    """A model to predict with, ``load_adapter`` swapped in."""
    sizes = read_sizes(config)
    if not config.load_checkpoint:
        raise LoraMsError("load_checkpoint is missing: give the Hugging Face directory of the model")
    model = build_model(config, sizes, compute_dtype(config, runtime), runtime.operators, runtime.shard)
    if config.load_adapter:
        load_adapter(model, config.load_adapter, shard=runtime.shard)
    return model.set_train(False)
