#!/usr/bin/env bash
# Starts a command on several cards, or several CPU processes, with MindSpore's msrun. MindFormers' arguments:
#   "CMD" [N]                                                     all N (default 8) processes on this machine
#   "CMD" N PORT LOG_DIR JOIN TIMEOUT                             the same, with msrun's settings
#   "CMD" N LOCAL ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT        LOCAL of the N processes here, the rest elsewhere
# Defaults: N 8, PORT 8118, LOG_DIR output/msrun_log, JOIN False (return at once), TIMEOUT 7200 seconds.
# A process that fails ends them all. Ctrl-C lets each finish the step under way and save; a second one ends them at once.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE="usage: bash $0 \"CMD\" [N] | \"CMD\" N PORT LOG_DIR JOIN TIMEOUT |"
USAGE+=" \"CMD\" N LOCAL ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT"

usage() {
    echo "error: $1; $USAGE" >&2
    exit 2
}

whole() {  # NAME VALUE LEAST
    [[ "$2" =~ ^-?[0-9]{1,9}$ ]] && [ "$2" -ge "$3" ] || usage "$1 must be a whole number, at least $3, not '$2'"
}

N=8 LOCAL='' ADDR=127.0.0.1 PORT=8118 NODE_RANK=0 LOG_DIR=output/msrun_log JOIN=False TIMEOUT=7200
case ${1:-} in
    -h | --help)
        echo "$USAGE"
        exit
        ;;
esac
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
split=$(xargs printf '%s\n' <<<"$1" 2>/dev/null) || usage "CMD has an unmatched quote: $1"
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
if [ $first = 0 ] && (exec 4<>"/dev/tcp/$ADDR/$PORT") 2>/dev/null; then
    die "port $PORT of $ADDR is in use, perhaps by another run; give a PORT of your own (\"CMD\" N PORT LOG_DIR JOIN TIMEOUT)"
fi
mkdir -p "$LOG_DIR" 2>/dev/null && [ -w "$LOG_DIR" ] || die "LOG_DIR $LOG_DIR cannot be written; give another"
if [ $JOIN = False ]; then
    setsid bash "$0" "$1" "$N" "$LOCAL" "$ADDR" "$PORT" "$NODE_RANK" "$LOG_DIR" True "$TIMEOUT" \
        </dev/null >"$LOG_DIR/launcher.log" 2>&1 &
    echo "Starting $LOCAL of $N processes: ${command[*]}"
    echo "Logs: $LOG_DIR/$logs, scheduler.log; launcher.log says how it ends."
    echo "Follow the run with: tail -f $LOG_DIR/worker_$first.log. Stop it with: kill $!"
    exit 0
fi
echo "Starting $LOCAL of $N processes: ${command[*]}"
echo "Logs: $LOG_DIR/$logs, scheduler.log. Follow the run with: tail -f $LOG_DIR/worker_$first.log"

# Prints what rank each process of this run has, as each writes it into its log.
processes() {
    for ((rank = first; rank <= last; rank++)); do
        sed -n "s/^rank $rank is process \\([0-9]*\\)\$/$rank \\1/p" "$LOG_DIR/worker_$rank.log" 2>/dev/null
    done
}

alive() {  # PROCESS: it is there, and no zombie
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) }
    [ "${stat:0:1}" != Z ]
}

# Prints which of msrun's processes is the scheduler.
find_scheduler() {
    local child
    for child in $children; do
        if grep -qzx MS_ROLE=MS_SCHED "/proc/$child/environ" 2>/dev/null; then
            echo "$child"
            return
        fi
    done
}

# Ends the run where msrun or its scheduler has ended and the others have not: they could wait for TIMEOUT seconds.
GRACE=30  # seconds: a scheduler may end shortly before the others
children='' scheduler='' gone='' lost=''
watch() {
    if ! alive "$msrun"; then
        lost="msrun, process $msrun,"
    else
        children=$(cat "/proc/$msrun/task/$msrun/children" 2>/dev/null || true)
    fi
    if [ -z "$lost" ] && [ -z "$scheduler" ]; then
        scheduler=$(find_scheduler)
    elif [ -z "$lost" ] && ! alive "$scheduler"; then
        gone=${gone:-$SECONDS}
        if [ $((SECONDS - gone)) -ge $GRACE ]; then
            lost="msrun's scheduler, process $scheduler,"
        fi
    fi
    if [ -n "$lost" ]; then
        # shellcheck disable=SC2086
        kill -KILL -- "-$msrun" $children 2>/dev/null || true
    fi
}

stops=0
stop() {
    stops=$((stops + 1))
    local workers
    mapfile -t workers < <(processes | cut -d ' ' -f 2)
    if [ $stops = 1 ] && [ ${#workers[@]} != 0 ]; then
        echo "Stopping after the step under way …" >&2
        kill -INT "${workers[@]}" 2>/dev/null || true
    else
        kill -INT "$msrun" 2>/dev/null || true  # which ends all of them
    fi
}

for ((i = first; i <= last; i++)); do
    rm -f "$LOG_DIR/worker_$i.log"
done
# Only errors from MindSpore's own log: its warnings while the processes meet fill screens.
export GLOG_v=${GLOG_v:-3}
exec 3< <(exec setsid msrun --worker_num="$N" --local_worker_num="$LOCAL" --master_addr="$ADDR" --master_port="$PORT" \
    --node_rank="$NODE_RANK" --log_dir="$LOG_DIR" --join=True --cluster_time_out="$TIMEOUT" "${command[@]}" 2>&1)
msrun=$!
trap stop INT TERM

# msrun sees within a second that a process has failed, and kills the others; then it would wait half a minute for its
# scheduler, which is killed here with msrun.
failed='' code=0 begun='' seen=0
while true; do
    if [ -z "$failed$lost" ] && [ "$SECONDS" != "$seen" ]; then
        seen=$SECONDS
        watch
    fi
    got=0
    IFS= read -r -t 1 line <&3 || got=$?
    line=$begun$line begun=''
    if [ $got -gt 128 ]; then  # a signal, or a second without a line
        begun=$line
        continue
    elif [ $got != 0 ]; then
        break
    elif [[ -z "$failed" && "$line" =~ Worker\ process\ ([0-9]+)\ exit\ with\ exception.*code:\ (-?[0-9]+) ]]; then
        failed=${BASH_REMATCH[1]} code=${BASH_REMATCH[2]}
        (sleep 2 && kill -KILL -- "-$msrun") 2>/dev/null &
    elif [[ -z "$failed" && "$line" != '[INFO] '* ]]; then
        printf '%s\n' "$line"
    fi
done
status=0
wait "$msrun" || status=$?

if [ $stops != 0 ]; then
    exit 130
fi
if [ -n "$failed" ]; then
    status=$((code < 0 ? 128 - code : code))
    rank=$(processes | sed -n "s/ $failed\$//p")
    how="ended with status $code"
    if [ "$code" = -9 ]; then
        how="was killed (signal 9), by hand or for want of memory"
    elif [ "$code" -lt 0 ]; then
        how="was ended by signal ${code#-}"
    fi
    echo "error: ${rank:+rank $rank, }process $failed, $how; the others were stopped; the full logs are in $LOG_DIR" >&2
elif [ -n "$lost" ] && [ $status != 0 ]; then  # with 0 msrun had just ended as it should
    echo "error: $lost has ended, and the others were stopped; start the run again, with --resume_training True to go on" \
        "from its last checkpoint; the full logs are in $LOG_DIR" >&2
elif [ $status != 0 ]; then
    echo "error: the run failed, with status $status; the full logs are in $LOG_DIR" >&2
fi
if [ $status != 0 ]; then
    # The others were killed: theirs end without an error.
    for ((i = first; i <= last; i++)); do
        log=$LOG_DIR/worker_$i.log
        if [ "${rank:-}" = $i ] || { [ -z "${rank:-}" ] && grep -qsiE '^[a-z_.]*(error|exception)\b' "$log"; }; then
            echo "--- the last lines of $log" >&2
            grep -vE '^\[(INFO|WARNING)\]' "$log" | tail -n 20 >&2 || true
            break
        fi
    done
fi
exit $status
