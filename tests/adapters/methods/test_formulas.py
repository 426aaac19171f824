"""The formulas of DoRA, AdaLoRA, adapters of an embedding, biases beside B: values, gradients and merged weights.

Against NumPy in float64, and central differences of it.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.adapters.methods.adalora_cells import AdaLoRADense
from lora_ms.adapters.methods.dora_cells import DoRADense
from lora_ms.adapters.methods.embedding_cells import DoRAEmbedding, LoRAEmbedding
from lora_ms.adapters.methods.lora_cells import LoRADense
from lora_ms.nn.layers import Embedding

pytestmark = pytest.mark.usefixtures("graph_mode")
T, IN, OUT, RANK, ALPHA = 4, 6, 5, 2, 3.0
RNG = np.random.default_rng(6)
W, BIAS, X = (RNG.standard_normal(shape) for shape in ((OUT, IN), OUT, (T, IN)))
WEIGHTS = RNG.standard_normal((T, OUT))  # of the outputs in the number whose gradients are taken
VALUES = {
    "lora_a": RNG.standard_normal((RANK, IN)),
    "lora_b": RNG.standard_normal((OUT, RANK)),
    "lora_bias": RNG.standard_normal(OUT),
    "lora_e": RNG.standard_normal((RANK, 1)),
    "lora_magnitude": RNG.uniform(0.5, 2, OUT),
    "bias": BIAS,
}
PLAIN, ROOT = ALPHA / RANK, ALPHA / np.sqrt(RANK)


def f32(x: np.ndarray) -> Tensor:
    return Tensor(np.asarray(x, np.float32))


def dense(has_bias: bool = True, dtype: ms.Type = ms.float32) -> nn.Dense:
    bias = f32(BIAS).astype(dtype) if has_bias else None
    return nn.Dense(IN, OUT, f32(W).astype(dtype), bias, has_bias, dtype=dtype)


def filled(layer: nn.Cell, values: dict[str, np.ndarray] = VALUES) -> nn.Cell:
    for parameter in layer.get_parameters():
        if parameter.requires_grad:
            parameter.set_data(f32(values[parameter.name]))
    return layer


class Gradients(nn.Cell):
    """The layer's output, and the gradients of its sum with fixed weights in parameters and, but for ids, input."""

    def __init__(self, layer: nn.Cell, parameters: list[Parameter], weights: np.ndarray, of_input: bool):
        super().__init__()
        self.layer, self.weights = layer, f32(weights)
        self.grad = ops.value_and_grad(self.weighted, 0 if of_input else None, parameters, has_aux=True)

    def weighted(self, x):
        y = self.layer(x)
        return (y * self.weights).sum(), y

    def construct(self, x):
        return self.grad(x)


def run(layer: nn.Cell, x: Tensor, weights: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    of_input = x.dtype == ms.float32
    parameters = [p for p in layer.get_parameters() if p.requires_grad]
    (_, y), grads = Gradients(layer, parameters, weights, of_input)(x)
    of_parameters = grads[1] if of_input else grads
    names = [p.name.rpartition(".")[2] for p in parameters]
    found = {name: grad.asnumpy() for name, grad in zip(names, of_parameters, strict=True)}
    return y.asnumpy(), {**found, "x": grads[0].asnumpy()} if of_input else found


def near(found: np.ndarray, wanted: np.ndarray, atol: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


def lora(v: dict, scaling: float, has_bias: bool = True) -> np.ndarray:
    return v["x"] @ W.T + v["bias"] * has_bias + scaling * (v["x"] @ v["lora_a"].T @ v["lora_b"].T)


def with_lora_bias(v: dict, scaling: float, has_bias: bool = True) -> np.ndarray:
    return lora(v, scaling, has_bias) + scaling * v["lora_bias"]


NORM = {s: np.linalg.norm(W + s * VALUES["lora_b"] @ VALUES["lora_a"], axis=1) for s in (PLAIN, ROOT)}


def dora(v: dict, scaling: float, has_bias: bool = True) -> np.ndarray:
    """The norm is that of the values above, whatever ``v``: a constant of the gradient."""
    bare = v["x"] @ W.T + scaling * (v["x"] @ v["lora_a"].T @ v["lora_b"].T)
    return v["lora_magnitude"] / NORM[scaling] * bare + v["bias"] * has_bias


ADA = ALPHA / (RANK + 1e-5)


def adalora(v: dict, scaling: float, has_bias: bool = True) -> np.ndarray:
    return v["x"] @ W.T + v["bias"] * has_bias + scaling * (v["x"] @ (v["lora_e"] * v["lora_a"]).T @ v["lora_b"].T)


CASES = {
    "rslora": (LoRADense, {"use_rslora": True}, lora, ROOT),
    "lora_bias": (LoRADense, {"lora_bias": True}, with_lora_bias, PLAIN),
    "lora_bias_rslora": (LoRADense, {"lora_bias": True, "use_rslora": True}, with_lora_bias, ROOT),
    "trained_bias": (LoRADense, {"train_bias": True}, lora, PLAIN),
    "dora": (DoRADense, {}, dora, PLAIN),
    "dora_rslora": (DoRADense, {"use_rslora": True}, dora, ROOT),
    "dora_trained_bias": (DoRADense, {"train_bias": True}, dora, PLAIN),
    "adalora": (AdaLoRADense, {}, adalora, ADA),
}
TRAINED = {
    "rslora": {"lora_A.weight", "lora_B.weight"},
    "lora_bias": {"lora_A.weight", "lora_B.weight", "lora_B.bias"},
    "lora_bias_rslora": {"lora_A.weight", "lora_B.weight", "lora_B.bias"},
    "trained_bias": {"lora_A.weight", "lora_B.weight", "base_layer.bias"},
    "dora": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
    "dora_rslora": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
    "dora_trained_bias": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias"},
    "adalora": {"lora_A", "lora_B", "lora_E"},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_of_a_dense_layer(numerical_gradient, operators, case):
    kind, settings, formula, scaling = CASES[case]
    layer = filled(kind.from_dense(dense(), RANK, ALPHA, **settings, operators=operators))
    y, grads = run(layer, f32(X), WEIGHTS)
    values = {**VALUES, "x": X}
    near(y, formula(values, scaling))
    assert len(grads) == len(TRAINED[case]) + 1
    for name, found in grads.items():
        number = lambda value, name=name: (formula({**values, name: value}, scaling) * WEIGHTS).sum()  # noqa: E731
        near(found, numerical_gradient(number, values[name]), 5e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_trains_is_what_is_stored(case):
    kind, settings, *_ = CASES[case]
    layer = kind.from_dense(dense(), RANK, ALPHA, **settings)
    assert layer.tensors().keys() == TRAINED[case]
    trained = {id(p) for p in layer.get_parameters() if p.requires_grad}
    assert {id(p) for p in layer.tensors().values()} == trained
    assert all(p.dtype == ms.float32 for p in layer.tensors().values())


class Whole(nn.Cell):
    def __init__(self, layer: nn.Cell):
        super().__init__()
        self.layer = layer

    def construct(self):
        return self.layer.whole_weight()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_merged_and_whole_weight(case, has_bias):
    """The plain layer computes the formula; the weight that the head multiplies is the same one."""
    kind, settings, formula, scaling = CASES[case]
    layer = filled(kind.from_dense(dense(has_bias), RANK, ALPHA, **settings))
    plain = layer.merge()
    assert type(plain) is nn.Dense
    x = np.concatenate((np.zeros((1, IN)), np.eye(IN)))
    y = formula({**VALUES, "x": x}, scaling, has_bias)
    bias, weight = y[0], (y[1:] - y[0]).T
    near(plain.weight.asnumpy(), weight, 1e-6)
    assert plain.has_bias == (has_bias or "lora_bias" in case)
    near(plain.bias.asnumpy() if plain.has_bias else np.zeros(OUT), bias, 2e-6)
    if "lora_bias" not in case:
        near(Whole(layer)().asnumpy(), weight, 2e-6)


def test_a_gradient_through_the_norm_would_differ(numerical_gradient):
    """So that the test of DoRA's gradients tells the two apart."""

    def number(b, constant):
        norm = NORM[PLAIN] if constant else np.linalg.norm(W + PLAIN * b @ VALUES["lora_a"], axis=1)
        bare = X @ W.T + PLAIN * (X @ VALUES["lora_a"].T @ b.T)
        return (VALUES["lora_magnitude"] / norm * bare * WEIGHTS).sum()

    held, whole = (numerical_gradient(lambda b, c=c: number(b, c), VALUES["lora_b"]) for c in (True, False))
    assert np.abs(held - whole).max() > 0.1


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_dora_starts_from_the_lengths_of_the_rows(start):
    layer = DoRADense.from_dense(dense(), RANK, ALPHA, init_lora_weights=start)
    near(layer.lora_magnitude.asnumpy(), np.linalg.norm(W, axis=1), 1e-6)
    near(layer(f32(X)).asnumpy(), dense()(f32(X)).asnumpy())


def test_dora_drops_nothing_of_the_base():
    """B is zero: what training sees is the base, at the length of the magnitudes."""
    layer = DoRADense.from_dense(dense(), RANK, ALPHA, 0.5).set_train(True)
    layer.lora_magnitude.set_data(f32(VALUES["lora_magnitude"]))
    near(layer(f32(X)).asnumpy(), VALUES["lora_magnitude"] / np.linalg.norm(W, axis=1) * (X @ W.T) + BIAS)


def test_adalora_starts_at_nothing_with_small_factors():
    layer = AdaLoRADense.from_dense(nn.Dense(400, 500, has_bias=False), 10, ALPHA)
    np.testing.assert_array_equal(layer.lora_e.asnumpy(), 0)
    assert layer.lora_e.shape == (10, 1)
    np.testing.assert_allclose([layer.lora_a.asnumpy().std(), layer.lora_b.asnumpy().std()], 0.02, rtol=0.05)


@pytest.mark.parametrize("kind", [LoRADense, DoRADense, AdaLoRADense])
def test_half_precision_base(operators, kind):
    layer = filled(kind.from_dense(dense(dtype=ms.float16), RANK, ALPHA, operators=operators))
    y = layer(f32(X).astype(ms.float16))
    assert y.dtype == layer.merge().weight.dtype == ms.float16
    assert all(p.dtype == ms.float32 for p in layer.tensors().values())
    formula, scaling = {LoRADense: (lora, PLAIN), DoRADense: (dora, PLAIN), AdaLoRADense: (adalora, ADA)}[kind]
    np.testing.assert_allclose(y.asnumpy(), formula({**VALUES, "x": X}, scaling), rtol=0.01, atol=0.05)


def test_pissa_subtracts_its_initial_update():
    """The base keeps its weight; the layer's own copy and the start are it together, before and after a change."""
    base = dense()
    layer = LoRADense.from_dense(base, RANK, ALPHA, init_lora_weights="pissa")
    a, b = layer.lora_a.asnumpy(), layer.lora_b.asnumpy()
    near(layer.base.weight.asnumpy() + PLAIN * b @ a, W, 1e-6)
    np.testing.assert_array_equal(base.weight.asnumpy(), W.astype(np.float32))
    near(layer(f32(X)).asnumpy(), X @ W.T + BIAS)
    other = VALUES["lora_a"].astype(np.float32), VALUES["lora_b"].astype(np.float32)
    layer.reset_initial_update(*other)
    near(layer.base.weight.asnumpy(), W - PLAIN * other[1] @ other[0], 2e-6)
    assert not layer.base.weight.requires_grad and layer.initial is not None
    layer.lora_a.set_data(f32(other[0]))
    layer.lora_b.set_data(f32(other[1]))
    near(layer.merge().weight.asnumpy(), W, 2e-6)


def test_starts_follow_mindspores_seed():
    def factors():
        layer = LoRADense.from_dense(dense(), RANK, ALPHA, init_lora_weights="gaussian")
        return layer.lora_a.asnumpy()

    found = []
    for seed in (3, 3, 4):
        ms.set_seed(seed)
        found.append(factors())
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.01


VOCABULARY, HIDDEN = 7, 5
TABLE, IDS = RNG.standard_normal((VOCABULARY, HIDDEN)), np.array([3, 0, 3, 6], np.int32)  # one row twice
TABLE_VALUES = {
    "lora_a": RNG.standard_normal((RANK, VOCABULARY)),
    "lora_b": RNG.standard_normal((HIDDEN, RANK)),
    "lora_magnitude": RNG.uniform(0.5, 2, HIDDEN),
}


def table(dtype: ms.Type = ms.float32) -> Embedding:
    embedding = Embedding.zeros(VOCABULARY, HIDDEN, dtype)
    embedding.weight.set_data(f32(TABLE).astype(dtype))
    return embedding


def rows(v: dict, scaling: float, ids: np.ndarray = IDS) -> np.ndarray:
    return TABLE[ids] + scaling * v["lora_a"].T[ids] @ v["lora_b"].T


COLUMN_NORM = {
    s: np.linalg.norm(TABLE + s * (TABLE_VALUES["lora_b"] @ TABLE_VALUES["lora_a"]).T, axis=0) for s in (PLAIN, ROOT)
}


def dora_rows(v: dict, scaling: float, ids: np.ndarray = IDS) -> np.ndarray:
    return v["lora_magnitude"] / COLUMN_NORM[scaling] * rows(v, scaling, ids)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("kind", "formula"), [(LoRAEmbedding, rows), (DoRAEmbedding, dora_rows)])
def test_values_gradients_and_merging_of_an_embedding(numerical_gradient, kind, formula, use_rslora):
    scaling = ROOT if use_rslora else PLAIN
    layer = filled(kind(table(), RANK, ALPHA, use_rslora), TABLE_VALUES)
    y, grads = run(layer, Tensor(IDS), WEIGHTS)
    near(y, formula(TABLE_VALUES, scaling))
    assert grads.keys() == {"lora_a", "lora_b"} | ({"lora_magnitude"} if kind is DoRAEmbedding else set())
    for name, found in grads.items():
        number = lambda value, name=name: (formula({**TABLE_VALUES, name: value}, scaling) * WEIGHTS).sum()  # noqa: E731
        near(found, numerical_gradient(number, TABLE_VALUES[name]), 5e-5)
    plain = layer.merge()
    assert type(plain) is Embedding
    near(plain.weight.asnumpy(), formula(TABLE_VALUES, scaling, np.arange(VOCABULARY)), 2e-6)


@pytest.mark.parametrize("kind", [LoRAEmbedding, DoRAEmbedding])
def test_a_fresh_adapter_on_an_embedding(kind):
    """A is zero, B normal with deviation 1, as PEFT has them."""
    base = table(ms.float16)
    layer = kind(base, 300, ALPHA)
    assert layer.base is base and not base.weight.requires_grad
    np.testing.assert_array_equal(layer.lora_a.asnumpy(), 0)
    np.testing.assert_allclose(layer.lora_b.asnumpy().std(), 1, rtol=0.1)
    stored = {"lora_embedding_A": (300, VOCABULARY), "lora_embedding_B": (HIDDEN, 300)}
    stored |= {"lora_magnitude_vector": (HIDDEN,)} if kind is DoRAEmbedding else {}
    assert {name: p.shape for name, p in layer.tensors().items()} == stored
    assert all(p.dtype == ms.float32 and p.requires_grad for p in layer.tensors().values())
    y = layer(Tensor(IDS))
    assert y.dtype == layer.merge().weight.dtype == ms.float16
    near(y.asnumpy(), TABLE.astype(np.float16)[IDS], 0 if kind is LoRAEmbedding else 2e-3)
