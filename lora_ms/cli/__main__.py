"""``python -m lora_ms.cli`` is ``lora-ms``."""

import sys

from lora_ms.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
