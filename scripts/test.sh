#!/usr/bin/env bash
# Runs the tests in an environment of their own (.venv-test; LORA_MS_VENV=X: X-test), which it makes if needed.
#   test.sh [--with-torch] [PYTEST_ARGUMENTS...]
#   test.sh --setup [--with-torch]      only makes the environment
# In two processes; -n 0 as an argument: in one, as --pdb and -s want it.
# --with-torch also makes .venv-torch (X-torch), with torch and PEFT, and runs the tests against a live PEFT.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV=${LORA_MS_VENV:-$ROOT/.venv}-test
TORCH_VENV=${LORA_MS_VENV:-$ROOT/.venv}-torch
run=yes

while [ $# -gt 0 ]; do
    case $1 in
        --setup) run=no ;;
        --with-torch) export LORA_MS_TORCH_PYTHON=$TORCH_VENV/bin/python ;;
        *) break ;;
    esac
    shift
done

make_environment "$VENV" "about 1.1 GB to download, 3.5 GB on disk" "$ROOT/requirements/tested.txt" -- \
    --constraint requirements/tested.txt --editable ".[mindformers,dev]"
if [ "${LORA_MS_TORCH_PYTHON:-}" = "$TORCH_VENV/bin/python" ]; then
    make_environment "$TORCH_VENV" "torch for CPU is 0.2 GB to download, with CUDA's libraries about 3 GB" \
        "$ROOT/requirements/torch.txt" -- --requirement requirements/torch.txt
fi
if [ "$run" = no ]; then
    exit 0
fi
# Tests start lora-ms, msrun and python by name.
export PATH="$VENV/bin:$PATH"
cd "$ROOT"
# What one test has compiled, the next ones read; a folder of this run's own, so that every run begins with none.
if [ -z "${LORA_MS_GRAPH_CACHE:-}" ]; then
    LORA_MS_GRAPH_CACHE=$(mktemp -d)
    export LORA_MS_GRAPH_CACHE
    trap 'rm -rf "$LORA_MS_GRAPH_CACHE"' EXIT
fi
# Two processes: most of a test's time is MindSpore's compiler, which has one thread. A file stays in one process.
"$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
