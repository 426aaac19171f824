"""``lora-ms export gguf``: a model or an adapter for llama.cpp and Ollama."""

from pathlib import Path

from lora_ms.adapters.peft_files import check_adapter_folder
from lora_ms.errors import LoraMsError
from lora_ms.recipes.gguf import export
from lora_ms.recipes.model_folder import base_of, check_type


def run(
    output_dir: str,
    load_checkpoint: str | None = None,
    load_adapter: str | None = None,
    with_base: bool = False,
    dtype: str = "auto",
    overwrite: bool = False,
) -> None:
    """Writes ``model.gguf`` of a folder, or ``adapter.gguf`` of an adapter, and a Modelfile into ``output_dir``.

    with_base: beside an adapter, write its model, too. dtype: of the model's matrices; auto: their own.

    Raises:
        LoraMsError: anything that a user can fix, and what GGUF has no place for.
    """
    check_type(dtype)
    if load_adapter is None and load_checkpoint is None:
        raise LoraMsError("what is to be exported? give --load_checkpoint, a model's folder, or --load_adapter")
    adapter = None if load_adapter is None else Path(load_adapter)
    if adapter is not None:
        check_adapter_folder(adapter)
    base = base_of(adapter or Path(), load_checkpoint)
    print(*export(base, adapter, Path(output_dir), dtype=dtype, with_base=with_base, overwrite=overwrite), sep="\n")
