"""Bottleneck adapters: their formula, where they stand, their files, and what they refuse."""

import json

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from lora_ms.adapters.inject import adapted_layers, adapter_cells, inject
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.bottleneck import BottleneckConfig, BottleneckSpec
from lora_ms.adapters.methods.bottleneck_cells import BottleneckDense
from lora_ms.adapters.peft_format import load_adapter, read_adapter_config, read_tensors, save_adapter
from lora_ms.cli import main as cli
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory

pytestmark = pytest.mark.usefixtures("graph_mode")
RNG = np.random.default_rng(8)
T, IN, OUT, SIZE = 4, 6, 5, 3
W, BIAS, X, WEIGHTS = (RNG.standard_normal(shape) for shape in ((OUT, IN), OUT, (T, IN), (T, OUT)))
START = [RNG.standard_normal(shape) for shape in ((SIZE, OUT), SIZE, (OUT, SIZE), OUT)]
FUNCTIONS = {"relu": lambda x: np.maximum(x, 0), "silu": lambda x: x / (1 + np.exp(-x)), "tanh": np.tanh}


def f32(x: np.ndarray) -> Tensor:
    return Tensor(np.asarray(x, np.float32))


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def formula(x: np.ndarray, parts: list[np.ndarray], activation: str) -> np.ndarray:
    """Parallel where D takes what the layer takes."""
    down, d, up, u = parts
    h = x @ W.T + BIAS
    z = x if down.shape[1] == IN else h
    return h + 0.7 * (FUNCTIONS[activation](z @ down.T + d) @ up.T + u)


class Gradients(nn.Cell):
    """The output, and the gradients in x and in what trains of its sum with fixed weights."""

    def __init__(self, layer: nn.Cell):
        super().__init__()
        self.layer, self.weights = layer, f32(WEIGHTS)
        self.grad = ops.value_and_grad(self.weighted, 0, list(layer.tensors().values()), has_aux=True)

    def weighted(self, x):
        y = self.layer(x)
        return (y * self.weights).sum(), y

    def construct(self, x):
        return self.grad(x)


@pytest.mark.parametrize(("activation", "parallel"), [("silu", False), ("relu", False), ("silu", True)])
def test_values_and_gradients(numerical_gradient, native, activation, parallel):
    start = [RNG.standard_normal((SIZE, IN)), *START[1:]] if parallel else START
    layer = BottleneckDense(
        nn.Dense(IN, OUT, f32(W), f32(BIAS)), BottleneckSpec(SIZE, 16), activation, 0.7, native, parallel=parallel
    )
    np.testing.assert_allclose(layer(f32(X)).asnumpy(), X @ W.T + BIAS, rtol=0, atol=2e-5)
    for parameter, value in zip(layer.tensors().values(), start, strict=True):
        parameter.set_data(f32(value))
    (_, y), (d_x, d_parts) = Gradients(layer)(f32(X))
    np.testing.assert_allclose(y.asnumpy(), formula(X, start, activation), rtol=0, atol=2e-5)
    wanted = numerical_gradient(lambda x: (formula(x, start, activation) * WEIGHTS).sum(), X)
    np.testing.assert_allclose(d_x.asnumpy(), wanted, rtol=0, atol=5e-5)
    for i, found in enumerate(d_parts):

        def number(value: np.ndarray, i: int = i) -> float:
            return (formula(X, [*start[:i], value, *start[i + 1 :]], activation) * WEIGHTS).sum()

        np.testing.assert_allclose(found.asnumpy(), numerical_gradient(number, start[i]), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("settings", "leaves", "size"),
    [
        ({}, {"o_proj", "down_proj"}, 4),
        ({"adapter_style": "pfeiffer", "reduction_factor": 8}, {"down_proj"}, 8),
        ({"target_modules": "q_proj", "bottleneck_size": 3}, {"q_proj"}, 3),
        ({"target_modules": "q_proj", "adapter_style": "parallel"}, {"q_proj"}, 4),
    ],
)
def test_where_they_stand(bare, settings, leaves, size):
    model = bare()
    report = inject(model, BottleneckConfig(**settings))
    cells = adapted_layers(model)
    assert {name.rpartition(".")[2] for name in cells} == leaves
    assert {cell.down_weight.shape for cell in cells.values()} == {(size, 64)}
    assert report.trainable == len(cells) * (2 * size * 64 + size + 64)


@pytest.mark.parametrize("style", ["houlsby", "parallel"])
def test_saved_loaded_checked_and_refused(reference, native, tmp_path, capsys, style):
    base = reference / "models" / "qwen2"
    ids = Tensor(RNG.integers(4, 128, (2, 10)).astype(np.int32))

    def fresh():
        return load_directory(base, operators=native).set_train(False)

    model, config = (
        fresh(),
        BottleneckConfig(adapter_style=style, bottleneck_size=3, adapter_activation="gelu", residual_scaling=0.5),
    )
    plain = model(ids).asnumpy()
    inject(model, config)
    np.testing.assert_array_equal(model(ids).asnumpy(), plain)
    for cell in adapter_cells(model).values():
        for parameter in cell.tensors().values():
            parameter.set_data(f32(parameter.asnumpy() + 0.3 * RNG.standard_normal(parameter.shape)))
    moved = model(ids).asnumpy()
    assert np.abs(moved - plain).mean() > 0.05
    save_adapter(model, tmp_path, config, str(base))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "BOTTLENECK" and written["target_modules"] == ["down_proj", "o_proj"]
    again = read_adapter_config(tmp_path)
    assert (again.bottleneck_size, again.adapter_activation, again.residual_scaling) == (3, "gelu", 0.5)
    assert again.adapter_style == style
    other = fresh()
    load_adapter(other, tmp_path)
    np.testing.assert_array_equal(other(ids).asnumpy(), moved)
    assert len(read_tensors(tmp_path)) == 16
    words = ["--load_adapter", str(tmp_path), "--load_checkpoint", str(base)]
    assert cli.main(["check-adapter", *words]) == 0
    assert "U not zero      ok       all 4 modules change something" in capsys.readouterr().out
    assert "cannot be merged" in error_of(merge, model)
    assert cli.main(["merge", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "cannot be merged" in capsys.readouterr().err
    message = error_of(inject, fresh(), BottleneckConfig(target_modules=("lm_head",)))
    assert (
        message == "bottleneck adapters stand behind dense layers, not behind lm_head: leave it out of target_modules"
    )
