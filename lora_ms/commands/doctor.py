"""``lora-ms doctor``: is this machine ready for a run. Works without MindSpore."""

from lora_ms.recipes.doctor import FAULT, clear_graphs, findings
from lora_ms.text import counted, status_lines


def run(msrun: bool = True, clear_cache: bool = False) -> int:
    """Prints what is found; returns the number of faults.

    msrun: also start two processes. clear_cache: only remove the compiled graphs that are kept.

    Raises:
        LoraMsError: they cannot be removed.
    """
    if clear_cache:
        print(clear_graphs())
        return 0
    faults = 0
    for finding in findings(msrun):
        faults += finding.status == FAULT
        print(*status_lines(finding.name, finding.status, finding.text, name_width=14), sep="\n", flush=True)
    print("no problem found" if not faults else f"{counted(faults, 'problem')}, see above")
    return faults
