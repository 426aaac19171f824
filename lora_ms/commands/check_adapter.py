"""``lora-ms check-adapter``: is an adapter complete, does it fit its model, would a server take it."""

from pathlib import Path

from lora_ms.adapters import peft_files
from lora_ms.adapters.check import FAULT, WARNING, Check, check_files
from lora_ms.recipes.compare_logits import check_logits
from lora_ms.recipes.model_folder import own_model
from lora_ms.text import counted, status_lines


def run(load_adapter: str, load_checkpoint: str | None = None) -> int:
    """Prints a table of checks; returns how many are faults.

    Raises:
        LoraMsError: there is no such folder.
    """
    adapter = Path(load_adapter)
    peft_files.check_adapter_folder(adapter)
    base = own_model(adapter, load_checkpoint)
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


def show(check: Check) -> None:
    """Prints a row of the table."""
    print(*status_lines(check.name, check.status, check.text, name_width=16), sep="\n")
