"""``lora-ms download``: a model, an adapter or a dataset from a hub."""

from pathlib import Path

from lora_ms.errors import LoraMsError
from lora_ms.recipes.download import NAME, PATTERNS, Wanted, fetch


def run(name: str, kind: str = "model", hub: str = "hf", revision: str | None = None, output_dir: str | None = None):
    """Fetches the files of ``name`` that are read here, into ``output_dir`` or the hub's own cache, and prints where.

    kind: model, adapter or dataset. hub: hf or modelscope. revision: branch, tag or commit.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    if kind not in PATTERNS:
        raise LoraMsError(f"kind {kind!r} is none of {', '.join(PATTERNS)}")
    if not NAME.fullmatch(name):
        raise LoraMsError(f"{name!r} is no name of a hub: they have the form owner/name")
    folder = fetch(Wanted(name, kind, hub, revision), Path(output_dir) if output_dir else None, refresh=True)
    flag = {"model": "load_checkpoint", "adapter": "load_adapter", "dataset": "train_dataset_dir"}[kind]
    found_by = (f" --hub {hub}" if hub != "hf" else "") + (
        f" --revision {revision}" if revision and kind == "model" else ""
    )
    print(f"{folder}\nuse it: --{flag} {output_dir or name + found_by}")
