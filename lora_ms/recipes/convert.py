"""A model's weights from Hugging Face's names and files to MindFormers', and back, tensor by tensor."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_ms import saving, storage
from lora_ms.bridge import weights
from lora_ms.bridge.files import NAME_MAP, SUFFIXES, of_entry, read_file, write_file
from lora_ms.bridge.layout import heads_of
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import EMBEDDING, HEAD, model_config, open_model, untied_notice
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import check_names, read_config
from lora_ms.recipes.model_folder import check_output, config_for, copy_texts
from lora_ms.text import size_text


def to_mindformers(
    source: Path,
    target: Path,
    *,
    naming: str,
    concat: bool,
    contiguous: bool,
    dtype: str | None,
    shard_size: int,
    overwrite: bool,
) -> list[str]:
    """Writes one file, or a folder of safetensors files with MindSpore's index; returns what to tell the user.

    naming, concat, contiguous: see ``commands.convert``. dtype: one of safetensors' types; None: each tensor's own.
    shard_size: bytes of the largest file of a folder.
    """
    hf = model_config(source)
    heads = heads_of(hf, source / "config.json", contiguous)
    found = open_model(source, hf)
    stored = {name: of_entry(entry) for name, entry in found.entries.items()}
    tensors = weights.to_mindformers(stored, naming, concat, heads, dtype, source)
    total = sum(tensor.size for tensor in tensors.values())
    if target.suffix in SUFFIXES:
        if target.exists() and not overwrite:
            raise LoraMsError(f"output {target} is there already: give another name, or --overwrite True")
        write_file(target, tensors)
    else:
        check_output(target, source, source, overwrite)
        with saving.new_folder(target, total, storage.MODEL_FILES) as folder:
            shards = storage.shards_of(tensors, shard_size)
            for file, names in shards.items():
                storage.write_blocks(folder / file, {name: tensors[name] for name in names})
            storage.write_json(folder / NAME_MAP, {name: file for file, names in shards.items() for name in names})
    return [
        *found.notices,
        f"{len(tensors)} tensors, {size_text(total)}, under MindFormers' {naming} names: {target}",
    ]


def to_hugging_face(
    source: Path, target: Path, base: Path, *, contiguous: bool, dtype: str, shard_size: int, overwrite: bool
) -> list[str]:
    """Writes a folder that transformers loads; returns what to tell the user.

    base: a Hugging Face folder of the same architecture, for config.json and the tokenizer.
    dtype: float16, bfloat16, float32, or auto for each tensor's own.
    """
    sizes, hf = read_config(base)
    heads = heads_of(hf, base / "config.json", contiguous)
    tensors, left_out = weights.to_hugging_face(read_file(source), heads, storage.STORED.get(dtype), source)
    unties = sizes.tie_word_embeddings and HEAD in tensors and not same_blocks(tensors[HEAD], tensors.get(EMBEDDING))
    if unties:
        sizes = replace(sizes, tie_word_embeddings=False)
    elif sizes.tie_word_embeddings:
        tensors.pop(HEAD, None)
    check_names(shapes_of(sizes), {name: tensor.shape for name, tensor in tensors.items()}, str(source))
    check_output(target, base, base, overwrite)
    total = sum(tensor.size for tensor in tensors.values())
    with saving.new_folder(target, total, storage.MODEL_FILES) as folder:
        for _ in storage.write_model(folder, tensors, shard_size):
            pass
        copy_texts(base, base, folder)
        written = {tensor.dtype for tensor in tensors.values()}
        named = [name for name, stored in storage.STORED.items() if {stored} == written]
        storage.write_json(folder / "config.json", config_for(hf, named[0] if named else dtype, unties))
    lines = [untied_notice(source)] if unties else []
    lines += [f"{len(tensors)} tensors, {size_text(total)}: {target}"]
    if left_out:
        lines.append(f"left out: {len(left_out)} tensors that are no weights of the model, such as {left_out[0]}")
    return lines


def same_blocks(one: storage.Planned, other: storage.Planned | None) -> bool:
    """Whether two tensors are written alike."""
    if other is None or one.shape != other.shape:
        return False
    return all(np.array_equal(x, y) for x, y in zip(one.blocks(), other.blocks(), strict=True))


def shapes_of(sizes: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors under Hugging Face's names."""
    h = sizes.hidden_size
    q = sizes.num_attention_heads
    kv = sizes.num_key_value_heads
    d = sizes.head_dim
    m = sizes.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab_size, h), "model.norm.weight": (h,)}
    of_layer = {
        **{f"self_attn.{name}_proj": (heads * d, h) for name, heads in (("q", q), ("k", kv), ("v", kv))},
        "self_attn.o_proj": (h, q * d),
        "mlp.gate_proj": (m, h),
        "mlp.up_proj": (m, h),
        "mlp.down_proj": (h, m),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
        **({"self_attn.q_norm": (d,), "self_attn.k_norm": (d,)} if sizes.qk_norm else {}),
    }
    for layer in range(sizes.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        if sizes.attention_bias:
            biases = (("q", q), ("k", kv), ("v", kv))
            shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.bias": (n * d,) for name, n in biases}
    return shapes if sizes.tie_word_embeddings else {**shapes, "lm_head.weight": (sizes.vocab_size, h)}
