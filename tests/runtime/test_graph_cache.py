"""The store of compiled graphs, and the digest that names them: everything that decides a graph changes its name."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.graph import Graph
from lora_ms.runtime import graph_cache, graph_digest
from lora_ms.runtime.graph_cache import ABOUT, GRAPH, PART, STAGE, GraphCache, Store
from lora_ms.runtime.graph_digest import Unnameable

MODEL = Path(__file__).parents[2] / "examples" / "tiny" / "model"


class Layer(nn.Cell):
    def __init__(self, factor: float, size: int = 4, transposed: bool = False, trains: bool = True):
        super().__init__()
        self.factor = factor
        self.constant = Tensor(np.arange(size, dtype=np.float32))
        self.weight = Parameter(Tensor(np.ones((size, size), np.float32)), name="w", requires_grad=trains)
        self.product = ops.MatMul(transpose_b=transposed)

    def construct(self, x):
        return self.product(x, self.weight) * self.factor + self.constant


class Net(Graph):
    def __init__(self, *layers: nn.Cell):
        super().__init__()
        self.layers = nn.CellList(list(layers))

    def construct(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(rows: int = 2, dtype=np.float32) -> tuple[Tensor]:
    return (Tensor(np.ones((rows, 4), dtype)),)


@pytest.fixture
def digest(monkeypatch):
    monkeypatch.setattr(graph_digest, "TRUSTED", (*graph_digest.TRUSTED, __name__.partition(".")[0]))
    return lambda cell, given=None: graph_digest.graph_digest(cell, inputs() if given is None else given)


def test_equal_graphs_have_one_name(digest):
    first, second = Net(Layer(2.0), Layer(3.0)), Net(Layer(2.0), Layer(3.0))
    second.layers[0].weight.set_data(
        Tensor(np.zeros((4, 4), np.float32))
    )  # the numbers of parameters are no part of it
    assert digest(first) == digest(second) == digest(first)


def shared() -> Net:
    layer = Layer(2.0)
    return Net(layer, layer)


def changed_constant() -> Net:
    net = Net(Layer(2.0), Layer(3.0))
    net.layers[1].constant = Tensor(np.array([0, 1, 2, 4], np.float32))
    return net


def in_training() -> Net:
    return Net(Layer(2.0), Layer(3.0)).set_train(True)


def with_a_flag() -> Net:
    net = Net(Layer(2.0), Layer(3.0))
    net.layers[0].recompute()
    return net


def with_another_name() -> Net:
    net = Net(Layer(2.0), Layer(3.0))
    net.layers[1].weight.name = "v"
    return net


def with_a_parameter_of_half() -> Net:
    net = Net(Layer(2.0), Layer(3.0))
    net.layers[0].weight = Parameter(Tensor(np.ones((4, 4), np.float16)), name="w")
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(Layer(2.0), Layer(3.5)),
        lambda: Net(Layer(3.0), Layer(2.0)),
        lambda: Net(Layer(2.0)),
        lambda: Net(Layer(2), Layer(3.0)),
        lambda: Net(Layer(2.0, transposed=True), Layer(3.0)),
        lambda: Net(Layer(2.0, trains=False), Layer(3.0)),
        with_another_name,
        lambda: Net(Layer(2.0, size=5), Layer(3.0, size=5)),
        shared,
        changed_constant,
        in_training,
        with_a_flag,
        with_a_parameter_of_half,
    ],
)
def test_every_part_of_a_graph_is_in_its_name(digest, make):
    assert digest(make()) != digest(Net(Layer(2.0), Layer(3.0)))


@pytest.mark.parametrize(
    "given", [inputs(3), inputs(dtype=np.float16), (), (*inputs(), None), (*inputs(), 1), (*inputs(), *inputs())]
)
def test_inputs_are_in_the_name(digest, given):
    net = Net(Layer(2.0))
    assert digest(net, given) != digest(net)
    assert digest(net, (*inputs(), 1)) != digest(net, (*inputs(), 2))


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (graph_digest, "sources", lambda: "other sources"),
        (graph_digest, "versions", lambda: ("3.11", "2.9.9", "2.9.9", "1.26")),
        (graph_digest, "processor", lambda: b"another processor"),
        (graph_digest, "PLAIN_FOR_A_TEST", 3),  # a constant of one of our modules
    ],
)
def test_surroundings_are_in_the_name(digest, monkeypatch, target, name, value):
    before = digest(Net(Layer(2.0)))
    monkeypatch.setattr(target, name, value, raising=False)
    assert digest(Net(Layer(2.0))) != before


def test_variables_that_mindspore_reads_are_in_the_name(digest, monkeypatch):
    before = digest(Net(Layer(2.0)))
    monkeypatch.setenv("MS_SCHED_PORT", "12345")  # where the processes of a run meet decides nothing
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", "elsewhere")
    assert digest(Net(Layer(2.0))) == before
    monkeypatch.setenv("MS_DEV_RUNTIME_CONF", "inline:false")
    assert digest(Net(Layer(2.0))) != before


def test_a_source_file_is_in_the_sources(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(graph_digest, "PACKAGE", tmp_path)
    graph_digest.sources.cache_clear()
    before = graph_digest.sources()
    (tmp_path / "a.py").write_text("x = 2\n")
    graph_digest.sources.cache_clear()
    assert graph_digest.sources() != before
    graph_digest.sources.cache_clear()


def test_what_cannot_be_read_has_no_name(digest):
    net = Net(Layer(2.0))
    net.generator = iter([1])
    with pytest.raises(Unnameable, match="list_iterator"):
        digest(net)
    with pytest.raises(Unnameable, match="class .*Net"):  # another's code, whose sources are not read
        graph_digest.TRUSTED = ("lora_ms", "mindspore", "numpy")
        graph_digest.graph_digest(Net(Layer(2.0)), inputs())


# --- the store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "graphs")


def kept(store: Store, digest: str, content: bytes = b"a graph", tmp: str = "graph") -> Path:
    file = store.folder.parent / tmp
    file.write_bytes(content)
    store.keep(digest, file, 1.5, "Net")
    return store.folder / digest


def test_what_is_kept_is_found(store):
    assert store.find("d" * 32) is None
    kept(store, "d" * 32)
    found = store.find("d" * 32)
    assert (found.graph.read_bytes(), found.seconds) == (b"a graph", 1.5)
    assert store.folder.stat().st_mode & 0o777 == 0o700


def spoil_graph(entry: Path) -> None:
    (entry / GRAPH).write_bytes(b"b graph")


def cut_graph(entry: Path) -> None:
    (entry / GRAPH).write_bytes(b"a gra")


def lose_graph(entry: Path) -> None:
    (entry / GRAPH).unlink()


def spoil_about(entry: Path) -> None:
    (entry / ABOUT).write_text('{"sha256": ')


def forge(entry: Path) -> None:
    """The whole graph of another digest under this name."""
    about = json.loads((entry / ABOUT).read_text())
    (entry / ABOUT).write_text(json.dumps({**about, "digest": "e" * 32}))


def no_folder(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
    entry.write_text("a file")


@pytest.mark.parametrize("spoil", [spoil_graph, cut_graph, lose_graph, spoil_about, forge, no_folder])
def test_a_damaged_entry_is_a_miss_and_can_be_kept_again(store, spoil):
    entry = kept(store, "d" * 32)
    spoil(entry)
    assert store.find("d" * 32) is None
    if entry.is_file():
        entry.unlink()
    kept(store, "d" * 32)
    assert store.find("d" * 32) is not None


def test_a_second_process_does_not_replace_an_entry(store):
    kept(store, "d" * 32, b"first")
    kept(store, "d" * 32, b"second")
    assert store.find("d" * 32).graph.read_bytes() == b"first"
    assert sorted(path.name for path in store.folder.iterdir()) == ["d" * 32]


def test_the_longest_unused_goes_first(tmp_path):
    store = Store(tmp_path / "graphs", limit=2500)
    for i, name in enumerate("abc"):
        entry = kept(store, name * 32, bytes(600))
        os.utime(entry, (i, i))
    assert store.find("a" * 32) is not None  # used just now
    kept(store, "d" * 32, bytes(600))
    assert [store.find(name * 32) is not None for name in "abcd"] == [True, False, True, True]
    assert store.size() <= 2500
    store.clear()
    assert store.size() == 0


def test_a_folder_that_others_may_write_to_is_refused(tmp_path):
    folder = tmp_path / "graphs"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not this user's alone"):
        Store(folder)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError):
        Store(tmp_path / "link")


def test_leftovers_of_killed_processes_go(store):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone, here = store.folder / f"{STAGE}{child.pid}-x", store.folder / f"{STAGE}{os.getpid()}-x"
    old, new = store.folder / f"{PART}old", store.folder / f"{PART}new"
    for folder in (gone, here, old, new):
        folder.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    store.remove_leftovers()
    assert [folder.exists() for folder in (gone, here, old, new)] == [False, True, False, True]


def test_where_nothing_can_be_written_the_graph_is_compiled_all_the_same(store, monkeypatch, digest):
    cache = GraphCache(store)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_cache, "write_synced", full)
    with cache.compiling(Net(Layer(2.0)), inputs()):
        cache.staged.mkdir(parents=True)
        (cache.staged / "compile_cache_0.mindir").write_bytes(b"graph")
    assert (cache.hits, cache.misses, store.size()) == (0, 1, 0)


# --- with MindSpore, in processes of their own

SCRIPT = """
import sys
from pathlib import Path
import lora_ms
from lora_ms.nn.graph import Graph
from lora_ms.runtime.graph_cache import GraphCache, Store

cache = GraphCache(Store(Path(sys.argv[1])))
Graph.compiling = cache.compiling
model = lora_ms.AutoModelForCausalLM.from_pretrained(sys.argv[2])
for length in map(int, sys.argv[3].split(",")):
    print(model.generate([[1, 2, 3]], max_new_tokens=length).tolist())
print("hits", cache.hits, "misses", cache.misses)
"""


def run(folder: Path, lengths: str, env: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(MODEL), lengths]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_graphs_are_found_again_in_any_order_and_compute_the_same(tmp_path, python_env):
    *cold, counts = run(tmp_path / "graphs", "4,40", python_env)
    assert counts == "hits 0 misses 4"  # a prompt and a token, for two lengths of the cache
    *warm, counts = run(tmp_path / "graphs", "40,4", python_env)
    assert counts == "hits 4 misses 0" and warm == cold[::-1]
    for entry in (tmp_path / "graphs").iterdir():
        (entry / GRAPH).chmod(0o600)
        (entry / GRAPH).write_bytes((entry / GRAPH).read_bytes()[:-100])
    *again, counts = run(tmp_path / "graphs", "4,40", python_env)
    assert counts == "hits 0 misses 4" and again == cold
