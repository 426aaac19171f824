"""``lora-ms doctor``: is this machine ready for a run. Works without MindSpore."""

from lora_ms.recipes.doctor import FAULT, findings
from lora_ms.text import status_lines


def run(msrun: bool = True) -> int:
    """Prints what is found; returns the number of faults.

    msrun: also start two processes.
    """
    faults = 0
    for finding in findings(msrun):
        faults += finding.status == FAULT
        print(*status_lines(finding.name, finding.status, finding.text, name_width=14), sep="\n", flush=True)
    print("nothing is broken" if not faults else f"{faults} to fix, see above")
    return faults
