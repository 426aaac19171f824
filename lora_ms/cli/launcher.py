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
    script = bundled("scripts/msrun_launcher.sh")  # which finds the run_mindformer.py that comes with it
    # the processes start as `python`: the one that has this package
    os.environ["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    try:
        os.execvp("bash", ["bash", str(script), *words])
    except OSError as error:
        print(f"error: bash cannot be started: {error.strerror}"[:WIDTH], file=sys.stderr)
        return 2
