"""Models from and to Hugging Face directories and MindFormers checkpoints."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from numpy.typing import DTypeLike

from lora_ms import saving, storage
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import (
    CONFIG,
    EMBEDDING,
    GENERATION,
    HEAD,
    base_name,
    end_tokens,
    generation_config,
    model_config,
    open_model,
    untied_notice,
)
from lora_ms.models.decoder import CausalLM, DecoderConfig, weight_shapes
from lora_ms.models.llama import REQUIRED, llama_config
from lora_ms.models.mindformers_names import hugging_face_name
from lora_ms.models.mistral import mistral_config
from lora_ms.models.qwen import ATTENTION, qwen2_config, qwen3_config
from lora_ms.nn.parallel import WHOLE, Shard, split_axis
from lora_ms.ops import PORTABLE, Operators
from lora_ms.reading import opened, readable
from lora_ms.text import listed

FAMILIES = {
    "LlamaForCausalLM": llama_config,
    "MistralForCausalLM": mistral_config,
    "Qwen2ForCausalLM": qwen2_config,
    "Qwen3ForCausalLM": qwen3_config,
}
FREQUENCIES = "rotary_emb.inv_freq"  # end of names in old Llama files: numbers that are computed anew
NUMPY_DTYPES: dict[ms.Type, DTypeLike] = {
    ms.float32: np.float32,
    ms.float16: np.float16,
    ms.bfloat16: ms.dtype_to_nptype(ms.bfloat16),
}


def read_config(path: Path) -> tuple[DecoderConfig, dict]:
    """The decoder's sizes and the parsed config.json of a Hugging Face directory.

    An answer ends with an ``eos_token_id`` of config.json or of generation_config.json.
    """
    hf = model_config(path)
    names = hf.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise LoraMsError(f"{path}: architecture {names[0]} is not supported; supported: {', '.join(FAMILIES)}")
    missing = [key for key in REQUIRED if hf.get(key) is None]
    if missing:
        raise LoraMsError(f"{path / CONFIG}: {missing[0]!r} is missing")
    with readable(path / CONFIG, "the sizes of a model"):
        config = FAMILIES[names[0]](hf)
    ends = end_tokens(generation_config(path), str(path / GENERATION))
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ends)))), hf


def check_names(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str) -> None:
    """Raises one LoraMsError that counts the tensors that are missing, surplus or of another shape, and lists some."""
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"surplus {name} {shape}" for name, shape in found.items() if name not in expected]
    faults += [
        f"{name} is {found[name]}, should be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise LoraMsError(f"{where}: {len(faults)} tensors do not fit the model: {listed(faults)}")


def check_dtype(dtype: ms.Type, operators: Operators) -> None:
    """Raises LoraMsError where weights cannot have ``dtype`` with these operators."""
    if dtype not in NUMPY_DTYPES:
        raise LoraMsError(f"type {dtype} is not supported for weights; supported: float32, float16, bfloat16")
    if dtype == ms.bfloat16 and not operators.reads_bfloat16:
        raise LoraMsError(
            "weights in bfloat16 need a C++ compiler on the CPU, as MindSpore has no operators for them there: install "
            "g++ or clang++, or choose float32"
        )


def load_directory(
    path: str | os.PathLike,
    ms_dtype: ms.Type = ms.float32,
    model_class: type[CausalLM] = CausalLM,
    flash_attention: bool = True,
    operators: Operators = PORTABLE,
    shard: Shard = WHOLE,
) -> CausalLM:
    """The model of a Hugging Face directory, its weights converted one at a time to ``ms_dtype``.

    operators: what it computes with, ``runtime.device.setup``'s.
    shard: with which ranks the model is shared; each reads its own part.
    """
    check_dtype(ms_dtype, operators)
    path = Path(path)
    config, hf = read_config(path)
    folder = open_model(path, hf)
    config = replace(config, tie_word_embeddings=folder.tied)
    entries = {name: entry for name, entry in folder.entries.items() if not name.endswith(FREQUENCIES)}
    check_names(weight_shapes(config), {n: e.shape for n, e in entries.items()}, str(path))
    model = model_class(replace(config, flash_attention=flash_attention), ms_dtype, operators, shard)
    for name, parameter in model.parameters_and_names():
        parameter.name = name
        entry = entries[name]
        if shard.count > 1 and split_axis(name) is not None:
            value = storage.read_part(entry, shard.slices(name, entry.shape), NUMPY_DTYPES[parameter.dtype])
        else:
            value = storage.read(entry, NUMPY_DTYPES[parameter.dtype])
        parameter.set_data(Tensor.from_numpy(value))
    model.source = base_name(path)
    model.hf_config = hf
    if folder.tied != hf.get("tie_word_embeddings", False):
        model.hf_config = {**hf, "tie_word_embeddings": folder.tied}
    model.generation_config = generation_config(path)
    model.notices = folder.notices
    return model


def load_checkpoint(
    path: Path,
    config: DecoderConfig,
    ms_dtype: ms.Type = ms.float32,
    operators: Operators = PORTABLE,
    shard: Shard = WHOLE,
) -> CausalLM:
    """The model of a MindSpore ``.ckpt`` or ``.safetensors`` file with MindFormers' names."""
    form = "safetensors" if path.suffix == ".safetensors" else "ckpt"
    if form == "safetensors":
        storage.read_header(path)  # refuses what contradicts itself
    with opened(path), readable(path, "a checkpoint"):
        stored = ms.load_checkpoint(str(path), format=form)
    weights = {hugging_face_name(name): value for name, value in stored.items()}
    weights = {name: value for name, value in weights.items() if not name.endswith(FREQUENCIES)}
    notices: tuple[str, ...] = ()
    if config.tie_word_embeddings and HEAD in weights:
        head = weights[HEAD]
        shared = weights.setdefault(EMBEDDING, head)
        if shared is head or np.array_equal(head.asnumpy(), shared.asnumpy()):
            del weights[HEAD]
        else:
            config = replace(config, tie_word_embeddings=False)
            notices = (untied_notice(path),)
    check_names(weight_shapes(config), {n: tuple(w.shape) for n, w in weights.items()}, str(path))
    model = CausalLM(config, ms_dtype, operators, shard)
    for name, parameter in model.parameters_and_names():
        parameter.name = name
        part = shard.part(name, weights.pop(name).asnumpy())
        parameter.set_data(Tensor.from_numpy(np.array(part, NUMPY_DTYPES[parameter.dtype], order="C")))
    model.source = str(path)
    model.hf_config = hf_config(config, ms_dtype)
    model.generation_config = {}
    model.notices = notices
    return model


def new_model(config: DecoderConfig, ms_dtype: ms.Type, seed: int, operators: Operators = PORTABLE) -> CausalLM:
    """A model to train from nothing: matrices normal with variance 1 / hidden_size, norms one, biases zero."""
    model = CausalLM(config, ms_dtype, operators)
    rng = np.random.default_rng(seed)
    for name, parameter in model.parameters_and_names():
        parameter.name = name
        if parameter.ndim == 2:
            value = rng.standard_normal(parameter.shape, np.float32) * config.hidden_size**-0.5
            parameter.set_data(Tensor.from_numpy(value.astype(NUMPY_DTYPES[parameter.dtype])))
    model.source = None
    model.hf_config = hf_config(config, ms_dtype)
    model.generation_config = {}
    model.notices = ()
    return model


def restore(model: CausalLM, path: str | os.PathLike) -> None:
    """Reads the weights of directory ``path`` into ``model``, which has the same ones."""
    entries = storage.open_dir(Path(path))
    expected = {name: tuple(p.shape) for name, p in model.parameters_and_names()}
    check_names(expected, {n: e.shape for n, e in entries.items()}, str(path))
    for name, parameter in model.parameters_and_names():
        parameter.set_data(Tensor.from_numpy(storage.read(entries[name], NUMPY_DTYPES[parameter.dtype])))


def hf_config(config: DecoderConfig, ms_dtype: ms.Type) -> dict:
    """A config.json for a model that came without one."""
    architecture = "Qwen3ForCausalLM" if config.qk_norm else "Qwen2ForCausalLM" if config.attention_bias else None
    architecture = architecture or ("MistralForCausalLM" if config.sliding_layers else "LlamaForCausalLM")
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim rms_norm_eps rope_theta rope_scaling max_position_embeddings tie_word_embeddings"
    ).split()
    hf = {name: getattr(config, name) for name in names}
    eos = list(config.eos_token_ids)
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "torch_dtype": np.dtype(NUMPY_DTYPES[ms_dtype]).name,
        **hf,
        **window_keys(config),
    }


def window_keys(config: DecoderConfig) -> dict:
    """The keys of config.json for a sliding window, if there is one; a Mistral has it in all layers."""
    if not config.sliding_layers:
        return {}
    if not (config.qk_norm or config.attention_bias):
        return {"sliding_window": config.sliding_window}
    kinds = [ATTENTION[window > 0] for window in config.layer_windows]
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds}


def check_plain(model: CausalLM) -> None:
    """Raises LoraMsError where ``model`` has parameters that a Hugging Face directory of its kind has no place for."""
    biased = ("q_proj.bias", "k_proj.bias", "v_proj.bias") if model.config.attention_bias else ()
    odd = [name for name, _ in model.parameters_and_names() if not name.endswith((".weight", *biased))]
    if odd:
        why = "a bias that config.json cannot ask for" if odd[0].endswith(".bias") else "of an adapter: merge it first"
        raise LoraMsError(f"the model cannot be saved as it is: {odd[0]} is {why}")


def stored_blocks(parameter: Parameter, dtype: str) -> Iterator[np.ndarray]:
    """The parameter's values as they are written."""
    yield storage.encoded(parameter.asnumpy(), dtype)


def write_directory(
    model: CausalLM, folder: Path, dtype: DTypeLike = np.float32, shard_size: int = storage.SHARD_SIZE
) -> None:
    """Writes ``config.json`` and the weights, in files of at most ``shard_size`` bytes: transformers loads the result.

    A head that has come apart from the embedding is written beside it.

    Raises:
        LoraMsError: an adapter stands in the model, or the directory cannot be written.
    """
    check_plain(model)
    name_of_type = np.dtype(dtype).name
    stored = storage.STORED[name_of_type]
    planned = {
        name: storage.Planned(stored, tuple(p.shape), partial(stored_blocks, p, stored))
        for name, p in model.parameters_and_names()
    }
    hf = {k: v for k, v in model.hf_config.items() if k not in ("torch_dtype", "dtype")}
    hf["dtype" if "rope_parameters" in hf else "torch_dtype"] = name_of_type
    if model.config.tie_word_embeddings and "lm_head.weight" in planned:
        hf["tie_word_embeddings"] = False
    for _ in storage.write_model(folder, planned, shard_size):
        pass
    if model.generation_config:
        storage.write_json(folder / GENERATION, model.generation_config)
    storage.write_json(folder / "config.json", hf)


def save_directory(
    model: CausalLM, path: str | os.PathLike, dtype: DTypeLike = np.float32, shard_size: int = storage.SHARD_SIZE
) -> None:
    """``write_directory`` into a folder that is written whole or not at all."""
    check_plain(model)
    size = sum(p.size for _, p in model.parameters_and_names()) * np.dtype(dtype).itemsize
    with saving.new_folder(Path(path), size, storage.MODEL_FILES) as folder:
        write_directory(model, folder, dtype, shard_size)
