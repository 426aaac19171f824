#!/usr/bin/env bash
# From a fresh machine to a fine-tuned model: makes the environment .venv, then runs examples/quickstart.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV=${LORA_MS_VENV:-$ROOT/.venv}

echo "lora_ms quick start"
echo "  1. a Python environment with MindSpore (first time only)"
echo "  2. a fine-tune of the bundled tiny model: answers before and after, the adapter, a plot of the loss"
make_environment "$VENV" "about 1 GB to download, 3 GB on disk" "$ROOT/requirements/tested.txt" -- \
    --constraint requirements/tested.txt --editable .
export PATH="$VENV/bin:$PATH"
exec "$VENV/bin/python" "$ROOT/examples/quickstart.py" "$@"
