#!/usr/bin/env bash
# Runs a command as an Orange Pi AIpro needs it, whose memory host and card share: few compilers, little memory held by
# the allocator and, where asked for, a limit, so that a run that wants too much ends and the board stays alive.
#   bash scripts/orangepi_env.sh [--limit 4GB] [--swap 8GB] lora-ms finetune --config … --low_memory True
#   source scripts/orangepi_env.sh          sets the variables in this shell, and nothing else
# --limit needs control groups (root, or systemd for a user); --swap makes /swapfile_lora_ms and needs root.

export MAX_COMPILE_CORE_NUMBER=1   # Ascend's operator compiler: one process
export TE_PARALLEL_COMPILER=1
export MALLOC_ARENA_MAX=2          # glibc keeps freed memory in so many heaps, not in eight for every core
export MALLOC_TRIM_THRESHOLD_=131072
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1

(return 0 2>/dev/null) && return

set -euo pipefail

usage() {
    echo "error: $1; usage: bash $0 [--limit SIZE] [--swap SIZE] COMMAND …   (SIZE such as 4GB)" >&2
    exit 2
}

megabytes() {  # 4GB, 1.5GB or 800MB
    [[ "$1" =~ ^([0-9]+)(\.([0-9]))?(GB|MB)$ ]] || usage "SIZE is a number with GB or MB, not '$1'"
    local tenths=$((BASH_REMATCH[1] * 10 + ${BASH_REMATCH[3]:-0}))
    if [ "${BASH_REMATCH[4]}" = GB ]; then
        echo $((tenths * 1024 / 10))
    else
        echo $((tenths / 10))
    fi
}

make_swap() {  # MEGABYTES
    local file=/swapfile_lora_ms
    if [ -e $file ]; then
        swapon $file 2>/dev/null || true
        return
    fi
    [ "$(id -u)" = 0 ] || usage "--swap needs root: sudo bash $0 …"
    local part=$file.part  # cut short, it is not taken for the file by the next call
    trap "rm -f $part" EXIT
    if ! dd if=/dev/zero of=$part bs=1M count="$1" status=none 2>/dev/null; then
        echo "error: --swap: $1 MB cannot be written to $file: free space on that disk, or give a smaller SIZE" >&2
        exit 1
    fi
    chmod 600 $part
    mkswap $part >/dev/null
    mv $part $file
    swapon $file
}

LIMIT=
while [ $# -gt 0 ]; do
    case $1 in
        --limit) LIMIT=$(megabytes "${2:-}"); shift 2 ;;
        --swap) SWAP=$(megabytes "${2:-}"); make_swap "$SWAP"; shift 2 ;;
        --*) usage "unknown option $1" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || usage "no command"
if [ -z "$LIMIT" ]; then
    exec "$@"
fi

V1=/sys/fs/cgroup/memory
if [ -w $V1 ] && [ -e $V1/memory.limit_in_bytes ]; then
    group=$V1/lora_ms_$$
    mkdir $group
    echo $((LIMIT * 1024 * 1024)) >$group/memory.limit_in_bytes
    status=0
    (echo $BASHPID >$group/cgroup.procs && exec "$@") || status=$?
    rmdir $group 2>/dev/null || true
    exit $status
elif command -v systemd-run >/dev/null && systemd-run --user --scope true 2>/dev/null; then
    exec systemd-run --user --scope --quiet -p "MemoryMax=${LIMIT}M" "$@"
fi
echo "warning: no control group can be made here (try sudo): running without a limit" >&2
exec "$@"
