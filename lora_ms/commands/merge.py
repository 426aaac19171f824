"""``lora-ms merge``: a model and its adapter as one Hugging Face folder, written tensor by tensor."""

from functools import partial
from pathlib import Path

from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.adapters import offline_merge, peft_files
from lora_ms.adapters.offline_merge import Decoded
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import CONFIG, ModelFolder, model_config, open_model, says_tied
from lora_ms.quant.folder import LINEAR, quantised_entry
from lora_ms.quant.int4_folder import METHODS, GroupSettings, read_groups
from lora_ms.quant.nf4 import dequantise
from lora_ms.quant.settings import Quantisation, read_quantisation
from lora_ms.recipes.compare_logits import distance_line
from lora_ms.recipes.model_folder import (
    base_of,
    check_output,
    check_type,
    config_for,
    copy_texts,
    own_model,
)
from lora_ms.text import size_text

ONTO = ("original", "dequantized")


def run(
    load_adapter: str,
    output_dir: str,
    load_checkpoint: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    safe_merge: bool = True,
    overwrite: bool = False,
    onto: str | None = None,
) -> None:
    """Writes the merged model into ``output_dir``, atomically.

    onto: of an adapter that was trained on weights of four bits, which ones it is merged into: ``original``, or
        ``dequantized``, the numbers that those had in training. How far the logits then are from those is printed.
    dtype: of the weights; ``auto`` keeps each weight's own.
    safe_merge: refuse NaN, infinity and numbers out of float16's range.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    check_type(dtype)
    shard_size = storage.parse_size(max_shard_size)
    adapter = Path(load_adapter)
    output = Path(output_dir)
    peft_files.check_adapter_folder(adapter)
    base = base_of(adapter, load_checkpoint)
    hf = model_config(base)
    check_output(output, base, adapter, overwrite)
    stored = open_model(base, hf)
    for line in stored.notices:
        print(line)
    trained_on = trained_in_four_bits(base, hf, stored, adapter)
    check_onto(onto, base, stored, trained_on)
    if trained_on is not None:
        from lora_ms.models.hub import read_config

        read_config(base)  # it is run in the end, to compare its logits
    decoded = decoded_weights(stored, trained_on) if trained_on is not None and onto == "dequantized" else {}
    entries = offline_merge.with_head(stored.entries, stored.tied)
    updates = offline_merge.read_updates(adapter, entries)
    tied = stored.tied and offline_merge.still_tied(updates)
    if tied:
        entries.pop(f"{offline_merge.HEAD}.weight", None)
        updates.pop(offline_merge.HEAD, None)
    planned = offline_merge.plan(entries, updates, storage.STORED.get(dtype), safe_merge, decoded)
    size = sum(tensor.size for tensor in planned.values())
    print(f"merging {len(updates)} modules of {adapter} into {base}: {len(planned)} tensors, {size_text(size)}")
    unties = says_tied(hf) and not tied
    if unties:
        print("the head and the embedding come apart: tie_word_embeddings becomes false")
    with saving.new_folder(output, size, storage.MODEL_FILES) as folder:
        for file in storage.write_model(folder, planned, shard_size):
            print(f"  {file.name}  {size_text(file.stat().st_size)}")
        copied = copy_texts(base, adapter, folder)
        written = {key: value for key, value in hf.items() if key != "quantization_config"}
        storage.write_json(folder / "config.json", config_for(written, dtype, unties))
    print(f"merged model: {output}")
    if trained_on is not None:
        asked = own_model(adapter) if isinstance(trained_on, GroupSettings) and not stored.quantised else base
        at_load = trained_on if isinstance(trained_on, Quantisation) and not stored.quantised else None
        print(distance_line(asked or base, adapter, output, at_load))
    if "tokenizer_config.json" in copied:
        print(f"try it: lora-ms chat --load_checkpoint {output}   (transformers and vLLM load it as it is)")
    else:
        print("no tokenizer came along: copy one into the folder, and lora-ms chat can use it")


def trained_in_four_bits(
    base: Path, hf: dict, stored: ModelFolder, adapter: Path
) -> Quantisation | GroupSettings | None:
    """How the weights were quantised that the adapter was trained on; None where nothing says that they were.

    Raises:
        LoraMsError: the model is in another kind of four bits.
    """
    found = peft_files.base_quantisation(adapter)
    settings = hf.get("quantization_config")
    if settings is None and not stored.quantised:
        return groups_of_own(adapter) if found is None else found
    if stored.quantised and isinstance(settings, dict) and settings.get("quant_method") in METHODS:
        return read_groups(settings)
    try:
        here = read_quantisation(settings or "nf4", strict=False)
    except ValueError:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise LoraMsError(
            f"{base} is quantised ({method}): merge into the model that it was made of, then quantise the result"
        ) from None
    if found is not None and found.double != here.double:
        raise LoraMsError(f"the adapter was trained on {found.name()}, and {base} is {here.name()}: give its own model")
    return here


def groups_of_own(adapter: Path) -> GroupSettings | None:
    """How the model is packed that the adapter names as its own, where that is here and GPTQ's or AWQ's."""
    own = own_model(adapter)
    settings = model_config(own).get("quantization_config") if own is not None and (own / CONFIG).is_file() else None
    if not isinstance(settings, dict) or settings.get("quant_method") not in METHODS:
        return None
    return read_groups(settings)


def check_onto(
    onto: str | None, base: Path, stored: ModelFolder, trained_on: Quantisation | GroupSettings | None
) -> None:
    """Raises LoraMsError where ``onto`` is missing, is neither of the two, or does not suit the model."""
    if onto not in (None, *ONTO):
        raise LoraMsError(f"onto {onto!r}: give {' or '.join(ONTO)}")
    if trained_on is not None and onto is None:
        raise LoraMsError(
            f"the adapter was trained on weights of four bits ({trained_on.name()}), and merged into others it is "
            "another model: give --onto dequantized (the numbers of the training) or --onto original"
        )
    if onto == "original" and stored.quantised:
        raise LoraMsError(f"{base} is quantised: to merge --onto original, give the model that it was made of")
    if onto == "dequantized" and isinstance(trained_on, GroupSettings) and not stored.quantised:
        raise LoraMsError(
            f"--onto dequantized: {base} is whole, and the adapter was trained on {trained_on.name()}: give that "
            "model, or --onto original"
        )
    if onto == "dequantized" and trained_on is None:
        raise LoraMsError(f"--onto dequantized: neither {base} nor the adapter says that weights were quantised")


def decoded_weights(stored: ModelFolder, trained_on: Quantisation | GroupSettings) -> dict[str, Decoded]:
    """The weights of the model that have other numbers once they are quantised, by name."""
    if stored.quantised:
        return {
            name: Decoded(storage.STORED[weight.dtype], weight.numbers) for name, weight in stored.quantised.items()
        }
    assert isinstance(trained_on, Quantisation)  # of groups, the folder is quantised
    return {
        name: Decoded(entry.dtype, partial(_quantised_numbers, name, entry, trained_on.double))
        for name, entry in stored.entries.items()
        if LINEAR.fullmatch(name) and trained_on.quantises(name.removesuffix(".weight"))
    }


def _quantised_numbers(name: str, entry: storage.Entry, double: bool) -> NDArray:
    return dequantise(quantised_entry(name, entry, double))
