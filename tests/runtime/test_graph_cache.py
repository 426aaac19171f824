"""Compiled graphs that are found again: the digest that names them, and what goes around a compilation."""

import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.train import mind_ir_pb2

from lora_ms.nn import graph
from lora_ms.nn.graph import Graph
from lora_ms.runtime import graph_digest, graph_store
from lora_ms.runtime.graph_cache import ENABLE, TRUST, GraphCache, announcing, environment, keep_graphs
from lora_ms.runtime.graph_digest import Unnameable, likeness, plain_globals
from lora_ms.runtime.graph_store import GRAPH, Store

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny" / "model"


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


def test_what_has_trained_compiles_nothing_again(digest):
    fresh, trained = Net(Layer(2.0)), Net(Layer(2.0))
    trained.has_trained = True
    assert digest(trained) == digest(fresh)


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
        (graph, "PLAIN_FOR_A_TEST", 3),  # a constant of a module that the cell's class comes from
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


def test_constants_are_those_of_the_modules_that_a_graph_comes_from():
    """And of the modules that these take from; not of whatever else the process has imported."""
    import_module("lora_ms.train.gradient")
    found = plain_globals({"lora_ms.train.gradient"})
    modules = {module for module, _, _ in found}
    assert ("lora_ms.train.parts", "CHUNK_NUMBERS", str(1 << 24)) in found
    assert "lora_ms.nn.loss" in modules and "lora_ms.runtime.graph_store" not in modules


@pytest.fixture
def source(monkeypatch, tmp_path):
    """The one source file of another package."""
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(graph_digest, "source_files", lambda: (file,))
    monkeypatch.setattr(graph_digest, "PACKAGE", tmp_path)
    graph_digest.sources.cache_clear()
    yield file
    graph_digest.sources.cache_clear()


def test_a_source_file_is_in_the_sources(source):
    before = graph_digest.sources()
    source.write_text("x = 2\n")
    graph_digest.sources.cache_clear()
    assert graph_digest.sources() != before


def test_sources_that_change_while_a_process_runs_name_nothing(source, monkeypatch, digest):
    """MindSpore reads a cell's source when it compiles it: it may not be the text that was imported."""
    changed = source.stat().st_ctime
    monkeypatch.setattr(graph_digest, "process_start", lambda: changed + 1)
    assert not graph_digest.sources_changed()
    monkeypatch.setattr(graph_digest, "process_start", lambda: changed - 1)
    assert graph_digest.sources_changed()
    with pytest.raises(Unnameable, match="changed since this process began"):
        digest(Net(Layer(2.0)))


def test_the_start_of_this_process():
    code = "import time; from lora_ms.runtime.graph_digest import process_start; print(time.time() - process_start())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 0.2 < float(done.stdout) < 60, done.stderr


def test_parameters_of_one_name_have_no_name(digest):
    net = Net(Layer(2.0))
    net.more = Layer(2.0)
    net.more.weight.name = net.layers[0].weight.name
    with pytest.raises(Unnameable, match="two parameters named"):
        digest(net)


def test_large_constants_are_not_kept(digest, monkeypatch):
    monkeypatch.setattr(graph_digest, "MOST_CONSTANTS", 31)
    digest(Net(Layer(2.0)))
    with pytest.raises(Unnameable, match="more than 31 bytes of constants"):
        digest(Net(Layer(2.0), Layer(3.0)))


def test_likeness_is_of_sizes():
    found = {likeness(Net(*layers), given) for layers in ([Layer(2.0)], [Layer(3.0)]) for given in (inputs(),)}
    assert found == {"Net [(2, 4)] with 1 parameters, 16"}
    assert likeness(Net(Layer(2.0), Layer(2.0)), inputs(3)) == "Net [(3, 4)] with 2 parameters, 32"


def test_what_cannot_be_read_has_no_name(digest):
    net = Net(Layer(2.0))
    net.other = iter([1])
    with pytest.raises(Unnameable, match="list_iterator"):
        digest(net)
    with pytest.raises(Unnameable, match="class .*Net"):  # another's code, whose sources are not read
        graph_digest.TRUSTED = ("lora_ms", "mindspore", "numpy")
        graph_digest.graph_digest(Net(Layer(2.0)), inputs())


# --- around a compilation


@pytest.fixture
def cache(tmp_path, monkeypatch, digest) -> GraphCache:
    monkeypatch.setattr(GraphCache, "stage", None)
    return GraphCache(Store(tmp_path / "graphs"))


class Compiler:
    """What MindSpore does: writes the graph, or reads the one that is there."""

    def __init__(self):
        self.number = 0
        self.read: list[bytes] = []

    def __call__(self, cache: GraphCache, net: nn.Cell, content: bytes = b"graph", parameter: str = "") -> None:
        with cache.compiling(net, inputs()):
            if os.environ.get(ENABLE) != "1":
                return
            file = Path(os.environ["MS_COMPILER_CACHE_PATH"]) / "rank_0" / "graph_cache"
            file = file / f"{os.environ.get('MS_ROLE', '')}compile_cache_{self.number}.mindir"
            self.number += 1
            if os.environ.get(TRUST) == "1" and file.exists():
                self.read.append(mind_ir_pb2.ModelProto.FromString(file.read_bytes()).producer_name.encode())
                assert list(net.parameters_dict()) == [net.layers[0].weight.name]
            else:
                file.write_bytes(written(content.decode(), parameter or net.layers[0].weight.name))


def written(name: str, parameter: str) -> bytes:
    """A graph as MindSpore writes it, with one parameter."""
    model = mind_ir_pb2.ModelProto(producer_name=name)
    model.graph.name = "net"
    model.graph.parameter.add().name = f"net:{parameter}"
    return model.SerializeToString()


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.mark.parametrize("role", ["", "MS_WORKER"])
def test_a_graph_is_found_again(cache, compiler, role, monkeypatch):
    monkeypatch.setenv("MS_ROLE", role)
    one, two = Net(Layer(2.0)), Net(Layer(3.0))
    compiler(cache, one, b"one")
    compiler(cache, two, b"two")
    compiler(cache, two)
    compiler(cache, one)
    assert (compiler.read, cache.hits, cache.misses) == ([b"two", b"one"], 2, 2)
    assert list(cache.stage.files.iterdir()) == []
    assert ENABLE not in os.environ and TRUST not in os.environ


def test_a_compilation_that_fails_leaves_nothing(cache, compiler):
    with pytest.raises(RuntimeError), cache.compiling(Net(Layer(2.0)), inputs()):
        cache.stage.next.write_bytes(b"half")
        compiler.number += 1
        raise RuntimeError
    assert cache.store.entries() == [] and list(cache.stage.files.iterdir()) == []
    compiler(cache, Net(Layer(2.0)), b"whole")
    compiler(cache, Net(Layer(2.0)))
    assert compiler.read == [b"whole"]


def test_a_number_that_is_not_mindspores_costs_a_compilation(cache, compiler):
    compiler(cache, Net(Layer(2.0)), b"one")
    compiler.number += 5  # graphs that were compiled with the cache on, and without us
    compiler(cache, Net(Layer(2.0)), b"again")  # looks for another number than ours, finds nothing
    assert compiler.read == []
    compiler(cache, Net(Layer(3.0)), b"two")  # by whose file we know the number again
    compiler(cache, Net(Layer(2.0)))
    compiler(cache, Net(Layer(3.0)))
    assert compiler.read == [b"one", b"two"]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_full_disk_graphs_are_compiled_all_the_same(cache, compiler, monkeypatch):
    monkeypatch.setattr(graph_store, "write_synced", full)
    compiler(cache, Net(Layer(2.0)))
    assert (cache.hits, cache.misses, cache.store.entries()) == (0, 1, [])
    monkeypatch.undo()


def test_a_graph_that_cannot_be_copied_is_a_miss(cache, compiler, monkeypatch):
    compiler(cache, Net(Layer(2.0)), b"one")
    written = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: (written(path, content[:2]), full()))
    with cache.compiling(Net(Layer(2.0)), inputs()):
        assert TRUST not in os.environ and not cache.stage.next.exists()
    monkeypatch.setattr(Path, "write_bytes", written)
    compiler.number += 1
    compiler(cache, Net(Layer(2.0)))
    assert compiler.read == [b"one"]


def test_a_graph_with_a_parameter_that_is_not_known_is_not_kept(cache, compiler):
    """Read from disk, it would work on one of its own, and not on the run's."""
    compiler(cache, Net(Layer(2.0)), parameter="another")
    compiler(cache, Net(Layer(2.0)))
    assert (compiler.read, cache.hits, cache.misses, len(cache.store.entries())) == ([], 0, 2, 1)


class InAFunction(Graph):
    """A net that it holds in a function alone."""

    def __init__(self, net: nn.Cell):
        super().__init__(auto_prefix=False)
        self.gradient = ops.value_and_grad(net, None, ms.ParameterTuple([net.layers[0].weight]))

    def construct(self, x):
        return self.gradient(x)


def test_parameters_in_functions_are_bound_too(cache, digest):
    net = Net(Layer(2.0))
    outer = InAFunction(net)
    assert outer.parameters_dict() == {}
    with cache.compiling(outer, inputs()):
        assert list(outer.parameters_dict().values()) == [net.layers[0].weight]
    assert outer.parameters_dict() == {}


def test_what_has_no_name_is_compiled_without_the_store(cache, compiler):
    net = Net(Layer(2.0))
    net.other = iter([1])
    compiler(cache, net)
    assert (compiler.number, cache.hits, cache.misses) == (0, 0, 0)


def test_mindspores_own_cache_is_left_alone(cache, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_MS_GRAPH_CACHE", str(tmp_path / "graphs"))
    monkeypatch.setattr(Graph, "compiling", None)
    assert keep_graphs() == []
    monkeypatch.setenv(ENABLE, "1")
    (line,) = keep_graphs()
    assert line.startswith(f"{ENABLE} is set, so MindSpore may reuse graphs compiled for other settings")
    with cache.compiling(Net(Layer(2.0)), inputs()):
        assert os.environ[ENABLE] == "1" and TRUST not in os.environ
    assert (cache.hits, cache.misses) == (0, 0)


def test_a_folder_that_cannot_be_used_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(Graph, "compiling", None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_MS_GRAPH_CACHE", str(tmp_path / "file"))
    (line,) = keep_graphs()
    assert line.startswith("compiled graphs are not kept, so that every start compiles them: ") and "file" in line
    assert keep_graphs(wanted=False) == []
    monkeypatch.setenv("LORA_MS_GRAPH_CACHE", "False")
    assert keep_graphs() == []


class Named(Net):
    title = "a test"


def test_what_is_waited_for_is_said(cache, compiler, capsys, monkeypatch):
    said: list[str] = []
    times = iter([0, 7.0, 10, 13.0, 20, 20.5, 30, 30.1])
    monkeypatch.setattr("lora_ms.runtime.graph_cache.time.perf_counter", lambda: next(times))
    with announcing(said.append):
        compiler(cache, Net(Layer(2.0)))  # without a title
        compiler(cache, Named(Layer(2.0)))  # 3 s
        compiler(cache, Named(Layer(2.0)))  # a tenth of that, at most
        cache.store.clear()
        cache.store.remember("compile Named [(2, 4)] with 1 parameters, 16", 3)
        compiler(cache, Named(Layer(2.0)))
    assert said == ["compiling a test …", "compiling a test (3 s the last time) …"]
    with announcing(said.append):
        cache.store.remember("load Named [(2, 4)] with 1 parameters, 16", 4)
        monkeypatch.setattr("lora_ms.runtime.graph_cache.time.perf_counter", lambda: 1.0)
        compiler(cache, Named(Layer(2.0)))
    assert said[2:] == ["loading a test (4 s the last time) …"]
    GraphCache(None).compiling(Named(Layer(2.0)), inputs()).__enter__()
    assert capsys.readouterr().err == "compiling a test …\n"
    with announcing(said.append):
        ids = (Tensor(np.ones((8, 128), np.int32)),)
        GraphCache(None).compiling(Named(Layer(2.0)), ids).__enter__()
        GraphCache(None, rank=1, world=2).compiling(Named(Layer(2.0)), ids).__enter__()
    assert said[3:] == ["compiling a test for 8 x 128 tokens …"]


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("MS_A", "1")
    with environment({"MS_A": "2", "MS_B": "3"}):
        assert (os.environ["MS_A"], os.environ["MS_B"]) == ("2", "3")
    assert os.environ["MS_A"] == "1" and "MS_B" not in os.environ


# --- with MindSpore, in processes of their own

SCRIPT = """
import sys
import lora_ms
from lora_ms.nn.graph import Graph

model = lora_ms.AutoModelForCausalLM.from_pretrained(sys.argv[1])
cache = Graph.compiling.__self__
for rows in map(int, sys.argv[2].split(",")):
    model.cells_have_changed()  # forgets its graphs
    print(model.generate([[1, 2, 3]] * rows, max_new_tokens=4 * rows).tolist())
print("hits", cache.hits, "misses", cache.misses)
"""


def run(folder: Path, rows: str, env: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, str(MODEL), rows]
    env = {**env, "LORA_MS_GRAPH_CACHE": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_graphs_are_found_again_in_any_order_and_compute_the_same(tmp_path, python_env):
    folder = tmp_path / "graphs"
    *cold, counts = run(folder, "1,2", python_env)
    assert counts == "hits 0 misses 4"  # pieces of prompts and tokens, of one row and of two
    *warm, counts = run(folder, "2,1", python_env)
    assert counts == "hits 4 misses 0" and warm == cold[::-1]
    entries = [entry.folder for entry in Store(folder).entries()]
    contents = [(entry / GRAPH).read_bytes() for entry in entries]
    for entry, content in zip(entries, contents[1:] + contents[:1], strict=True):
        (entry / GRAPH).write_bytes(content)  # each has another's graph
    *forged, counts = run(folder, "1,2", python_env)
    assert counts == "hits 0 misses 4" and forged == cold
    for entry in (entry.folder for entry in Store(folder).entries()):
        (entry / GRAPH).write_bytes((entry / GRAPH).read_bytes()[:-100])
    *cut, counts = run(folder, "1,2", python_env)
    assert counts == "hits 0 misses 4" and cut == cold
