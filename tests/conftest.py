"""What all tests share. MindSpore is imported by the tests that need it alone, and looks at these variables then."""

import gc
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore's log: errors only
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers without torch is what we want
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests that need a hub have a stand-in of their own
os.environ.setdefault("LORA_MS_GRAPH_CACHE", "False")  # a folder of graphs that tests share is scripts/test.sh's choice

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference"


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_looked_through() -> None:
    """MindSpore has all cycles collected before it compiles a graph, which takes long where there are many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def runtime():
    """What a run begins with: MindSpore's static graphs, on the CPU, and our own operators."""
    from lora_ms.runtime import device

    return device.setup("CPU")[0]


@pytest.fixture(scope="session")
def graph_mode(runtime) -> None:
    """MindSpore as training uses it: static graphs, on the CPU."""


@pytest.fixture(scope="session")
def native(runtime):
    """Our own operators; fails where they cannot be compiled."""
    assert runtime.operators.name == "native"
    return runtime.operators


@pytest.fixture(scope="module", params=["native", "portable"])
def operators(request, native):
    """A test that takes these runs once with our own operators, and once with MindSpore's."""
    from lora_ms.ops import PORTABLE

    return native if request.param == "native" else PORTABLE


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference models, adapters and values (see its README)."""
    return REFERENCE


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """``golden("logits_qwen2")``: the arrays of that file of the reference folder."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(REFERENCE / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def events() -> Callable[[Path, type], list]:
    """``events(file, Event)``: what an event file holds: for each its length, a checksum, its bytes, a checksum."""

    def read(file: Path, kind: type) -> list:
        data, found = file.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(kind.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        return found

    return read


@pytest.fixture(scope="session")
def raw_tensors() -> Callable[[Path], dict[str, np.ndarray]]:
    """Tensors of a safetensors file or of a model directory, as float32, read without the code under test."""
    return read_raw


def read_raw(path: Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors |= read_raw(file)
        return tensors
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info["dtype"]]
        values = np.frombuffer(data[start + begin : start + end], kind)
        if info["dtype"] == "BF16":  # the upper half of a float32, whose lower half is zero
            values = np.stack((np.zeros_like(values), values), -1).reshape(-1).view("<f4")
        tensors[name] = values.astype(np.float32).reshape(info["shape"])
    return tensors


@pytest.fixture(scope="session")
def numerical_gradient() -> Callable[[Callable[[np.ndarray], float], np.ndarray], np.ndarray]:
    """``numerical_gradient(f, x)``: central differences of the number f(x) in float64."""

    def gradient(f: Callable[[np.ndarray], float], x: np.ndarray, width: float = 1e-6) -> np.ndarray:
        x, result = x.astype(np.float64), np.zeros(x.shape)
        for place in np.ndindex(x.shape):
            up, down = x.copy(), x.copy()
            up[place] += width
            down[place] -= width
            result[place] = (f(up) - f(down)) / (2 * width)
        return result

    return gradient


@pytest.fixture(scope="session")
def python_env() -> dict[str, str]:
    """Environment of a Python process of its own that imports this repository's ``lora_ms``."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def python() -> str:
    """The Python that runs the tests."""
    return sys.executable


@pytest.fixture
def gradients() -> Callable:
    """``gradients(cell, places, *inputs)``: the cell's output, a number, and its gradients in the inputs ``places``."""
    from mindspore import Tensor, nn, ops

    class Gradient(nn.Cell):
        def __init__(self, cell: nn.Cell, places: tuple[int, ...]):
            super().__init__()
            self.grad = ops.value_and_grad(cell, places)

        def construct(self, *inputs):
            return self.grad(*inputs)

    def run(cell, places, *inputs):
        value, grads = Gradient(cell, places)(*(Tensor(x) for x in inputs))
        grads = grads if isinstance(grads, tuple) else (grads,)  # MindSpore returns a single one bare
        return value.asnumpy(), [g.asnumpy() for g in grads]

    return run


@pytest.fixture
def squares() -> Callable:
    """``squares(cell)``: a cell that gives the sum of the squares of what ``cell`` gives."""
    from mindspore import nn

    class Squares(nn.Cell):
        def __init__(self, cell: nn.Cell):
            super().__init__()
            self.cell = cell

        def construct(self, x):
            y = self.cell(x)
            return (y * y).sum()

    return Squares
