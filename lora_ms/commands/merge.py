"""``lora-ms merge``: a model and its adapter as one Hugging Face folder, written tensor by tensor."""

from pathlib import Path

from lora_ms import saving, storage
from lora_ms.adapters import offline_merge
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import model_config, open_model
from lora_ms.recipes.model_folder import (
    base_of,
    check_adapter_folder,
    check_output,
    check_type,
    config_for,
    copy_texts,
)
from lora_ms.text import size_text


def run(
    load_adapter: str,
    output_dir: str,
    load_checkpoint: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    safe_merge: bool = True,
    overwrite: bool = False,
) -> None:
    """Writes the merged model into ``output_dir``, atomically.

    dtype: of the weights; ``auto`` keeps each weight's own.
    safe_merge: refuse NaN, infinity and numbers out of float16's range.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    check_type(dtype)
    shard_size = storage.parse_size(max_shard_size)
    adapter = Path(load_adapter)
    output = Path(output_dir)
    check_adapter_folder(adapter)
    base = base_of(adapter, load_checkpoint)
    hf = model_config(base)
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
    entries = offline_merge.with_head(stored.entries, stored.tied)
    updates = offline_merge.read_updates(adapter, entries)
    tied = stored.tied and offline_merge.still_tied(updates)
    if tied:
        entries.pop(f"{offline_merge.HEAD}.weight", None)
        updates.pop(offline_merge.HEAD, None)
    planned = offline_merge.plan(entries, updates, storage.STORED.get(dtype), safe_merge)
    size = sum(tensor.size for tensor in planned.values())
    print(f"merging {len(updates)} modules of {adapter} into {base}: {len(planned)} tensors, {size_text(size)}")
    unties = hf.get("tie_word_embeddings", False) and not tied
    if unties:
        print("the head and the embedding come apart: tie_word_embeddings becomes false")
    with saving.new_folder(output, size, storage.MODEL_FILES) as folder:
        for file in storage.write_model(folder, planned, shard_size):
            print(f"  {file.name}  {size_text(file.stat().st_size)}")
        copied = copy_texts(base, adapter, folder)
        storage.write_json(folder / "config.json", config_for(hf, dtype, unties))
    print(f"merged model: {output}")
    if "tokenizer_config.json" in copied:
        print(f"try it: lora-ms chat --load_checkpoint {output}   (transformers and vLLM load it as it is)")
    else:
        print("no tokenizer came along: copy one into the folder, and lora-ms chat can use it")
