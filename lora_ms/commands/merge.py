"""``lora-ms merge``: a model and its adapter as one Hugging Face directory, written tensor by tensor."""

import shutil
from pathlib import Path

from lora_ms import storage
from lora_ms.adapters import offline_merge as hf_merge
from lora_ms.adapters import peft_files as files
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import GENERATION, open_model

TYPES = ("float16", "bfloat16", "float32", "auto")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",  # a folder of further ones
)


def base_of(adapter: Path, load_checkpoint: str | None) -> Path:
    """The model's directory: ``load_checkpoint``, else the one that the adapter names.

    Raises:
        LoraMsError: there is none.
    """
    if load_checkpoint is None:
        files.read_adapter_config(adapter)
        named = files.base_name(adapter)
        if named is None or not Path(named).is_dir():
            what = f"the adapter's own, {named}, is no directory here" if named else "the adapter names none"
            raise LoraMsError(f"which model? {what}: give --load_checkpoint with its Hugging Face directory")
        return Path(named)
    base = Path(load_checkpoint)
    if not base.is_dir():
        state = "is a file" if base.exists() else "does not exist"
        raise LoraMsError(f"load_checkpoint: {base} {state}; give a Hugging Face directory")
    return base


def check_output(output: Path, base: Path, adapter: Path, overwrite: bool) -> None:
    """Raises LoraMsError where the merged model may not go to ``output``."""
    if not output.is_dir():
        return
    if output.samefile(base):
        raise LoraMsError(f"output_dir {output} is the model itself: give another folder")
    if output.samefile(adapter) or (output / files.CONFIG).exists():
        raise LoraMsError(f"output_dir {output} holds an adapter, which would be loaded on top: give another folder")
    old = [file.name for file in output.iterdir() if file.suffix in (".safetensors", ".bin")]
    if (old or (output / "config.json").exists()) and not overwrite:
        raise LoraMsError(f"output_dir {output} holds a model: give another folder, or --overwrite True")


def merged_config(hf: dict, dtype: str, untied: bool) -> dict:
    """config.json of the merged model, in the layout of the model's own."""
    merged = dict(hf)
    if dtype != "auto":
        key = "dtype" if "dtype" in hf or "rope_parameters" in hf else "torch_dtype"
        merged = {k: v for k, v in hf.items() if k not in ("dtype", "torch_dtype")} | {key: dtype}
    return merged | ({"tie_word_embeddings": False} if untied else {})


def copy_texts(base: Path, adapter: Path, output: Path) -> list[str]:
    """Copies tokenizer, chat template and generation settings; the adapter's tokenizer stands in for the model's.

    Returns the names of the files.
    """
    whole = (adapter / "tokenizer_config.json").is_file()  # then nothing of the model's may mix with it
    copied = []
    for name in (*TOKENIZER_FILES, GENERATION):
        sources = [adapter] if whole and name != GENERATION else [adapter, base]
        source = next((folder / name for folder in sources if (folder / name).exists()), None)
        if source is not None:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, output / name)
            copied.append(name)
    return copied


def run(
    load_adapter: str,
    output_dir: str,
    load_checkpoint: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    safe_merge: bool = True,
    overwrite: bool = False,
) -> None:
    """Writes the merged model into ``output_dir``, whole or not at all.

    dtype: of the weights; ``auto`` keeps each weight's own.
    safe_merge: refuse NaN, infinity and numbers out of float16's range.

    Raises:
        LoraMsError: anything that a user can mend.
    """
    if dtype not in TYPES:
        raise LoraMsError(f"dtype {dtype!r} is none of {', '.join(TYPES)}")
    shard_size, adapter, output = storage.parse_size(max_shard_size), Path(load_adapter), Path(output_dir)
    if not adapter.is_dir():
        raise LoraMsError(f"load_adapter: {adapter} is no folder; give the one that holds {files.CONFIG}")
    base = base_of(adapter, load_checkpoint)
    hf = storage.read_json(base / "config.json")
    quantised = hf.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LoraMsError(
            f"{base} is quantised ({method}): merge into the model that it was made of, then quantise the result"
        )
    check_output(output, base, adapter, overwrite)
    stored = open_model(base, hf)
    for line in stored.notices:
        print(line)
    entries = hf_merge.with_head(stored.entries, stored.tied)
    updates = hf_merge.read_updates(adapter, entries)
    tied = stored.tied and hf_merge.still_tied(updates)
    if tied:
        entries.pop(f"{hf_merge.HEAD}.weight", None)
        updates.pop(hf_merge.HEAD, None)
    planned = hf_merge.plan(entries, updates, storage.STORED.get(dtype), safe_merge)
    size = sum(tensor.size for tensor in planned.values())
    print(f"merging {len(updates)} modules of {adapter} into {base}: {len(planned)} tensors, {storage.size_text(size)}")
    unties = hf.get("tie_word_embeddings", False) and not tied
    if unties:
        print("the head and the embedding come apart: tie_word_embeddings becomes false")
    with storage.whole_folder(output, size) as folder:
        for file in storage.write_model(folder, planned, shard_size):
            print(f"  {file.name}  {storage.size_text(file.stat().st_size)}")
        copied = copy_texts(base, adapter, folder)
        storage.write_json(folder / "config.json", merged_config(hf, dtype, unties))
    print(f"merged model: {output}")
    if "tokenizer_config.json" in copied:
        print(f"try it: lora-ms chat --load_checkpoint {output}   (transformers and vLLM load it as it is)")
    else:
        print("no tokenizer came along: copy one into the folder, and lora-ms chat can use it")
