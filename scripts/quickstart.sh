#!/usr/bin/env bash
# From a fresh machine to a fine-tuned model: makes the environment .venv, then runs examples/quickstart.py, or with
# --model smollm2 examples/quickstart_smollm2.py. --name, --author and --output_dir are the examples' own.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV=${LORA_MS_VENV:-$ROOT/.venv}
model=tiny
arguments=()
USAGE="usage: bash $0 [--model tiny|smollm2] [--name NAME] [--author NAME] [--output_dir DIR]"
refuse() {
    echo "error: $*" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
        --model) model=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
        --model=*) model=${1#--model=}; shift ;;
        --name | --author | --output_dir)
            [ $# -gt 1 ] || refuse "$1 has no value: write $1 VALUE"
            arguments+=("$1" "$2"); shift 2 ;;
        --name=* | --author=* | --output_dir=*) arguments+=("$1"); shift ;;
        -h | --help) echo "$USAGE"; exit ;;
        *) refuse "unknown argument $1; $USAGE" ;;
    esac
done
case $model in
    tiny) example=quickstart.py what="the bundled tiny model" ;;
    smollm2) example=quickstart_smollm2.py what="SmolLM2-135M (93 MB to download, some 3 minutes)" ;;
    '') refuse "--model has no value: write --model tiny" ;;
    *) refuse "--model $model is none of tiny, smollm2" ;;
esac

echo "lora_ms quick start"
echo "  1. a Python environment with MindSpore (first time only)"
echo "  2. a fine-tune of $what: answers before and after, the adapter, a plot of the loss"
make_environment "$VENV" "about 1 GB to download, 3 GB on disk" "$ROOT/requirements/tested.txt" -- \
    --constraint requirements/tested.txt --editable .
export PATH="$VENV/bin:$PATH"
if [ "$model" = smollm2 ] && ! "$VENV/bin/python" -c "import gguf" 2>/dev/null; then
    "$VENV/bin/python" -m pip install --quiet --constraint "$ROOT/requirements/tested.txt" gguf
fi
exec "$VENV/bin/python" "$ROOT/examples/$example" "${arguments[@]}"
