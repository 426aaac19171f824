"""``lora-ms-launcher``: MindFormers' ``msrun_launcher.sh`` for an installed package.

``lora-ms-launcher "run_mindformer.py --config … --use_parallel True" 8``: the arguments of the script.
"""

import os
import sys
from collections.abc import Sequence

from lora_ms.bundled import bundled
from lora_ms.text import WIDTH


def main(argv: Sequence[str] | None = None) -> int:
    """Becomes the script; returns 2 where there is no bash."""
    words = list(sys.argv[1:] if argv is None else argv)
    script, program = bundled("scripts/msrun_launcher.sh"), bundled("run_mindformer.py")
    first, space, rest = words[0].partition(" ") if words else ("", "", "")
    if first == "run_mindformer.py" and not os.path.exists(first):
        words[0] = f"{program}{space}{rest}"
    # the processes start as `python`: the one that has this package
    os.environ["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    try:
        os.execvp("bash", ["bash", str(script), *words])
    except OSError as error:
        print(f"error: bash cannot be started: {error.strerror}"[:WIDTH], file=sys.stderr)
        return 2
