"""Compiled graphs, kept on disk and found again by ``graph_digest``: compiling is the longest part of a short run.

MindSpore (2.7 to 2.10) writes the N-th graph that a process compiles to ``rank_R/graph_cache/compile_cache_N.mindir``
under one folder, which it asks for once, and reads it back by that number. Hence the staging folder of each process:
before a compilation, the graph of the same digest is put there under the number that MindSpore will look for; after
one, the new file is taken from there into the store. Nothing else is ever in that folder, so that a number of ours that
is not MindSpore's costs a compilation, and never gives another graph.
"""

import atexit
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mindspore as ms
from google.protobuf.message import DecodeError
from mindspore import Tensor
from mindspore.nn.cell import _cell_graph_executor
from mindspore.train import mind_ir_pb2

from lora_ms.nn.graph import Graph
from lora_ms.runtime.graph_digest import GraphName, Unnameable, likeness, name_of, sources_changed
from lora_ms.runtime.graph_store import Store, graphs_folder, new_stage

ENABLE, FOLDER, TRUST = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH", "MS_DEV_FORCE_USE_COMPILE_CACHE"
LONG = 2.0  # seconds from which a person is told what they are for
LOADING = 0.1  # of the time of its compilation, at most, goes by until a kept graph is ready


class Stage:
    """The folder that MindSpore reads and writes in this process, and the number of its next graph.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path):
        self.folder = new_stage(parent)
        self.files = self.folder / "rank_0" / "graph_cache"
        self.files.mkdir(parents=True)
        self.number = 0
        atexit.register(self._remove, os.getpid())
        # MindSpore reads the program's main file and all that it imports, to compare them; it stops with an error where
        # there is no such file, as in `python -c`. The digest stands for the sources, so a file of a line will do.
        compiler: Any = sys.modules[type(_cell_graph_executor).__module__]
        compiler.entry_script_path = str(Path(__file__).with_name("__init__.py"))

    def _remove(self, process: int) -> None:
        if os.getpid() == process:  # and not its copy
            shutil.rmtree(self.folder, ignore_errors=True)

    def for_rank(self, rank: int) -> None:
        """Whatever number MindSpore gives this process, it finds the one folder."""
        with suppress(FileExistsError):
            (self.folder / f"rank_{rank}").symlink_to("rank_0")

    @property
    def next(self) -> Path:
        """What MindSpore will read or write at its next compilation."""
        role = os.environ.get("MS_ROLE", "")  # of a process that msrun has started
        return self.files / f"{role}compile_cache_{self.number}.mindir"

    def written(self) -> Path | None:
        """What MindSpore has written; the number follows it."""
        found = list(self.files.glob("*compile_cache_*.mindir"))
        if len(found) != 1:
            return None
        self.number = int(found[0].stem.rpartition("_")[2])
        return found[0]

    def done(self) -> None:
        """After a compilation: empty again."""
        self.number += 1
        for file in self.files.glob("*"):
            with suppress(OSError):
                file.unlink()


class GraphCache:
    """What goes around every compilation of a process: it says what is being waited for, and keeps the graph.

    Args:
        store: None to keep nothing.
        rank, world: of this process, and the number of all of the run.

    Attributes:
        stage: of this process, once there is a store: MindSpore asks for its folder once.
        say: told, in one line, what is being waited for; see ``announcing``.
        times: where durations are kept; None: nowhere.
    """

    stage: Stage | None = None
    times: Store | None = None
    say: Callable[[str], None] = staticmethod(lambda line: print(line, file=sys.stderr, flush=True))

    def __init__(self, store: Store | None, rank: int = 0, world: int = 1):
        self.store = store
        self.process = (rank, world)
        self.hits = 0
        self.misses = 0
        if store is not None:
            GraphCache.stage = GraphCache.stage or Stage(store.folder)
            GraphCache.stage.for_rank(rank)

    @contextmanager
    def compiling(self, cell: Graph, inputs: tuple[Any, ...]) -> Iterator[None]:
        """Around one compilation: it finds the graph, where the store has it, or leaves it for the store."""
        kind = likeness(cell, inputs)
        store = self.store
        stage = self.stage
        name = self._name(cell, inputs)
        if store is None or stage is None or name is None:
            self._announce(cell, inputs, kind, None)
            yield
            return
        seconds = None
        try:
            seconds = store.take(name.digest, stage.next)
        except OSError:  # a full disk: part of a graph must not be taken for one
            with suppress(OSError):
                stage.next.unlink()
        self._announce(cell, inputs, kind, seconds)
        variables = {ENABLE: "1", FOLDER: str(stage.folder)}
        if seconds is not None:
            variables[TRUST] = "1"  # the digest has compared more than MindSpore would
        begun = time.perf_counter()
        try:
            with environment(variables), cell.holding(name.parameters):
                yield
            taken = time.perf_counter() - begun
            written = stage.written()
            if seconds is None and written is not None and self._may_be_kept(written, name):
                with suppress(OSError):  # a full disk: the next run compiles again
                    store.keep(name.digest, written, taken, type(cell).__name__)
        finally:
            stage.done()
        self.hits += seconds is not None
        self.misses += seconds is None
        store.remember(_what(kind, seconds), taken)

    def _may_be_kept(self, written: Path, name: GraphName) -> bool:
        """Whether all parameters of the graph are known, and the sources still those that it was compiled from."""
        used = parameters_of(written)
        return used is not None and used <= name.parameters.keys() and not sources_changed()

    def _name(self, cell: Graph, inputs: tuple[Any, ...]) -> GraphName | None:
        """None: this graph is compiled without the store."""
        if self.store is None or ENABLE in os.environ or ms.get_context("enable_compile_cache"):
            return None
        if ms.get_context("enable_graph_kernel"):  # fused kernels are in a folder of their own
            return None
        try:
            return name_of(cell, inputs, self.process)
        except Unnameable:
            return None

    def _announce(self, cell: Graph, inputs: tuple[Any, ...], kind: str, compiled: float | None) -> None:
        """Says what is being waited for. compiled: seconds that the graph, where it was found, took to compile."""
        if not cell.title or self.process[0]:
            return
        last = None if self.store is None else self.store.times().get(_what(kind, compiled))
        expected = last if last is not None or compiled is None else compiled * LOADING
        if expected is not None and expected < LONG:
            return
        verb = "compiling" if compiled is None else "loading"
        known = "" if last is None else f" ({last:.0f} s the last time)"
        GraphCache.say(f"{verb} {cell.title}{_tokens(inputs)}{known} …")


def _tokens(inputs: tuple[Any, ...]) -> str:
    """`` for 8 x 128 tokens`` where ids [b, s] are the first input."""
    first = inputs[0] if inputs else None
    if isinstance(first, Tensor) and first.ndim == 2 and first.dtype == ms.int32:
        return f" for {first.shape[0]} x {first.shape[1]:,} tokens"
    return ""


def _what(kind: str, compiled: float | None) -> str:
    return f"{'compile' if compiled is None else 'load'} {kind}"


def parameters_of(file: Path) -> set[str] | None:
    """Names of the parameters that a graph on disk works on, which stand there behind that of the graph.

    None: it is no whole graph.
    """
    model: Any = mind_ir_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError:
        return None
    graphs = (model.graph, *model.functions)
    return {parameter.name.partition(":")[2] for graph in graphs for parameter in graph.parameter}


def seconds_of(what: str) -> float | None:
    """How long ``what`` took the last time; None where nobody knows."""
    return None if GraphCache.times is None else GraphCache.times.times().get(what)


def remember_seconds(what: str, seconds: float) -> None:
    """For ``seconds_of``."""
    if GraphCache.times is not None:
        GraphCache.times.remember(what, seconds)


@contextmanager
def announcing(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``say`` is told what is being waited for."""
    before = GraphCache.say
    GraphCache.say = staticmethod(say)
    try:
        yield
    finally:
        GraphCache.say = staticmethod(before)


def keep_graphs(rank: int = 0, world: int = 1, wanted: bool = True) -> list[str]:
    """Keeps the graphs that are compiled from now on; returns a line where that is not possible. May be repeated.

    rank, world: of this process, and the number of all of the run. wanted: False to keep none.
    """
    folder = graphs_folder() if wanted else None
    notices = []
    GraphCache.times = None
    if folder is not None and ENABLE in os.environ:
        notices.append(
            f"{ENABLE} is set, so MindSpore may reuse graphs compiled for other settings; unset it, and "
            "compiled graphs are kept here, named by everything that decides them"
        )
    elif folder is not None:
        try:
            store = Store(folder)
            store.remove_leftovers()
            GraphCache.times = store
            Graph.compiling = GraphCache(store, rank, world).compiling
            return []
        except OSError as error:
            notices.append(f"compiled graphs are not kept, so that every start compiles them: {error}")
    Graph.compiling = GraphCache(None, rank, world).compiling
    return notices


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
