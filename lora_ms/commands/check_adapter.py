"""``lora-ms check-adapter``: is an adapter complete, does it fit its model, would a server take it."""

from pathlib import Path

from lora_ms.adapters import peft_files
from lora_ms.adapters.check import FAULT, WARNING, Check, check_files
from lora_ms.errors import LoraMsError
from lora_ms.recipes import download
from lora_ms.recipes.compare_logits import check_logits
from lora_ms.text import counted, status_lines


def run(load_adapter: str, load_checkpoint: str | None = None) -> int:
    """Prints a table of checks; returns how many are faults.

    Raises:
        LoraMsError: there is no such folder.
    """
    adapter = Path(load_adapter)
    peft_files.check_adapter_folder(adapter)
    base = model_of(adapter, load_checkpoint)
    checks = []
    for found in check_files(adapter, base):
        checks.append(found)
        show(found)
    if base is not None and all(found.status != FAULT for found in checks):
        checks.append(check_logits(adapter, base))
        show(checks[-1])
    faults, warnings = (sum(found.status == status for found in checks) for status in (FAULT, WARNING))
    print(f"{adapter}: {counted(faults, 'fault')}, {counted(warnings, 'warning')}")
    return faults


def model_of(adapter: Path, load_checkpoint: str | None) -> Path | None:
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
    if named and download.is_name(named):
        return download.cached_folder(named)
    return Path(named) if named and Path(named).is_dir() else None


def show(check: Check) -> None:
    """Prints a row of the table."""
    print(*status_lines(check.name, check.status, check.text, name_width=16), sep="\n")
