"""The model that a configuration asks for: its sizes, before any weight is read, and the model with its weights."""

from dataclasses import replace
from pathlib import Path

import mindspore as ms

from lora_ms.adapters.matching import ranges
from lora_ms.config import ModelSizes, RunConfig
from lora_ms.data.example import IGNORE_INDEX
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import is_tied, model_config
from lora_ms.models import hub
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.rope_settings import mindformers_rope
from lora_ms.nn.rope import rotation_of
from lora_ms.quant.int4_folder import GroupSettings
from lora_ms.quant.settings import Quantisation, read_quantisation, skipping_all_but
from lora_ms.reading import refuse_pickle
from lora_ms.runtime.choice import default_dtype
from lora_ms.runtime.device import Runtime
from lora_ms.text import size_text

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


def compute_dtype(config: RunConfig, runtime: Runtime) -> ms.Type:
    """Type of weights: the YAML's, else the device's default; float32 for bfloat16 where no operator reads it."""
    asked = config.model.sizes.compute_dtype or default_dtype(runtime.device)
    if asked == "bfloat16" and not runtime.operators.reads_bfloat16:
        if runtime.is_main:
            print("compute_dtype bfloat16 needs a C++ compiler on the CPU: the weights are float32")
        asked = "float32"
    return {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}[asked]


def decoder_config(sizes: ModelSizes) -> DecoderConfig:
    """Sizes of a model that has no config.json, by MindFormers' conventions.

    Raises:
        LoraMsError: sizes that have no default are missing; all are listed.
    """
    hidden, layers, heads, vocab = sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.vocab_size
    if hidden is None or layers is None or heads is None or vocab is None:
        needed = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "vocab_size": vocab}
        missing = [f"model.model_config.{name}" for name, value in needed.items() if value is None]
        raise LoraMsError(f"without a Hugging Face directory in load_checkpoint these are needed: {', '.join(missing)}")
    qwen3 = sizes.type == "Qwen3Config"
    longest = sizes.max_position_embedding or sizes.seq_length or 2048
    theta, scaling = mindformers_rope(sizes.theta, sizes.extend_method, sizes.scaling_factor, longest)
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
        rope_theta=theta or 10000.0,
        rope_scaling=scaling,
        max_position_embeddings=longest,
        attention_bias=bool(sizes.qkv_has_bias) or sizes.type == "Qwen2Config",
        qk_norm=qwen3,
        tie_word_embeddings=bool(sizes.tie_word_embeddings),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def _llama_width(sizes: ModelSizes, hidden_size: int) -> int:
    # Llama's own rule: two thirds of four times the hidden size, perhaps widened, rounded up
    width = int(8 * hidden_size / 3)
    if sizes.ffn_dim_multiplier is not None:
        width = int(sizes.ffn_dim_multiplier * width)
    unit = sizes.multiple_of or 256
    return -(-width // unit) * unit


def check_sizes(sizes: ModelSizes, found: DecoderConfig, where: Path) -> None:
    """Raises LoraMsError where the YAML gives sizes other than config.json's; all are listed with both values."""
    longest = found.max_position_embeddings
    theta, scaling = mindformers_rope(sizes.theta, sizes.extend_method, sizes.scaling_factor, longest)
    given = {**sizes.model_dump(), "theta": theta}
    faults = [
        f"{key}: {given[key]} in the YAML, {getattr(found, name)} in config.json"
        for key, name in SIZES.items()
        if given[key] is not None and given[key] != getattr(found, name)
    ]
    here, there = (
        rotation_of(found.head_dim, found.rope_theta, each, longest) for each in (scaling, found.rope_scaling)
    )
    if scaling is not None and not here.equals(there):  # one may leave out what the other spells out
        faults.append(f"extend_method: {scaling} in the YAML, {found.rope_scaling} in config.json")
    if faults:
        raise LoraMsError(
            f"{where}: the YAML's model_config describes another model: {'; '.join(faults)}; leave out what "
            "config.json says"
        )


def read_sizes(config: RunConfig) -> DecoderConfig:
    """The model's sizes, before any weight is read: from the Hugging Face directory, else from the YAML.

    Raises:
        LoraMsError: the checkpoint does not exist, is unsupported or contradicts the YAML.
    """
    sizes, path = config.model.sizes, Path(config.load_checkpoint)
    if sizes.ignore_token_id != IGNORE_INDEX:
        raise LoraMsError(f"ignore_token_id {sizes.ignore_token_id} is not supported: labels use {IGNORE_INDEX}")
    check_quantised(config)
    if not config.load_checkpoint:
        return decoder_config(sizes)
    if not path.exists():
        raise LoraMsError(f"load_checkpoint: {path} does not exist; give a Hugging Face directory or a .ckpt file")
    if path.is_dir():
        found, hf = hub.read_config(path)
        check_sizes(sizes, found, path)
        return replace(found, tie_word_embeddings=is_tied(path, hf))
    if path.suffix == ".gguf":
        raise LoraMsError(f"load_checkpoint: {path} is a GGUF: lora-ms convert {path} --output_dir DIR, and give DIR")
    refuse_pickle(path)
    if path.suffix not in (".ckpt", ".safetensors"):
        raise LoraMsError(f"load_checkpoint: {path} is neither a folder nor a .ckpt or .safetensors file")
    if (path.parent / "config.json").is_file() and sizes.hidden_size is None:
        raise LoraMsError(f"load_checkpoint: {path} is a file of a Hugging Face folder; give the folder, {path.parent}")
    return decoder_config(sizes)


def quantisation(config: RunConfig, layers: int) -> Quantisation | None:
    """What is quantised as the model is loaded: by ``quantization_config``, or the layers of ``layer_groups`` that have
    ``bits``.

    layers: the model's.
    """
    asked, pet = config.model.sizes.quantization_config, config.pet_config
    found = None if asked is None else read_quantisation(asked)
    groups = [] if pet is None else pet.layer_groups
    chosen = {layer for group in groups if group.bits is not None for layer in group.layers}
    if not chosen:
        return found
    found = found or Quantisation()
    return found._replace(skip=(*found.skip, *skipping_all_but(chosen, layers)))


def quantisation_of_run(config: RunConfig, layers: int) -> Quantisation | GroupSettings | None:
    """``quantisation``, or that of the folder where it is quantised already.

    Raises:
        LoraMsError: a folder in another kind of four bits.
    """
    path = Path(config.load_checkpoint)
    found = quantisation(config, layers)
    if found is not None or not config.load_checkpoint or not path.is_dir():
        return found
    return hub.stored_quantisation(path, model_config(path))


def check_quantised(config: RunConfig) -> None:
    """Raises LoraMsError where weights are to have four bits, and the run cannot be so."""
    path = Path(config.load_checkpoint)
    asked = quantisation(config, 0) is not None
    if asked and not path.is_dir():
        raise LoraMsError("quantization_config needs a Hugging Face directory as load_checkpoint")
    if asked and config.backend != "native":
        raise LoraMsError("quantization_config needs backend native: MindFormers' models are not quantised")
    trains_all = config.run_mode in ("finetune", "train") and config.pet_config is None
    if trains_all and quantisation_of_run(config, 0) is not None:
        raise LoraMsError("weights of four bits do not train: give pet_config, or a model whose weights are whole")


def four_bits_lines(model: CausalLM) -> list[str]:
    """A line with what of the weights has four bits, and what that takes; none where nothing has."""
    quantised = hub.quantised_layers(model)
    if not quantised:
        return []
    packed = {parameter for cell in quantised.values() for parameter in cell.weights()}
    taken = sum(parameter.nbytes for parameter in packed)
    whole = sum(p.nbytes for p in model.get_parameters() if p not in packed and not p.requires_grad)
    numbers = sum(cell.weight_size for cell in quantised.values())
    layers = ranges({int(name.split(".")[2]) for name in quantised})
    bits = 8 * taken / numbers
    text = f"in four bits: {numbers:,} numbers of layers {layers}, {size_text(taken)} ({bits:.2f} bits each)"
    return [f"{text}; whole: {size_text(whole)}"]


def build_model(config: RunConfig, sizes: DecoderConfig, dtype: ms.Type, runtime: Runtime) -> CausalLM:
    """The model with its weights, without adapter; with ``load_checkpoint: ''`` freshly initialised from ``seed``.

    Prints what the user should know of the folder.
    """
    model = _read_model(config, sizes, dtype, runtime)
    for line in model.notices if runtime.is_main else ():
        print(line)
    return model


def _read_model(config: RunConfig, sizes: DecoderConfig, dtype: ms.Type, runtime: Runtime) -> CausalLM:
    operators = runtime.operators
    path = Path(config.load_checkpoint)
    sizes = replace(sizes, flash_attention=config.model.sizes.use_flash_attention)
    if not config.load_checkpoint:
        return hub.new_model(sizes, dtype, config.seed, operators)
    if path.is_dir():
        return hub.load_directory(
            path,
            dtype,
            flash_attention=sizes.flash_attention,
            operators=operators,
            shard=runtime.shard,
            quantisation=quantisation(config, sizes.num_hidden_layers),
        )
    if config.model.sizes.qkv_concat:
        raise LoraMsError(
            f"{path}: qkv_concat is not supported; give the model's Hugging Face directory, or make one with "
            f"lora-ms convert --input {path} --output DIR --load_checkpoint DIR_WITH_CONFIG_JSON"
        )
    return hub.load_checkpoint(path, sizes, dtype, operators, runtime.shard)
