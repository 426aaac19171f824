"""``lora-ms convert``: a model's weights from Hugging Face's names to MindFormers', or back, tensor by tensor."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.bridge import weights
from lora_ms.bridge.files import NAME_MAP, SUFFIXES, of_entry, read_file, write_file
from lora_ms.bridge.layout import heads_of
from lora_ms.commands.merge import TYPES, check_output, copy_texts, merged_config
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import EMBEDDING, HEAD, open_model, untied_notice
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import check_names, read_config
from lora_ms.models.mindformers_names import STYLES


def run(
    input: str,
    output: str,
    naming: str = "legacy",
    concat: bool = False,
    contiguous: bool = False,
    load_checkpoint: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Converts the Hugging Face folder or MindFormers checkpoint ``input`` into the other, named ``output``.

    naming: of what is written for MindFormers: legacy (its Llama) or mcore. concat, contiguous: as in
    ``convert_adapter``. load_checkpoint: where ``input`` is MindFormers', the folder with config.json and tokenizer.
    dtype: of the weights written; auto keeps each one's own.

    Raises:
        LoraMsError: anything that a user can mend.
    """
    source, target = Path(input), Path(output)
    if dtype not in TYPES:
        raise LoraMsError(f"dtype {dtype!r} is none of {', '.join(TYPES)}")
    if naming not in STYLES:
        raise LoraMsError(f"naming {naming!r} is none of {', '.join(STYLES)}")
    if not source.exists():
        raise LoraMsError(f"input: {source} does not exist")
    size = storage.parse_size(max_shard_size)
    if (source / "config.json").is_file():
        to_mindformers(source, target, naming, concat, contiguous, storage.STORED.get(dtype), size, overwrite)
        return
    if load_checkpoint is None or not (Path(load_checkpoint) / "config.json").is_file():
        raise LoraMsError(
            f"{source} has no config.json: give --load_checkpoint, a Hugging Face folder of the model's kind "
            "(config.json and the tokenizer are taken from it)"
        )
    to_hugging_face(source, target, Path(load_checkpoint), contiguous, dtype, size, overwrite)


def to_mindformers(
    source: Path,
    target: Path,
    style: str,
    concat: bool,
    contiguous: bool,
    dtype: str | None,
    size: int,
    overwrite: bool,
) -> None:
    """Writes one file, or a folder of safetensors files with MindSpore's index."""
    hf = storage.read_json(source / "config.json")
    heads = heads_of(hf, source / "config.json", contiguous)
    found = open_model(source, hf)
    for line in found.notices:
        print(line)
    stored = {name: of_entry(entry) for name, entry in found.entries.items()}
    tensors = weights.to_mindformers(stored, style, concat, heads, dtype, source)
    total = sum(tensor.size for tensor in tensors.values())
    if target.suffix in SUFFIXES:
        if target.exists() and not overwrite:
            raise LoraMsError(f"output {target} is there already: give another name, or --overwrite True")
        write_file(target, tensors)
    else:
        check_output(target, source, source, overwrite)
        with storage.whole_folder(target, total) as folder:
            shards = storage.shards_of(tensors, size)
            for file, names in shards.items():
                storage.write_blocks(folder / file, {name: tensors[name] for name in names})
            storage.write_json(folder / NAME_MAP, {name: file for file, names in shards.items() for name in names})
    print(f"{len(tensors)} tensors, {storage.size_text(total)}, under MindFormers' {style} names: {target}")


def to_hugging_face(
    source: Path, target: Path, base: Path, contiguous: bool, dtype: str, size: int, overwrite: bool
) -> None:
    """Writes a folder that transformers loads."""
    sizes, hf = read_config(base)
    heads = heads_of(hf, base / "config.json", contiguous)
    tensors, left = weights.to_hugging_face(read_file(source), heads, storage.STORED.get(dtype), source)
    unties = sizes.tie_word_embeddings and HEAD in tensors and not same_blocks(tensors[HEAD], tensors.get(EMBEDDING))
    if unties:
        sizes = replace(sizes, tie_word_embeddings=False)
        print(untied_notice(source))
    elif sizes.tie_word_embeddings:
        tensors.pop(HEAD, None)
    check_names(shapes_of(sizes), {name: tensor.shape for name, tensor in tensors.items()}, str(source))
    check_output(target, base, base, overwrite)
    total = sum(tensor.size for tensor in tensors.values())
    with storage.whole_folder(target, total) as folder:
        for _ in storage.write_model(folder, tensors, size):
            pass
        copy_texts(base, base, folder)
        written = {tensor.dtype for tensor in tensors.values()}
        named = [name for name, stored in storage.STORED.items() if {stored} == written]
        storage.write_json(folder / "config.json", merged_config(hf, named[0] if named else dtype, unties))
    print(f"{len(tensors)} tensors, {storage.size_text(total)}: {target}")
    if left:
        print(f"left out: {len(left)} tensors that are no weights of the model, such as {left[0]}")


def same_blocks(one: storage.Planned, other: storage.Planned | None) -> bool:
    """Whether two tensors are written alike."""
    if other is None or one.shape != other.shape:
        return False
    return all(np.array_equal(x, y) for x, y in zip(one.blocks(), other.blocks(), strict=True))


def shapes_of(sizes: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors under Hugging Face's names."""
    h, q, kv = sizes.hidden_size, sizes.num_attention_heads, sizes.num_key_value_heads
    d, m = sizes.head_dim, sizes.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab_size, h), "model.norm.weight": (h,)}
    inside = {
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
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
        if sizes.attention_bias:
            biases = (("q", q), ("k", kv), ("v", kv))
            shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.bias": (n * d,) for name, n in biases}
    return shapes if sizes.tie_word_embeddings else {**shapes, "lm_head.weight": (sizes.vocab_size, h)}
