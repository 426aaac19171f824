#!/usr/bin/env bash
# What works on the Ascend card of this machine: writes ascend_report.txt, one file to send. It holds versions, results
# and errors, and no data of yours.
#   bash scripts/ascend_report.sh
# In the environment: DEVICE=CPU tries the report itself on a machine without a card; REPORT names the file; QUICK=1
# tries a few operators and one model; PYTHON names the Python with MindSpore (default: .venv's, else python).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# = 0 ] || die "ascend_report.sh takes no arguments: set DEVICE=CPU, REPORT, QUICK=1 or PYTHON before the command"
export DEVICE=${DEVICE:-Ascend} GLOG_v=${GLOG_v:-3}
report=$(realpath -m "${REPORT:-ascend_report.txt}")
python=${PYTHON:-${LORA_MS_VENV:-$ROOT/.venv}/bin/python}
if [ ! -x "$python" ]; then
    python=$(command -v "${PYTHON:-python}") || die "there is no Python with MindSpore; name it: PYTHON=/path/to/python"
fi
options=(--device "$DEVICE")
if [ -n "${QUICK:-}" ]; then
    options+=(--quick)
fi
cd "$ROOT"

# Runs a command and keeps what it says; one that is absent or fails is said, and does not end the report.
section() {  # TITLE COMMAND...
    echo "== $1"
    shift
    if ! command -v "$1" >/dev/null; then
        echo "$1 is not installed"
    else
        "$@" 2>&1 || echo "(ended with status $?)"
    fi
    echo
}

versions() {
    grep -h '^__version__' lora_ms/__init__.py
    git rev-parse --short HEAD 2>/dev/null || true
    uname -srm
    "$python" --version
    "$python" -m pip list 2>/dev/null | grep -iE '^(mindspore|mindformers|mindpet|numpy|transformers|te|hccl) ' || true
    cat /usr/local/Ascend/driver/version.info 2>/dev/null || echo "no Ascend driver in /usr/local/Ascend/driver"
    env | grep -E '^(ASCEND|HCCL|MS_)[A-Z_]*=' | sort || true
}

{
    echo "lora_ms: report of $(date -u +%Y-%m-%dT%H:%MZ), device $DEVICE"
    echo
    section versions versions
    section npu-smi npu-smi info
    section topology npu-smi info -t topo
    section doctor "$python" -m lora_ms.cli doctor --msrun False
    section tries "$python" scripts/ascend_report.py "${options[@]}"
} | tee "$report"
echo "written to $report: please send this file"
