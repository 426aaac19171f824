# shellcheck shell=bash
# Shared by the scripts: finds a Python, makes virtual environments. Source it; it defines functions, and makes the paths
# in LORA_MS_VENV and PYTHON absolute, as the scripts change folders.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${LORA_MS_VENV:-} in '' | /*) ;; *) LORA_MS_VENV=$PWD/$LORA_MS_VENV ;; esac
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac  # a bare name is one on PATH

die() {
    echo "error: $*" >&2
    exit 1
}

# Whether a command is a Python 3.10 to 3.12 that can make environments. It is run: a shim may exist and not work.
python_fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# Prints the Python to make environments with: $PYTHON if set, else the first candidate that fits.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        python_fits "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.10 to 3.12 with the venv module; name another"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if python_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no working Python 3.10, 3.11 or 3.12 with the venv module on PATH;" \
        "install one (on Debian with its python3-venv), or name it: PYTHON=/path/to/python3.11 bash $0"
}

# What an environment was made from: a hash of the files that say what to install, and both places (scripts inside
# an environment hold absolute paths).
environment_stamp() {  # PYTHON DIRECTORY WHAT FILE...
    "$1" - "${@:2}" <<'PY'
import hashlib, pathlib, sys
directory, what, *files = sys.argv[1:]
parts = [what.encode(), *(pathlib.Path(name).read_bytes() for name in files)]
print(hashlib.sha256(b"\0".join(parts)).hexdigest(), directory, *files)
PY
}

# Makes DIRECTORY a virtual environment with what pip is asked for, unless it is that already.
# Its file lora_ms.stamp is "unfinished" while pip works, so that an interrupted install is started afresh.
make_environment() {  # DIRECTORY SIZE FILE -- PIP_ARGUMENTS...; FILE and pyproject.toml are part of the stamp
    local directory=$1 size=$2 file=$3 python stamp found
    shift 4
    python=$directory/bin/python
    found=$(cat "$directory/lora_ms.stamp" 2>/dev/null || true)
    if [ -n "$found" ] && [ -x "$python" ]; then
        stamp=$(environment_stamp "$python" "$directory" "$*" "$ROOT/pyproject.toml" "$file" 2>/dev/null || true)
        if [ "$found" = "$stamp" ]; then
            return
        fi
    fi
    if [ -z "$found" ] && [ -n "$(ls -A "$directory" 2>/dev/null)" ]; then
        die "$directory exists and was not made by this script; remove it, or name another place in LORA_MS_VENV"
    fi
    python=$(find_python)  # in an assignment of its own, so that its failure ends the script
    echo "Making the environment $directory with $("$python" --version): $size. This takes some minutes."
    rm -rf "$directory.old"
    if [ -n "$found" ]; then
        mv "$directory" "$directory.old"
        rm -rf "$directory.old"
    fi
    mkdir -p "$directory"
    echo unfinished >"$directory/lora_ms.stamp"
    "$python" -m venv "$directory" || die "could not make a virtual environment in $directory"
    python=$directory/bin/python
    # A pip older than 21.3 cannot install a source folder in place; those of Python 3.10 and later can.
    if ! (cd "$ROOT" && "$python" -m pip install -qq --disable-pip-version-check "$@"); then
        die "pip could not install what lora_ms needs (its message is above);" \
            "check the network and the free disk space, then run this script again"
    fi
    stamp=$(environment_stamp "$python" "$directory" "$*" "$ROOT/pyproject.toml" "$file")
    echo "$stamp" >"$directory/lora_ms.stamp"
}
