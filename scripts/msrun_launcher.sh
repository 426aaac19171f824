#!/usr/bin/env bash
# Starts a command on several cards, or several CPU processes, with MindSpore's msrun. MindFormers' arguments:
#   "CMD" [N]                                                     all N (default 8) processes on this machine
#   "CMD" N PORT LOG_DIR JOIN TIMEOUT                             the same, with msrun's settings
#   "CMD" N LOCAL ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT        LOCAL of the N processes here, the rest elsewhere
# Defaults: N 8, PORT 8118, LOG_DIR output/msrun_log, JOIN False (return at once), TIMEOUT 7200 seconds.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    echo "error: $1; usage: bash $0 \"CMD\" [N] | \"CMD\" N PORT LOG_DIR JOIN TIMEOUT |" \
        "\"CMD\" N LOCAL ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT" >&2
    exit 2
}

whole() {  # NAME VALUE LEAST
    [[ "$2" =~ ^-?[0-9]{1,9}$ ]] && [ "$2" -ge "$3" ] || usage "$1 must be a whole number, at least $3, not '$2'"
}

N=8 LOCAL='' ADDR=127.0.0.1 PORT=8118 NODE_RANK=0 LOG_DIR=output/msrun_log JOIN=False TIMEOUT=7200
case $# in
    1) ;;
    2) N=$2 ;;
    6) N=$2 PORT=$3 LOG_DIR=$4 JOIN=$5 TIMEOUT=$6 ;;
    9) N=$2 LOCAL=$3 ADDR=$4 PORT=$5 NODE_RANK=$6 LOG_DIR=$7 JOIN=$8 TIMEOUT=$9 ;;
    *) usage "1, 2, 6 or 9 arguments, not $#" ;;
esac
whole N "$N" 1
LOCAL=${LOCAL:-$N}
whole LOCAL "$LOCAL" 1
[ "$LOCAL" -le "$N" ] || usage "LOCAL ($LOCAL) is more than N ($N)"
whole PORT "$PORT" 1
whole NODE_RANK "$NODE_RANK" 0
whole TIMEOUT "$TIMEOUT" -1
case $JOIN in
    True | true) JOIN=True ;;
    False | false) JOIN=False ;;
    *) usage "JOIN must be True or False, not '$JOIN'" ;;
esac

# xargs splits as a shell does, quotes included, but expands nothing: a glob in CMD is for the program.
split=$(xargs printf '%s\n' <<<"$1") || usage "CMD has an unmatched quote: $1"
mapfile -t command <<<"$split"
if [[ "${command[0]}" =~ ^python(3(\.[0-9]+)?)?$ ]]; then
    command=("${command[@]:1}")
fi
[ -n "${command[0]:-}" ] || usage "CMD is empty"
if [ ! -e "${command[0]}" ] && [ -e "$ROOT/${command[0]}" ]; then
    command[0]=$ROOT/${command[0]}
fi

if ! command -v msrun >/dev/null; then
    BIN=${LORA_MS_VENV:-$ROOT/.venv}/bin
    [ -x "$BIN/msrun" ] || die "no msrun on PATH nor in $BIN; run 'bash scripts/quickstart.sh' first, it installs MindSpore"
    # The processes start as `python`, so PATH must have the environment's.
    export PATH="$BIN:$PATH"
fi

first=$((LOCAL == N ? 0 : NODE_RANK * LOCAL))
last=$((first + LOCAL - 1))
if [ $first = $last ]; then
    logs=worker_$first.log
else
    logs="worker_$first.log … worker_$last.log"
fi
echo "Starting $LOCAL of $N processes: ${command[*]}"
echo "Logs: $LOG_DIR/$logs, scheduler.log. Follow the run with: tail -f $LOG_DIR/worker_$first.log"

# Only errors from MindSpore's own log: its warnings while the processes meet fill screens.
export GLOG_v=${GLOG_v:-3}
# msrun ends with status 0 at Ctrl+C.
interrupted=no
trap 'interrupted=yes' INT
status=0
msrun --worker_num="$N" --local_worker_num="$LOCAL" --master_addr="$ADDR" --master_port="$PORT" \
    --node_rank="$NODE_RANK" --log_dir="$LOG_DIR" --join="$JOIN" --cluster_time_out="$TIMEOUT" "${command[@]}" || status=$?

if [ $interrupted = yes ]; then
    exit 130
fi
if [ $status != 0 ]; then
    echo "error: the run failed, with status $status; the full logs are in $LOG_DIR" >&2
    # msrun kills the others when one fails: theirs end without an error.
    for ((rank = first; rank <= last; rank++)); do
        log=$LOG_DIR/worker_$rank.log
        if grep -qsiE '^[a-z_.]*(error|exception)\b' "$log"; then
            echo "--- the last lines of $log" >&2
            grep -vE '^\[(INFO|WARNING)\]' "$log" | tail -n 20 >&2 || true
            break
        fi
    done
fi
exit $status
