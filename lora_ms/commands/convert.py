"""``lora-ms convert``: a model's weights from Hugging Face to MindFormers or back, or from a GGUF file."""

from pathlib import Path

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.models.mindformers_names import STYLES
from lora_ms.recipes import gguf
from lora_ms.recipes.convert import to_hugging_face, to_mindformers
from lora_ms.recipes.model_folder import check_type


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
    """Converts the Hugging Face folder or MindFormers checkpoint ``input`` into the other, named ``output``, or a GGUF
    file into a Hugging Face folder.

    naming: of what is written for MindFormers: legacy (its Llama) or mcore.
    concat: write q, k and v as one matrix, and gate and up as one. contiguous: the parts of such a matrix stand one
    below the other, not interleaved.
    load_checkpoint: where ``input`` is MindFormers', the folder with config.json and tokenizer; where it is a GGUF, one
    whose tokenizer is taken in place of the file's.
    dtype: of the weights that are written; auto keeps each one's own.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    source = Path(input)
    target = Path(output)
    check_type(dtype)
    if naming not in STYLES:
        raise LoraMsError(f"naming {naming!r} is none of {', '.join(STYLES)}")
    if not source.exists():
        raise LoraMsError(f"input: {source} does not exist")
    shard_size = storage.parse_size(max_shard_size)
    if source.is_file() and source.suffix.lower() == ".gguf":
        base = None if load_checkpoint is None else Path(load_checkpoint)
        lines = gguf.to_hugging_face(source, target, base, dtype=dtype, shard_size=shard_size, overwrite=overwrite)
    elif (source / "config.json").is_file():
        lines = to_mindformers(
            source,
            target,
            naming=naming,
            concat=concat,
            contiguous=contiguous,
            dtype=storage.STORED.get(dtype),
            shard_size=shard_size,
            overwrite=overwrite,
        )
    elif load_checkpoint is None or not (Path(load_checkpoint) / "config.json").is_file():
        raise LoraMsError(
            f"{source} has no config.json: give --load_checkpoint, a Hugging Face folder of the model's kind "
            "(config.json and the tokenizer are taken from it)"
        )
    else:
        lines = to_hugging_face(
            source,
            target,
            Path(load_checkpoint),
            contiguous=contiguous,
            dtype=dtype,
            shard_size=shard_size,
            overwrite=overwrite,
        )
    print(*lines, sep="\n")
