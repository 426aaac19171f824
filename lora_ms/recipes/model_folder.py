"""A Hugging Face folder of a model: where it is, whether it may be written, and what is copied besides weights.

Loads without MindSpore.
"""

from pathlib import Path

from lora_ms.adapters import peft_files
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import GENERATION
from lora_ms.reading import JSON_SIZE, member, read_bytes

TYPES = ("float16", "bfloat16", "float32", "auto")  # of the weights that are written; auto: as they are stored
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


def check_type(dtype: str) -> None:
    """Raises LoraMsError where ``dtype`` is not one of TYPES."""
    if dtype not in TYPES:
        raise LoraMsError(f"dtype {dtype!r} is none of {', '.join(TYPES)}")


def base_of(adapter: Path, load_checkpoint: str | None, hub: str = "hf") -> Path:
    """The folder of the adapter's model: ``load_checkpoint``, else the one that the adapter names, here or on ``hub``.

    Raises:
        LoraMsError: there is none.
    """
    if load_checkpoint is None:
        peft_files.read_adapter_config(adapter)
        named = peft_files.base_name(adapter)
        from lora_ms.recipes.download import is_name, local_folder

        if named is not None and is_name(named):
            return local_folder(named, hub=hub, said="which model? give --load_checkpoint with the adapter's own; ")
        if named is None or not Path(named).is_dir():
            what = f"the adapter's own, {named}, is no directory here" if named else "the adapter names none"
            raise LoraMsError(f"which model? {what}: give --load_checkpoint with its Hugging Face directory")
        return Path(named)
    base = Path(load_checkpoint)
    if not base.is_dir():
        state = "is a file" if base.exists() else "does not exist"
        raise LoraMsError(f"load_checkpoint: {base} {state}; give a Hugging Face directory")
    return base


def own_model(adapter: Path, load_checkpoint: str | None = None) -> Path | None:
    """The model's folder, if there is one here: what the adapter names by a hub's name may lie in a cache.

    Raises:
        LoraMsError: ``load_checkpoint`` is given and is not a folder.
    """
    if load_checkpoint is not None and not Path(load_checkpoint).is_dir():
        raise LoraMsError(
            f"load_checkpoint: {load_checkpoint} is not a folder; give the model's Hugging Face directory"
        )
    try:
        named = load_checkpoint or peft_files.base_name(adapter)
    except LoraMsError:
        return None  # the table says what is wrong with the settings
    from lora_ms.recipes.download import cached_folder, is_name

    if named and is_name(named):
        return cached_folder(named)
    return Path(named) if named and Path(named).is_dir() else None


def check_output(output: Path, base: Path, adapter: Path, overwrite: bool) -> None:
    """Raises LoraMsError where a model may not be written to ``output``: over its source, or over another model."""
    if not output.is_dir():
        return
    if output.samefile(base):
        raise LoraMsError(f"output_dir {output} is the model itself: give another folder")
    if output.samefile(adapter) or (output / peft_files.CONFIG).exists():
        raise LoraMsError(f"output_dir {output} holds an adapter, which would be loaded on top: give another folder")
    old = [file.name for file in output.iterdir() if file.suffix in (".safetensors", ".bin")]
    if (old or (output / "config.json").exists()) and not overwrite:
        raise LoraMsError(f"output_dir {output} holds a model: give another folder, or --overwrite True")


def config_for(hf: dict, dtype: str, untied: bool) -> dict:
    """config.json of the written model: ``hf``, the source's, with the type of the weights and of the head."""
    changed = dict(hf)
    if dtype != "auto":
        key = "dtype" if "dtype" in hf or "rope_parameters" in hf else "torch_dtype"
        changed = {k: v for k, v in hf.items() if k not in ("dtype", "torch_dtype")} | {key: dtype}
    return changed | ({"tie_word_embeddings": False} if untied else {})


def copy_texts(base: Path, adapter: Path, output: Path) -> list[str]:
    """Copies tokenizer, chat template and generation settings; an adapter's tokenizer replaces the model's.

    Returns the names of the files.
    """
    # files of two tokenizers must not mix
    from_adapter = (adapter / "tokenizer_config.json").is_file()
    copied = []
    for name in (*TOKENIZER_FILES, GENERATION):
        sources = [adapter] if from_adapter and name != GENERATION else [adapter, base]
        source = next((folder / name for folder in sources if (folder / name).exists()), None)
        if source is None:
            continue
        if source.is_dir():
            (output / name).mkdir()
            for file in sorted(source.glob("*.jinja")):
                _copy(source.parent, f"{name}/{file.name}", output)
        else:
            _copy(source.parent, name, output)
        copied.append(name)
    return copied


def _copy(folder: Path, name: str, output: Path) -> None:
    (output / name).write_bytes(read_bytes(member(folder, name), JSON_SIZE))
