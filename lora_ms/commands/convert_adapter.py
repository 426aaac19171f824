"""``lora-ms convert-adapter``: an adapter in PEFT's format from a LoRA checkpoint of MindFormers, or back."""

from pathlib import Path

from lora_ms import saving, storage
from lora_ms.adapters.peft_files import ADAPTER_FILES, CONFIG, WEIGHTS, base_name, check_output, read_settings
from lora_ms.bridge import adapters
from lora_ms.bridge.files import SUFFIXES, read_file, write_file
from lora_ms.bridge.layout import Heads, heads_of
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import model_config
from lora_ms.models.mindformers_names import mindformers_module


def run(
    input: str,
    output: str,
    naming: str = "mindpet",
    concat: bool = False,
    contiguous: bool = False,
    lora_alpha: float | None = None,
    load_checkpoint: str | None = None,
    overwrite: bool = False,
) -> None:
    """Converts the PEFT folder or MindFormers checkpoint ``input`` into the other, named ``output``.

    naming: of the MindFormers checkpoint that is written; that of one that is read follows from its names.
    concat: write q, k and v as one matrix, and gate and up as one. contiguous: the parts of such a matrix stand one
    below the other, not interleaved.
    load_checkpoint: the model's Hugging Face folder, for its head counts and the adapter's base.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    if naming not in adapters.NAMINGS:
        raise LoraMsError(f"naming {naming!r} is none of {', '.join(adapters.NAMINGS)}")
    source = Path(input)
    target = Path(output)
    if not source.exists():
        raise LoraMsError(f"input: {source} does not exist; give an adapter's folder, or a .ckpt or .safetensors file")
    if (source / WEIGHTS).is_file():
        if target.suffix not in SUFFIXES:
            raise LoraMsError(f"output: {target} must end in {' or '.join(SUFFIXES)}: {source} is in PEFT's format")
        if target.is_file() and not overwrite:
            raise LoraMsError(f"output {target} is there already: give another name, or --overwrite True")
        to_mindformers(source, target, naming, concat, heads_at(load_checkpoint or base_name(source), contiguous))
    else:
        if target.suffix in SUFFIXES:
            raise LoraMsError(f"output: {target} must be a folder: {source} is a MindFormers checkpoint")
        check_output(target, overwrite)
        to_peft(source, target, lora_alpha, heads_at(load_checkpoint, contiguous), load_checkpoint)


def heads_at(base: str | None, contiguous: bool) -> Heads | None:
    """The attention sizes of the model in folder ``base``; None where there is no such folder."""
    if base is None or not (Path(base) / "config.json").is_file():
        return None
    return heads_of(model_config(Path(base)), Path(base) / "config.json", contiguous)


def to_mindformers(source: Path, target: Path, naming: str, concat: bool, heads: Heads | None) -> None:
    """Writes the MindFormers checkpoint, and says what its ``pet_config`` must be."""
    factors, scale = adapters.read_peft(source)
    tensors = adapters.mindformers_tensors(factors, naming, concat, heads, source)
    write_file(target, tensors)
    style = adapters.NAMINGS[naming][0]
    leaves = dict.fromkeys((mindformers_module(module, style) or module).rpartition(".")[2] for module in factors)
    targets = "|".join(f".*{leaf}" for leaf in leaves)
    print(f"{len(factors)} modules in {len(tensors)} tensors ({naming} names): {target}")
    print(
        f"in the YAML: pet_config: {{pet_type: lora, lora_rank: {scale.lora_rank}, lora_alpha: {scale.lora_alpha:g}, "
        f"target_modules: '{targets}'}}"
    )


def to_peft(source: Path, target: Path, lora_alpha: float | None, heads: Heads | None, base: str | None) -> None:
    """Writes the PEFT folder."""
    alpha = alpha_of(source) if lora_alpha is None else lora_alpha
    if alpha <= 0:
        raise LoraMsError(f"lora_alpha expects more than 0, got {alpha:g}")
    factors = adapters.read_factors(read_file(source), heads, source)
    with saving.new_folder(target, replaced=ADAPTER_FILES) as part:
        storage.write_blocks(part / WEIGHTS, adapters.peft_tensors(factors))
        storage.write_json(part / CONFIG, adapters.peft_config(factors, alpha, base))
    print(f"{len(factors)} modules: {target}")
    print(f"check it: lora-ms check-adapter --load_adapter {target} --load_checkpoint {base or 'MODEL'}")


def alpha_of(source: Path) -> float:
    """``lora_alpha`` of the adapter_config.json that MindFormers leaves beside a checkpoint.

    Raises:
        LoraMsError: there is none.
    """
    folder = source if source.is_dir() else source.parent
    if (folder / CONFIG).is_file():
        alpha = read_settings(folder).get("lora_alpha")
        if isinstance(alpha, (int, float)):
            return alpha
    raise LoraMsError(f"{source} does not hold its lora_alpha: give --lora_alpha, as pet_config had it in training")
