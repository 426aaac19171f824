"""The folder in which compiled graphs are kept, whatever happens to it. Loads without MindSpore.

One folder for each graph, named by its digest (``graph_digest``), written beside its name and renamed. A graph that is
damaged, or stands under a name that is not its own, counts as missing.
"""

import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from lora_ms.runtime import host

VARIABLE = "LORA_MS_GRAPH_CACHE"  # the folder, or False
LIMIT = 2 * 10**9  # bytes of all graphs that are kept
GRAPH, ABOUT, TIMES = "graph.mindir", "about.json", "times.json"
PART, STAGE = ".part-", ".stage-"  # beginnings of names: an entry that is being written, a process's staging folder
LOCK = "lock"  # in a staging folder: held as long as its process lives
MOST_TIMES = 500  # durations that are kept
LEFT_ALONE = 3600  # seconds after which nobody is writing what is unfinished


class KeptGraph(NamedTuple):
    """One kept graph, as the folder shows it."""

    used: float  # time of its last use
    size: int  # bytes
    folder: Path


def graphs_folder() -> Path | None:
    """Where the graphs are kept: $LORA_MS_GRAPH_CACHE, else a folder of the cache; None where that says False."""
    asked = os.environ.get(VARIABLE, "")
    if asked.lower() in ("false", "0"):
        return None
    return Path(asked) if asked else host.cache_folder("graphs")


class Store:
    """The folder with the kept graphs.

    Args:
        folder: made where it is missing, for its owner alone.
        limit: bytes; the entries that were not used for the longest time go first.

    Raises:
        OSError: it cannot be made, is another user's, or others may write to it.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        self.folder = folder.absolute()
        self.limit = limit

    def take(self, digest: str, target: Path) -> float | None:
        """Copies the graph of that digest to ``target``; returns the seconds that it took to compile.

        None: there is none. One that is damaged is removed.

        Raises:
            OSError: ``target`` cannot be written.
        """
        entry = self.folder / digest
        try:
            about = json.loads((entry / ABOUT).read_text())
            content = (entry / GRAPH).read_bytes()
            seconds = float(about["seconds"]) if about["checksum"] == checksum(digest, content) else None
        except (OSError, ValueError, KeyError, TypeError):
            seconds = None
        if seconds is None:
            remove(entry)
            return None
        target.write_bytes(content)
        with suppress(OSError):
            os.utime(entry)
        return seconds

    def keep(self, digest: str, graph: Path, seconds: float, name: str) -> None:
        """Takes the file ``graph`` in; an entry that another process has made meanwhile stays.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        part = Path(tempfile.mkdtemp(prefix=PART, dir=self.folder))
        try:
            content = graph.read_bytes()
            about = {"graph": name, "seconds": round(seconds, 3), "checksum": checksum(digest, content)}
            write_synced(part / GRAPH, content)
            write_synced(part / ABOUT, json.dumps(about).encode())
            with suppress(OSError):  # a folder of that name is there
                os.rename(part, self.folder / digest)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.shrink()

    def times(self) -> dict[str, float]:
        """Seconds by what took them, see ``remember``."""
        try:
            found = json.loads((self.folder / TIMES).read_text())
            return {str(key): float(value) for key, value in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def remember(self, key: str, seconds: float) -> None:
        """Keeps how long something took. Where that cannot be written, it is forgotten."""
        times = self.times()
        times.pop(key, None)
        times[key] = round(seconds, 2)
        kept = dict(list(times.items())[-MOST_TIMES:])
        part = self.folder / f"{PART}{os.getpid()}-{TIMES}"
        with suppress(OSError):
            part.write_text(json.dumps(kept))
            os.replace(part, self.folder / TIMES)

    def entries(self) -> list[KeptGraph]:
        """All graphs, the longest unused first."""
        found = []
        for entry in self.folder.iterdir():
            if not entry.name.startswith((PART, STAGE)):
                with suppress(OSError):
                    size = sum(file.stat().st_size for file in entry.iterdir())
                    found.append(KeptGraph(entry.stat().st_mtime, size, entry))
        return sorted(found)

    def size(self) -> int:
        """Bytes of all graphs."""
        return sum(entry.size for entry in self.entries())

    def shrink(self) -> None:
        """Removes what has not been used for the longest time, until the rest is within the limit."""
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if total <= self.limit:
                return
            remove(entry.folder)
            total -= entry.size

    def clear(self) -> None:
        """Removes all graphs, and what processes have left that were killed."""
        for entry in self.entries():
            remove(entry.folder)
        self.remove_leftovers(0)
        remove(self.folder / TIMES)

    def remove_leftovers(self, age: float = LEFT_ALONE) -> None:
        """Removes what processes that were killed have left.

        age: seconds after which an unfinished entry is nobody's.
        """
        for folder in self.folder.glob(f"{STAGE}*"):
            if not is_in_use(folder, age):
                remove(folder)
        for part in self.folder.glob(f"{PART}*"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime >= age:
                    remove(part)


def new_stage(parent: Path) -> Path:
    """An empty folder for this process alone, which others remove once it has ended, however that was."""
    folder = Path(tempfile.mkdtemp(prefix=STAGE, dir=parent))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)  # open until the process ends
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder


def is_in_use(stage: Path, age: float) -> bool:
    """Whether the process of a staging folder lives; one that has no lock yet may do so for ``age`` seconds."""
    try:
        lock = os.open(stage / LOCK, os.O_RDWR)
    except OSError:
        with suppress(OSError):
            return time.time() - stage.stat().st_mtime < age
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def checksum(digest: str, content: bytes) -> str:
    """Of a graph under that name: it fits neither another graph nor another name."""
    return sha256(digest.encode() + b"\0" + content).hexdigest()


def check_private(folder: Path) -> None:
    """Raises PermissionError where someone else could put a graph into ``folder``."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's alone (owner {status.st_uid}, mode {status.st_mode:o})")


def write_synced(path: Path, content: bytes) -> None:
    """Writes a new file that lasts from then on."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Removes a folder or a file, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
