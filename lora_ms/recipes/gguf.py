"""Models from GGUF files to Hugging Face folders, and models and adapters back, each with an Ollama Modelfile."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.adapters.combine import read_adapter
from lora_ms.adapters.offline_merge import EMBEDDING, HEAD
from lora_ms.adapters.peft_files import read_adapter_config
from lora_ms.data.template import begins_with_bos, template_of
from lora_ms.data.tokenizer import load_tokenizer, save_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import ConfigJson, check
from lora_ms.gguf import files, modelfile, vocabulary
from lora_ms.gguf.files import GgufFile, Output
from lora_ms.hf_folder import open_model
from lora_ms.limits import MEMORY, limited
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import check_names, read_config
from lora_ms.nn.rope import inverse_frequencies
from lora_ms.reading import readable
from lora_ms.recipes.convert import shapes_of
from lora_ms.recipes.model_folder import copy_texts
from lora_ms.storage import Entry
from lora_ms.text import counted, listed, size_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FREQUENCIES = "rope_freqs.weight"  # by how much each rotation is slowed; computed anew from config.json
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # general.file_type
MODEL, ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
# the numbers with which Llama 3.1 and 3.2 slow their rotation, beside the factor
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


# --- from a GGUF


def to_hugging_face(
    source: Path, target: Path, base: Path | None, *, dtype: str, shard_size: int, overwrite: bool
) -> list[str]:
    """Writes the folder of the model in ``source``; returns what to tell the user.

    base: a folder whose tokenizer is taken in place of the file's.
    dtype: float16, bfloat16, float32; auto: each tensor's own, float16 for quantised ones.

    Raises:
        LoraMsError: no GGUF, a model that is not computed here, or a file that contradicts itself.
    """
    file = files.read(source)
    kind = file.value("general.type", str, "model")
    if kind != "model":
        raise file.fault(f"it holds no model ({kind}): give the GGUF of one")
    architecture = file.value("general.architecture", str)
    if architecture not in files.ARCHITECTURES:
        raise file.fault(
            f"architecture {architecture!r:.60} is not supported; supported: {', '.join(files.ARCHITECTURES)}"
        )
    hf = _config_json(file, architecture)
    check(ConfigJson, hf, f"{source}: its metadata")
    sizes = _sizes(file, hf)
    shapes = shapes_of(sizes)
    names = files.gguf_names(architecture, sizes.num_hidden_layers, shapes)
    found = {ours: file.tensors[theirs] for ours, theirs in names.items() if theirs in file.tensors}
    surplus = [name for name in file.tensors if name not in names.values() and name != FREQUENCIES]
    stored = {ours: tuple(int(n) for n in reversed(tensor.shape)) for ours, tensor in found.items()}
    check_names(shapes, stored | dict.fromkeys(surplus, ()), str(source))
    heads = (sizes.num_attention_heads, sizes.num_key_value_heads)
    planned = {
        ours: files.planned_tensor(
            file, names[ours], storage.STORED.get(dtype), files.heads_of(ours, architecture, *heads)
        )
        for ours in shapes
    }
    main = planned[f"{EMBEDDING}.weight"].dtype
    hf["torch_dtype"] = next(name for name, stored in storage.STORED.items() if stored == main)
    tokenizer = None if base is not None else _tokenizer(file, sizes)
    total = sum(tensor.size for tensor in planned.values())
    if target.is_dir() and (target / "config.json").exists() and not overwrite:
        raise LoraMsError(f"output_dir {target} holds a model: give another folder, or --overwrite True")
    with saving.new_folder(target, total, storage.MODEL_FILES) as folder:
        for _ in storage.write_model(folder, planned, shard_size):
            pass
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        elif base is not None:
            copy_texts(base, base, folder)
        storage.write_json(folder / "config.json", hf)
    kinds = sorted({tensor.tensor_type.name for tensor in found.values()})
    return [
        f"{counted(len(planned), 'tensor')} ({', '.join(kinds)}), {size_text(total)} in {hf['torch_dtype']}: {target}",
        f"try it: lora-ms chat --load_checkpoint {target}",
    ]


def _config_json(file: GgufFile, architecture: str) -> dict[str, Any]:
    """config.json of the model that the metadata describe."""

    def number(key: str, kind: type, default: Any = None) -> Any:
        return file.value(f"{architecture}.{key}", kind, default)

    hidden = number("embedding_length", int)
    heads = number("attention.head_count", int)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.fault("the tensor token_embd.weight is missing, or no matrix")
    if heads < 1 or number("block_count", int) < 1:
        raise file.fault(f"{architecture}.attention.head_count or block_count is 0")
    head_dim = number("attention.key_length", int, number("rope.dimension_count", int, hidden // heads))
    name = files.ARCHITECTURES[architecture]
    eos = file.metadata.get("tokenizer.ggml.eos_token_id")
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    return {
        "architectures": [name],
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length", int),
        "num_hidden_layers": number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": _short(number("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(number("rope.freq_base", float, 10000.0)),
        "rope_scaling": _scaling(file, architecture, head_dim),
        "max_position_embeddings": number("context_length", int),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": bos if type(bos) is int else None,
        "eos_token_id": eos if type(eos) is int else None,
    }


def _short(value: float) -> float:
    """The number that was rounded to float32: 1e-05 in place of 9.999999747378752e-06."""
    return float(np.format_float_positional(np.float32(value), unique=True, trim="0")) if np.isfinite(value) else value


def _scaling(file: GgufFile, architecture: str, head_dim: int) -> dict[str, Any] | None:
    kind = file.value(f"{architecture}.rope.scaling.type", str, "none")
    if FREQUENCIES in file.tensors:
        tensor = file.tensors[FREQUENCIES]
        with readable(file.path, f"the tensor {FREQUENCIES}"):
            slowed = np.array(tensor.data, np.float32).ravel()
        theta = file.value(f"{architecture}.rope.freq_base", float, 10000.0)
        if not np.isfinite(slowed).all() or not 1 <= head_dim <= 2**12 or not 0 < theta < 1e15:
            raise file.fault(f"{FREQUENCIES} or the rotation it belongs to is out of range")
        known = {"rope_type": "llama3", "factor": float(slowed.max(initial=1.0)), **LLAMA3}
        for original in (2**power for power in range(4, 21)):  # the file does not say for how long texts it was made
            found = {**known, "original_max_position_embeddings": original}
            wanted = slowing(head_dim, theta, found)
            if slowed.shape == wanted.shape and np.allclose(slowed, wanted, rtol=1e-4):
                return found
        raise file.fault(f"{FREQUENCIES} slows the rotation otherwise than Llama 3.1 does, which is not supported")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise file.fault(f"rope scaling {kind!r:.40} is not supported; supported: linear, yarn, and Llama 3.1's")
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": _short(file.value(f"{architecture}.rope.scaling.factor", float)),
    }
    if kind == "yarn":
        key = f"{architecture}.rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = file.value(key, int)
    return scaling


def slowing(head_dim: int, theta: float, scaling: dict[str, Any]) -> NDArray[np.float32]:
    """By how much ``scaling`` slows each of the head_dim / 2 rotations."""
    return (inverse_frequencies(head_dim, theta) / inverse_frequencies(head_dim, theta, scaling)).astype(np.float32)


def _sizes(file: GgufFile, hf: dict[str, Any]) -> DecoderConfig:
    from lora_ms.models.hub import FAMILIES

    with readable(file.path, "the sizes of a model"):
        return FAMILIES[hf["architectures"][0]](hf)


def _tokenizer(file: GgufFile, sizes: DecoderConfig) -> "PreTrainedTokenizerBase":
    what = f"{file.path}: its tokenizer"
    with readable(file.path, "a tokenizer"), limited(what, files.SECONDS, files.MEMORY):
        tokenizer = vocabulary.tokenizer_of(file, sizes.max_position_embeddings)
    if len(tokenizer) > sizes.vocab_size:
        raise file.fault(f"it has {len(tokenizer):,} tokens, and the embedding {sizes.vocab_size:,} rows")
    return tokenizer


# --- to a GGUF


def export(
    base: Path, adapter: Path | None, target: Path, *, dtype: str, with_base: bool, overwrite: bool
) -> list[str]:
    """Writes ``model.gguf``, or of an adapter ``adapter.gguf``, and a Modelfile; returns what to tell the user.

    base: the model's folder. dtype: of the model's matrices: float32, float16, bfloat16; auto: their own.
    with_base: beside an adapter, write its model, too.

    Raises:
        LoraMsError: what llama.cpp cannot hold, with the reason.
    """
    files.package()
    sizes, hf = read_config(base)
    name = (hf.get("architectures") or ["none"])[0]
    if name not in files.FAMILIES:
        raise LoraMsError(f"{base}: {name} has no GGUF here; {', '.join(files.FAMILIES)} have")
    architecture = files.FAMILIES[name]
    has_model = adapter is None or with_base
    written = [*([MODEL] if has_model else []), *([ADAPTER] if adapter is not None else []), MODELFILE]
    there = [file for file in written if (target / file).exists()]
    if there and not overwrite:
        raise LoraMsError(f"output_dir {target} holds {there[0]}: give another folder, or --overwrite True")
    tokenizer = _tokenizer_at(base, adapter)
    metadata: dict[str, Any] = {}
    tensors: dict[str, Output] = {}
    factors: dict[str, Output] = {}
    lines: list[str] = []
    alpha = 0.0
    if has_model:
        metadata, tensors, lines = _model_parts(base, sizes, hf, architecture, tokenizer, dtype)
    if adapter is not None:
        factors, alpha = _adapter_parts(adapter, base, sizes, architecture)
    size = sum(tensor.size for tensor in (*tensors.values(), *factors.values()))
    with saving.new_folder(target, size, beside=True) as folder:
        if has_model:
            files.write(folder / MODEL, architecture, metadata, tensors)
            lines.append(f"{target / MODEL}: {counted(len(tensors), 'tensor')}")
        if adapter is not None:
            settings = {"general.type": "adapter", "general.name": adapter.name or "adapter", "adapter.type": "lora"}
            files.write(folder / ADAPTER, architecture, {**settings, "adapter.lora.alpha": alpha}, factors)
            lines.append(f"{target / ADAPTER}: {counted(len(factors) // 2, 'module')}, alpha {alpha:g}")
        text, why = _modelfile(tokenizer, None if adapter is None else f"./{ADAPTER}")
        (folder / MODELFILE).write_text(text, "utf-8")
    if why:
        lines.append(f"no template in {MODELFILE}: {why}")
    if not (has_model or (target / MODEL).exists()):
        return [*lines, f"Ollama needs the model, too, as {target / MODEL}: --with_base True writes it"]
    lines.append(f"try it: cd {target} && ollama create mine -f {MODELFILE} && ollama run mine")
    return lines


def _tokenizer_at(base: Path, adapter: Path | None) -> "PreTrainedTokenizerBase":
    folders = [base] if adapter is None else [adapter, base]
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            return load_tokenizer(folder)
    raise LoraMsError(f"{base}: no tokenizer here (tokenizer_config.json is missing), and a GGUF holds one")


def _model_parts(
    base: Path,
    sizes: DecoderConfig,
    hf: dict[str, Any],
    architecture: str,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
) -> tuple[dict[str, Any], dict[str, Output], list[str]]:
    """Metadata, tensors and notices of a model's file."""
    if hf.get("quantization_config"):
        raise LoraMsError(f"{base} is quantised: export the model that it was made of, and quantise with llama.cpp")
    if sizes.sliding_layers:
        raise LoraMsError(
            f"{base}: its layers see {sizes.sliding_window:,} tokens back (sliding_window), and llama.cpp's "
            f"{architecture} all of them: long texts would get other answers, so no GGUF is written"
        )
    stored = open_model(base, hf)
    shapes = shapes_of(sizes)
    entries = {name: entry for name, entry in stored.entries.items() if not name.endswith("rotary_emb.inv_freq")}
    if stored.tied:
        shapes.pop(f"{HEAD}.weight", None)
    elif f"{HEAD}.weight" in entries:
        shapes.setdefault(f"{HEAD}.weight", entries[f"{HEAD}.weight"].shape)
    check_names(shapes, {name: entry.shape for name, entry in entries.items()}, str(base))
    names = files.gguf_names(architecture, sizes.num_hidden_layers, shapes)
    heads = (sizes.num_attention_heads, sizes.num_key_value_heads)
    tensors: dict[str, Output] = {}
    if sizes.rope_scaling is not None and sizes.rope_scaling["rope_type"] == "llama3":
        slowed = slowing(sizes.head_dim, sizes.rope_theta, sizes.rope_scaling)
        tensors[FREQUENCIES] = Output("F32", slowed.shape, partial(_whole, slowed))
    for name, shape in shapes.items():
        entry = entries[name]
        target = storage.STORED.get(dtype) or entry.dtype
        target = "F32" if len(shape) == 1 else target  # llama.cpp computes with vectors in float32
        if target not in FILE_TYPES:
            raise LoraMsError(f"{base}: {name} is of type {target}: give --dtype float16")
        turn = files.heads_of(name, architecture, *heads)
        tensors[names[name]] = Output(target, shape, partial(_stored_blocks, entry, name, target, turn))
    main = tensors[names[f"{EMBEDDING}.weight"]].dtype
    metadata = _model_metadata(sizes, architecture, base, FILE_TYPES[main])
    metadata |= vocabulary.metadata_of(tokenizer, sizes.vocab_size, base)
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = template_of(tokenizer)
    return metadata, tensors, list(stored.notices)


def _whole(values: NDArray) -> Iterator[NDArray]:
    yield values


def _stored_blocks(entry: Entry, name: str, dtype: str, heads: int) -> Iterator[NDArray]:
    if heads:
        blocks: Any = [files.interleaved(storage.read(entry, np.float32), heads)]
    else:
        blocks = storage.read_blocks(entry)
    for block in blocks:
        words = storage.encoded(block, dtype)
        if dtype == "F16" and not np.isfinite(words).all():
            raise LoraMsError(f"{entry.file}: {name} is not finite in float16: give --dtype bfloat16 or float32")
        yield words


def _model_metadata(sizes: DecoderConfig, architecture: str, base: Path, file_type: int) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "context_length": sizes.max_position_embeddings,
        "embedding_length": sizes.hidden_size,
        "block_count": sizes.num_hidden_layers,
        "feed_forward_length": sizes.intermediate_size,
        "attention.head_count": sizes.num_attention_heads,
        "attention.head_count_kv": sizes.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(sizes.rms_norm_eps),
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "rope.freq_base": float(sizes.rope_theta),
        "rope.dimension_count": sizes.head_dim,
        "vocab_size": sizes.vocab_size,
    }
    scaling = sizes.rope_scaling
    if scaling is not None and scaling["rope_type"] != "llama3":
        kind = scaling["rope_type"]
        odd = [key for key in scaling if key not in ("rope_type", "factor", "original_max_position_embeddings")]
        if kind not in ("linear", "yarn") or odd:
            what = f"{kind} with {', '.join(odd)}" if odd else kind
            raise LoraMsError(f"{base}: rope scaling {what} has no place in a GGUF, so none is written")
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
        if kind == "yarn":
            keys["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    general = {"general.type": "model", "general.name": base.name or "model", "general.file_type": file_type}
    return general | {f"{architecture}.{key}": value for key, value in keys.items()}


def _adapter_parts(
    adapter: Path, base: Path, sizes: DecoderConfig, architecture: str
) -> tuple[dict[str, Output], float]:
    """The tensors of an adapter's file, and its alpha.

    llama.cpp scales every module by alpha / rank: what a module's scaling is beyond that is multiplied into its B.

    Raises:
        LoraMsError: more than a product on each matrix, or a matrix that llama.cpp has no place for.
    """
    config = read_adapter_config(adapter)
    more = config.not_a_pair()
    if more:
        raise LoraMsError(
            f"{adapter}: llama.cpp's adapters are plain LoRA, and this one is not ({', '.join(more)}): merge it, and "
            "export the merged model"
        )
    pairs = read_adapter(adapter).tensors
    odd = [name for name in pairs if name == EMBEDDING or (name == HEAD and sizes.tie_word_embeddings)]
    if odd:
        raise LoraMsError(
            f"{adapter}: llama.cpp's adapters have no place for {' and '.join(odd)} of this model: merge it, and "
            "export the merged model"
        )
    shapes = shapes_of(sizes)
    faults = [
        f"{name} is {[len(pair.b), pair.a.shape[1]]}, and {list(shapes.get(f'{name}.weight', ()))} in the model"
        for name, pair in pairs.items()
        if shapes.get(f"{name}.weight") != (len(pair.b), pair.a.shape[1])
    ]
    if faults:
        raise LoraMsError(f"{adapter}: made for another model than {base}: {listed(faults)}")
    names = files.gguf_names(architecture, sizes.num_hidden_layers, [f"{name}.weight" for name in pairs])
    first = next(iter(pairs.values()))
    alpha = float(np.float32(first.scaling * len(first.a)))
    heads = (sizes.num_attention_heads, sizes.num_key_value_heads)
    factors: dict[str, Output] = {}
    for name, pair in pairs.items():
        theirs = names[f"{name}.weight"]
        turn = files.heads_of(f"{name}.weight", architecture, *heads)
        share = pair.scaling * len(pair.a) / alpha
        b = pair.b if share == 1 else (pair.b * np.float64(share)).astype(np.float32)
        b = files.interleaved(b, turn) if turn else b
        factors[f"{theirs}.lora_a"] = Output("F32", pair.a.shape, partial(_whole, pair.a))
        factors[f"{theirs}.lora_b"] = Output("F32", b.shape, partial(_whole, np.ascontiguousarray(b)))
    return factors, alpha


def _modelfile(tokenizer: "PreTrainedTokenizerBase", adapter: str | None) -> tuple[str, str]:
    """The text of the Modelfile, and why it holds no template ("" where it does)."""
    from jinja2 import TemplateError

    template, why = None, "its text is more than one turn after another, which Ollama's templates do not have"
    jinja = template_of(tokenizer)

    def render(messages: Any, prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, chat_template=jinja, tokenize=False, add_generation_prompt=prompt
                )
            )
        except TemplateError as fault:
            raise modelfile.TemplateFault(" ".join(str(fault).split())) from None

    stops = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    with readable("the chat template", "a template"), limited("the chat template", memory=MEMORY):
        try:
            turns = modelfile.turns_of(render)
        except modelfile.TemplateFault as fault:
            turns, why = None, f"it refuses a plain conversation ({fault})"
    if turns is not None:
        why = ""
        bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
        try:
            template = modelfile.go_template(turns, bos)
        except LoraMsError as error:
            why = str(error)
        end = turns.around["assistant"][1].strip()
        stops += [end] if end and end not in stops else []
    return modelfile.modelfile(f"./{MODEL}", adapter, template, stops, why), why
