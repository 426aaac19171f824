"""``lora-ms finetune --dry_run``: a run that is checked and not begun."""

import sys
import textwrap

from lora_ms.config import RunConfig
from lora_ms.recipes.dry_run import dry_run
from lora_ms.text import WIDTH


def run(config: RunConfig, processes: int) -> None:
    """Checks all that can be checked before a run of so many processes; prints "ready", or what is wrong, with status
    2.

    Raises:
        LoraMsError: it cannot be checked at all.
    """
    found = dry_run(config, processes)
    for line in found.doubtful:
        print(f"doubtful: {line}")
    if not found.wrong:
        print("ready")
        return
    print("not ready:")
    for line in found.wrong:
        lines = textwrap.wrap(line, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
        print("  - " + "\n    ".join(lines))
    sys.exit(2)
