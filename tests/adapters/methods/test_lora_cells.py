"""The adapter's formula, its sharing and freezing, its dropout."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.methods.lora_cells import LoRADense
from lora_ms.errors import LoraMsError
from lora_ms.nn.dropout import DrawTable
from lora_ms.nn.layers import Head
from lora_ms.nn.parallel import WHOLE
from lora_ms.nn.projection import projection_of
from lora_ms.ops import PORTABLE

pytestmark = pytest.mark.usefixtures("graph_mode")
RNG = np.random.default_rng(5)
IN, OUT, RANK, ALPHA = 6, 5, 2, 3.0
W, BIAS = RNG.standard_normal((OUT, IN)), RNG.standard_normal(OUT)
A, B = RNG.standard_normal((RANK, IN)), RNG.standard_normal((OUT, RANK))


def f32(x: np.ndarray) -> Tensor:
    return Tensor(x.astype(np.float32))


def base(has_bias: bool) -> nn.Dense:
    return nn.Dense(IN, OUT, f32(W), f32(BIAS) if has_bias else None, has_bias)


def adapted(has_bias: bool, **kwargs) -> LoRADense:
    layer = LoRADense.from_dense(base(has_bias), RANK, ALPHA, **kwargs)
    layer.lora_a.set_data(f32(A))
    layer.lora_b.set_data(f32(B))
    return layer


def formula(x: np.ndarray, has_bias: bool) -> np.ndarray:
    return x @ W.T + BIAS * has_bias + ALPHA / RANK * (x @ A.T) @ B.T


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN)])
def test_the_formula_alone_and_merged(operators, has_bias, shape):
    x = np.random.default_rng(1).standard_normal(shape)
    layer = adapted(has_bias, operators=operators)
    np.testing.assert_allclose(layer(f32(x)).asnumpy(), formula(x, has_bias), rtol=0, atol=1e-5)
    merged = layer.merge()
    assert type(merged) is nn.Dense
    np.testing.assert_allclose(merged.weight.asnumpy(), W + ALPHA / RANK * B @ A, rtol=0, atol=1e-6)
    np.testing.assert_allclose(merged(f32(x)).asnumpy(), formula(x, has_bias), rtol=0, atol=1e-5)


def test_merging_leaves_the_layer_as_it_was():
    layer = adapted(True)
    layer.merge()
    np.testing.assert_array_equal(layer.base.weight.asnumpy(), W.astype(np.float32))


def test_a_fresh_adapter_changes_nothing(operators):
    dense, x = projection_of(base(True), operators), f32(RNG.standard_normal((3, IN)))
    before = dense(x).asnumpy()
    layer = LoRADense.from_dense(dense, RANK, ALPHA)
    np.testing.assert_array_equal(layer(x).asnumpy(), before)
    assert (layer.lora_b.asnumpy() == 0).all()


def test_from_dense_shares_and_freezes():
    dense = base(True)
    layer = LoRADense.from_dense(dense, RANK, ALPHA)
    assert layer.base.weight is dense.weight and layer.base.bias is dense.bias
    assert {p.name: p.requires_grad for p in layer.get_parameters()} == {
        "weight": False,
        "bias": False,
        "lora_a": True,
        "lora_b": True,
        "scaling": False,
    }
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((RANK, IN), (OUT, RANK))
    assert (layer.lora_rank, layer.lora_alpha) == (RANK, ALPHA)
    assert float(layer.scaling.asnumpy()) == np.float32(ALPHA / RANK)


def test_a_starts_kaiming_uniform():
    """Slope sqrt(5): uniform within 1 / sqrt(in), as in PEFT."""
    a = LoRADense(400, 3, 50, 1.0).lora_a.asnumpy()
    assert 0.999 / 20 < np.abs(a).max() <= 1 / 20
    np.testing.assert_allclose(a.std(), 1 / 20 / np.sqrt(3), rtol=0.02)


def test_factors_stay_float32_beside_a_float16_weight(operators):
    dense = nn.Dense(IN, OUT, f32(W).astype(ms.float16), f32(BIAS).astype(ms.float16), dtype=ms.float16)
    layer = LoRADense.from_dense(dense, RANK, ALPHA, operators=operators)
    layer.lora_b.set_data(f32(B))
    layer.lora_a.set_data(f32(A))
    assert {p.name: p.dtype for p in layer.get_parameters()} == {
        "weight": ms.float16,
        "bias": ms.float16,
        "lora_a": ms.float32,
        "lora_b": ms.float32,
        "scaling": ms.float32,
    }
    x = np.random.default_rng(1).standard_normal((3, IN))
    y = layer(f32(x).astype(ms.float16))
    assert y.dtype == ms.float16
    np.testing.assert_allclose(y.asnumpy(), formula(x, True), rtol=0, atol=0.05)
    assert layer.merge().weight.dtype == ms.float16
    wide = adapted(True, compute_dtype=ms.float32, operators=operators)(f32(x).astype(ms.float16))
    assert wide.dtype == ms.float16
    half = x.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(wide.asnumpy(), formula(half, True).astype(np.float16), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "alpha", "dropout", "message"),
    [
        (0, 1.0, 0.0, "lora_rank must be at least 1, got 0"),
        (2, 0.0, 0.0, "lora_alpha must be above 0, got 0.0"),
        (2, -1.0, 0.0, "lora_alpha must be above 0, got -1.0"),
        (2, 1.0, 1.0, r"lora_dropout must be in \[0, 1\), got 1.0"),
        (2, 1.0, -0.1, r"lora_dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_arguments_out_of_range(rank, alpha, dropout, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoRADense(IN, OUT, rank, alpha, dropout)


def test_dropout_acts_in_training_alone_and_keeps_the_expectation(operators):
    """With W = 0 and A = B = 1 the layer's output is its dropout's."""
    size, p = 64, 0.25
    ms.set_seed(11)
    dense = nn.Dense(size, size, "zeros", has_bias=False)
    layer = LoRADense.from_dense(dense, size, float(size), p, operators=operators)
    layer.lora_a.set_data(f32(np.eye(size)))
    layer.lora_b.set_data(f32(np.eye(size)))
    ones = f32(np.ones((256, size)))
    layer.set_train(False)
    np.testing.assert_array_equal(layer(ones).asnumpy(), np.ones((256, size), np.float32))
    layer.set_train(True)
    first, second = layer(ones).asnumpy(), layer(ones).asnumpy()
    assert set(np.unique(first)) == {np.float32(0), np.float32(1 / (1 - p))}
    assert abs((first == 0).mean() - p) < 0.02  # six deviations of 16384 draws
    assert 0.3 < (first != second).mean() < 0.45  # 2 p (1 - p) where the draws are independent
    zeros = f32(np.zeros((256, size)))
    np.testing.assert_array_equal(layer(zeros).asnumpy(), np.zeros((256, size), np.float32))


def test_gradients_with_dropout(gradients, squares, operators):
    layer = adapted(True, lora_dropout=0.4, operators=operators).set_train(True)
    table = DrawTable([layer.lora_dropout.draws], 9, IN, seed=3)
    table.fill(2, 1)
    numbers = table.table.asnumpy()[0]
    turns = np.outer(8 + 32 * numbers[:9], 8 + 32 * numbers[9:])
    kept = (turns - np.floor(turns) >= 0.4) / 0.6
    assert 0 < (kept == 0).mean() < 1
    x = RNG.standard_normal((9, IN)).astype(np.float32)

    y = x @ W.T + BIAS + ALPHA / RANK * (x * kept) @ A.T @ B.T
    value, (d_x,) = gradients(squares(layer), (0,), x)
    np.testing.assert_allclose(value, (y * y).sum(), rtol=1e-5)
    np.testing.assert_allclose(d_x, 2 * (y @ W + ALPHA / RANK * (y @ B @ A) * kept), rtol=1e-4, atol=1e-4)
    factors = ms.ParameterTuple([layer.lora_a, layer.lora_b])
    d_a, d_b = ms.grad(squares(layer), None, factors)(Tensor(x))
    np.testing.assert_allclose(d_a.asnumpy(), 2 * ALPHA / RANK * (y @ B).T @ (x * kept), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_b.asnumpy(), 2 * ALPHA / RANK * y.T @ (x * kept @ A.T), rtol=1e-4, atol=1e-4)
    table.close()


def test_a_bias_of_the_head_is_refused():
    """The loss takes the head's weight alone."""
    head = Head.zeros(IN, OUT, has_bias=False, dtype=ms.float32, operators=PORTABLE)
    config = LoraConfig(RANK, ALPHA, target_modules=("lm_head",), lora_bias=True)
    with pytest.raises(LoraMsError) as caught:
        config.build(Target("lm_head", head, WHOLE, PORTABLE), config.spec("lm_head"))
    assert str(caught.value) == "lora_bias does not support an adapter on the head: leave one of them out"
