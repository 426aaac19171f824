"""``lora-ms adapters combine``: several adapters made into one. MindSpore and the base model are not needed."""

from pathlib import Path

from lora_ms import saving
from lora_ms.adapters.combine import COMBINATIONS, combine, read_adapter, write_adapter
from lora_ms.adapters.peft_files import ADAPTER_FILES, base_name, check_adapter_folder, check_output
from lora_ms.data.tokenizer import load_tokenizer, save_tokenizer
from lora_ms.errors import LoraMsError


def methods() -> dict[str, str]:
    """The methods of combining with what each does, for ``--help``."""
    return COMBINATIONS


def run(
    adapters: list[str],
    weights: list[float],
    method: str,
    density: float | None,
    rank: int | None,
    seed: int,
    output_dir: str,
    overwrite: bool = False,
) -> None:
    """Writes the weighted combination of the adapter folders into ``output_dir``, with the first tokenizer found.

    Raises:
        LoraMsError: adapters that cannot be combined so, or ``output_dir`` is one of them, or holds another.
    """
    if any(Path(path).resolve() == Path(output_dir).resolve() for path in adapters):
        raise LoraMsError(f"output_dir {output_dir} is one of the adapters: give another folder")
    for path in adapters:
        check_adapter_folder(Path(path), "adapters")
    check_output(Path(output_dir), overwrite)
    combined = combine([read_adapter(path) for path in adapters], weights, method, density, rank, seed)
    bases = {path: base for path in adapters if (base := base_name(Path(path)))}
    if len(set(bases.values())) > 1:
        named = "; ".join(f"{path}: {base}" for path, base in bases.items())
        print(f"warning: the adapters name different base models, and fit together only on one: {named}")
    tokenizers = [load_tokenizer(path) for path in adapters if (Path(path) / "tokenizer_config.json").is_file()]
    with saving.new_folder(Path(output_dir), replaced=ADAPTER_FILES) as part:
        write_adapter(combined, part, next(iter(bases.values()), None))
        if tokenizers:
            save_tokenizer(tokenizers[0], part)
    modules = len(combined.tensors)
    new_rank = max(len(pair.a) for pair in combined.tensors.values())
    print(f"{len(adapters)} adapters combined by {method}: rank {new_rank} on {modules} modules, {output_dir}")
