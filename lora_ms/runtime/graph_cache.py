"""Compiled graphs, kept on disk and found again by ``graph_digest``: compiling is the longest part of a short run.

MindSpore (2.7 to 2.10) writes the N-th graph that a process compiles to ``rank_R/graph_cache/compile_cache_N.mindir``
under one folder, which it asks for once, and reads it back by that number. Hence the staging folder of each process:
before a compilation, the graph of the same digest is put there under the number that MindSpore will look for; after
one, the new file is taken from there into the store.
"""

import atexit
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mindspore import nn
from mindspore.common.api import _cell_graph_executor

from lora_ms.runtime import host
from lora_ms.runtime.graph_digest import Unnameable, graph_digest

LIMIT = 2 << 30  # bytes of all graphs that are kept
GRAPH, ABOUT = "graph.mindir", "about.json"
PART, STAGE = ".part-", ".stage-"  # beginnings of names: an entry that is being written, a process's staging folder
ENABLE, FOLDER, TRUST = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH", "MS_DEV_FORCE_USE_COMPILE_CACHE"


class Entry(NamedTuple):
    """One kept graph."""

    graph: Path
    seconds: float  # its compilation took, the first time


class Store:
    """The folder with the kept graphs, one folder each, written beside its name and renamed.

    Args:
        folder: made where it is missing, for its owner alone.
        limit: bytes; the entries that were not used for the longest time go first.

    Raises:
        OSError: it cannot be made, is another user's, or others may write to it.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        self.folder, self.limit = folder, limit

    def find(self, digest: str) -> Entry | None:
        """The graph of that digest; None where there is none. One that is damaged is removed."""
        entry = self.folder / digest
        try:
            about = json.loads((entry / ABOUT).read_text())
            content = (entry / GRAPH).read_bytes()
            whole = about["sha256"] == sha256(content).hexdigest() and about["digest"] == digest
            found = Entry(entry / GRAPH, float(about["seconds"])) if whole else None
        except FileNotFoundError:
            found = None
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found is None:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with suppress(OSError):
            os.utime(entry)
        return found

    def keep(self, digest: str, graph: Path, seconds: float, name: str) -> None:
        """Takes the file ``graph`` in; an entry that another process has made meanwhile stays.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        part = Path(tempfile.mkdtemp(prefix=PART, dir=self.folder))
        try:
            content = graph.read_bytes()
            about = {
                "digest": digest,
                "sha256": sha256(content).hexdigest(),
                "seconds": round(seconds, 3),
                "graph": name,
            }
            write_synced(part / GRAPH, content)
            write_synced(part / ABOUT, json.dumps(about).encode())
            with suppress(OSError):  # a folder of that name is there
                os.rename(part, self.folder / digest)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.shrink()

    def entries(self) -> list[tuple[float, int, Path]]:
        """Last use, bytes and folder of each, the longest unused first."""
        found = []
        for entry in self.folder.iterdir():
            if not entry.name.startswith((PART, STAGE)):
                with suppress(OSError):
                    size = sum(file.stat().st_size for file in entry.iterdir())
                    found.append((entry.stat().st_mtime, size, entry))
        return sorted(found)

    def size(self) -> int:
        """Bytes of all graphs."""
        return sum(size for _, size, _ in self.entries())

    def shrink(self) -> None:
        """Removes what has not been used for the longest time, until the rest is within the limit."""
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self.limit:
                return
            shutil.rmtree(entry, ignore_errors=True)
            total -= size

    def clear(self) -> None:
        """Removes all graphs."""
        for _, _, entry in self.entries():
            shutil.rmtree(entry, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Removes what processes that were killed have left."""
        for folder in self.folder.glob(f"{STAGE}*"):
            process = folder.name.removeprefix(STAGE).partition("-")[0]
            if process.isdigit() and not _is_running(int(process)):
                shutil.rmtree(folder, ignore_errors=True)
        for folder in self.folder.glob(f"{PART}*"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > 3600:
                    shutil.rmtree(folder, ignore_errors=True)


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


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def graphs_folder() -> Path:
    """Where the graphs are kept."""
    return host.cache_folder() / "graphs"


class GraphCache:
    """Compiles cells through a ``Store``.

    Args:
        rank: this process's number, by which MindSpore names a folder.
        say: told, in one line, what is being waited for.
    """

    def __init__(self, store: Store, rank: int = 0, say: Callable[[str], None] | None = None):
        self.store, self.say = store, say
        store.remove_leftovers()
        self.stage = Path(tempfile.mkdtemp(prefix=f"{STAGE}{os.getpid()}-", dir=store.folder))
        atexit.register(shutil.rmtree, self.stage, ignore_errors=True)
        self.staged = self.stage / f"rank_{rank}" / "graph_cache"
        self.number = 0  # of the next graph, as MindSpore counts
        # MindSpore reads the program's main file and all that it imports, to compare them; it stops with an error where
        # there is no such file, as in `python -c`. The digest stands for the sources, so a file of a line will do.
        compiler: Any = sys.modules[type(_cell_graph_executor).__module__]
        compiler.entry_script_path = str(Path(__file__).with_name("__init__.py"))
        self.hits, self.misses = 0, 0

    @contextmanager
    def compiling(self, cell: nn.Cell, inputs: tuple[Any, ...]) -> Iterator[None]:
        """Around one compilation: it finds the graph, where the store has it, or leaves it for the store."""
        try:
            digest = graph_digest(cell, inputs)
        except Unnameable:
            yield
            return
        entry = self.store.find(digest)
        file = self.staged / f"compile_cache_{self.number}.mindir"
        variables = {ENABLE: "1", FOLDER: str(self.stage)}
        if entry is not None:
            self.staged.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry.graph, file)
            variables[TRUST] = "1"  # the digest has compared more than MindSpore would
        begun = time.perf_counter()
        with environment(variables):
            yield
        self.number += 1
        self.hits += entry is not None
        self.misses += entry is None
        if entry is None and file.is_file():
            with suppress(OSError):  # a full disk: the next run compiles again
                self.store.keep(digest, file, time.perf_counter() - begun, type(cell).__name__)
        with suppress(OSError):
            file.unlink()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
