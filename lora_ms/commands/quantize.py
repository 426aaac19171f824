"""``lora-ms quantize``: a model with its layers' weights in four bits, written tensor by tensor."""

from functools import partial
from pathlib import Path

from lora_ms import saving, storage
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import CONFIG, open_model, says_tied
from lora_ms.quant.folder import LINEAR, planned_nf4, quantised_entry
from lora_ms.quant.settings import Quantisation
from lora_ms.recipes.model_folder import check_output, copy_texts
from lora_ms.text import size_text

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of weights that are quantised


def run(
    load_checkpoint: str,
    output_dir: str,
    type: str = "nf4",
    double: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes the quantised model into ``output_dir``, atomically. The head, the embedding and the norms stay whole.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    if type != "nf4":
        raise LoraMsError(f"type {type!r} is not supported: nf4 is")
    shard_size = storage.parse_size(max_shard_size)
    base, output = Path(load_checkpoint), Path(output_dir)
    if not base.is_dir():
        raise LoraMsError(f"load_checkpoint: {base} is not a folder; give a Hugging Face directory")
    from lora_ms.models.hub import read_config

    _, hf = read_config(base)  # of others, such as those with experts, most weights are in other places
    stored = open_model(base, hf)
    if stored.quantised or hf.get("quantization_config"):
        raise LoraMsError(f"{base} is quantised already: give the model that it was made of")
    check_output(output, base, base, overwrite)
    for line in stored.notices:
        print(line)
    planned = plan(stored.entries, double)
    size = sum(tensor.size for tensor in planned.values())
    before = sum(entry.end - entry.start for entry in stored.entries.values())
    settings = Quantisation(double).to_config()
    print(f"quantising {base}: {size_text(before)} -> {size_text(size)}")
    with saving.new_folder(output, size, storage.MODEL_FILES) as folder:
        for file in storage.write_model(folder, planned, shard_size):
            print(f"  {file.name}  {size_text(file.stat().st_size)}")
        copy_texts(base, base, folder)
        unties = {} if stored.tied == says_tied(hf) else {"tie_word_embeddings": stored.tied}
        storage.write_json(folder / CONFIG, {**hf, **unties, "quantization_config": settings})
    print(
        f"quantised model: {output}   (transformers loads it with bitsandbytes; train adapters on it as on any model)"
    )


def plan(entries: dict[str, storage.Entry], double: bool) -> dict[str, storage.Planned]:
    """The tensors to write, in the order of ``entries``.

    Raises:
        LoraMsError: no layers, or a weight of a type that is not read.
    """
    planned: dict[str, storage.Planned] = {}
    quantised = 0
    for name, entry in entries.items():
        if entry.dtype not in storage.DTYPES:
            raise LoraMsError(f"{entry.file}: {name} is of type {entry.dtype}, which is not supported")
        if not LINEAR.fullmatch(name) or len(entry.shape) != 2:
            planned[name] = storage.Planned(entry.dtype, entry.shape, partial(storage.read_words, entry))
            continue
        if entry.dtype not in TYPES or entry.shape[0] * entry.shape[1] % 2:
            raise LoraMsError(f"{entry.file}: {name}, {entry.dtype} {list(entry.shape)}, cannot be stored in NF4")
        weight = partial(quantised_entry, name, entry, double)
        planned |= planned_nf4(name, (entry.shape[0], entry.shape[1]), TYPES[entry.dtype], double, weight)
        quantised += 1
    if not quantised:
        raise LoraMsError("nothing to quantise: the folder holds no layers with projections")
    return planned
