"""Fuzzes the readers of files that others made.

    python tests/fuzz/run.py --cases 2000 --seed 7 [--reader yaml] [--case 12]

Each case is a good file with some damage. Cases run in a forked child: one that crashes or hangs costs that child
alone. Reading must end within ten seconds, with the file read or with one ``LoraMsError``; anything else is a fault,
and the status is 1 then. ``--case N`` runs one case here, with its traceback, and leaves its files.
"""

import argparse
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from cases import READERS, names_of, written  # noqa: E402

from lora_ms.errors import LoraMsError  # noqa: E402

LONGEST = 10.0  # seconds of a case
MEMORY = 4 * 2**30  # bytes that a case may take


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """Whether a folder's files are ``read`` or ``refused``, or what is wrong with how they are read."""
    try:
        READERS[name].read(folder)
    except LoraMsError as error:
        text = str(error)
        return ("refused", text[:300]) if text.strip() and len(text) < 20_000 else ("no message", text[:300])
    except BaseException as fault:
        last = traceback.extract_tb(fault.__traceback__)[-1]
        return "traceback", f"{type(fault).__name__}: {str(fault)[:200]} ({Path(last.filename).name}:{last.lineno})"
    return "read", ""


def child(name: str, first: int, last: int, seed: int, pipe: int, place: Path) -> None:
    """Runs cases, and writes a line for each: before it, its number; after it, what came out."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)  # libraries in Rust and C++ report there
    for number in range(first, last):
        folder = place / str(number)
        folder.mkdir()
        written(name, number, seed, folder)
        os.write(pipe, json.dumps({"case": number}).encode() + b"\n")
        kind, text = outcome(name, folder)
        os.write(pipe, json.dumps({"case": number, "kind": kind, "text": text}).encode() + b"\n")
        shutil.rmtree(folder)
    os._exit(0)


def fuzz(name: str, cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many cases of a reader ended how, and a line for each that is a fault."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "cases"
        while done < cases:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            reader, writer = os.pipe()
            number = os.fork()
            if not number:
                os.close(reader)
                try:
                    child(name, done, cases, seed, writer, place)
                finally:
                    os._exit(9)
            os.close(writer)
            done = follow(reader, number, done, counts, faults, name)
        strangers = [path.name for path in Path(folder).iterdir() if path.name != "cases"]
        if strangers:
            faults.append(f"{name}: written outside: {strangers}")
    return counts, faults


def follow(pipe: int, process: int, done: int, counts: Counter[str], faults: list[str], name: str) -> int:
    """Reads what a child writes until it ends or has to be ended; returns the first case that is still to run."""
    rest, started, late = b"", time.monotonic(), False
    running = done
    while True:
        if not select.select([pipe], [], [], max(0.0, started + LONGEST - time.monotonic()))[0]:
            os.kill(process, signal.SIGKILL)
            late = True
        piece = os.read(pipe, 2**16)
        if not piece:
            break
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            found = json.loads(line)
            started = time.monotonic()
            running = found["case"]
            if "kind" in found:
                running = done = found["case"] + 1
                counts[found["kind"]] += 1
                if found["kind"] not in ("read", "refused"):
                    faults.append(f"{name} {found['case']}: {found['kind']}: {found['text']}")
    os.close(pipe)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == 0:
        return done
    kind = "hang" if late else "crash"
    counts[kind] += 1
    faults.append(f"{name} {running}: {kind}: status {status}")
    return running + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, help="all where left out")
    parser.add_argument("--case", type=int, help="run this one alone, here")
    args = parser.parse_args()
    if args.case is not None:
        folder = Path(tempfile.mkdtemp(prefix="case"))
        written(args.reader, args.case, args.seed, folder)
        print(folder, *sorted(folder.rglob("*")), sep="\n")
        print(READERS[args.reader].read(folder))
        return 0
    print(f"{'reader':12}{'cases':>8}{'read':>8}{'refused':>9}{'faulty':>8}{'seconds':>9}")
    all_faults: list[str] = []
    for name in names_of(args.reader):
        began = time.monotonic()
        counts, faults = fuzz(name, args.cases, args.seed)
        all_faults += faults
        good = counts["read"], counts["refused"]
        seconds = time.monotonic() - began
        print(f"{name:12}{sum(counts.values()):8,}{good[0]:8,}{good[1]:9,}{len(faults):8,}{seconds:9.1f}", flush=True)
    print(*all_faults, sep="\n")
    return 1 if all_faults else 0


if __name__ == "__main__":
    sys.exit(main())
