"""Projections: products with a weight of either type, its numbers, and what takes its place."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from lora_ms.nn.layers import Head, projection
from lora_ms.nn.projection import DenseProjection, projection_of

T, IN, OUT, RANK = 5, 6, 4, 2
RNG = np.random.default_rng(3)
X, W, BIAS = (RNG.standard_normal(shape).astype(np.float32) for shape in ((T, IN), (OUT, IN), OUT))
A, B = (RNG.standard_normal(shape).astype(np.float32) for shape in ((RANK, IN), (OUT, RANK)))


def made(operators, dtype: ms.Type = ms.float32, has_bias: bool = True, activation=None) -> DenseProjection:
    bias = Parameter(Tensor(BIAS, dtype), name="bias") if has_bias else None
    return DenseProjection(Parameter(Tensor(W, dtype), name="weight"), bias, operators, activation)


class Call(nn.Cell):
    """A method of a projection as a graph."""

    def __init__(self, layer: DenseProjection, method: str):
        super().__init__()
        self.layer, self.method, self.product = layer, method, layer.adapted_product(0.25)

    def construct(self, x, a=None, b=None, scaling=None):
        if self.method == "multiply":
            return self.layer.multiply(x)
        if self.method == "multiply_back":
            return self.layer.multiply_back(x)
        return self.layer.multiply_adapted(self.product, x, a, b, scaling)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_products(operators, dtype):
    """Float16 weights multiply float32 inputs exactly, as if they were widened."""
    layer = made(operators, dtype)
    weight = W.astype(np.float16).astype(np.float32) if dtype == ms.float16 else W
    x, grad = Tensor(X), RNG.standard_normal((T, OUT)).astype(np.float32)
    found = Call(layer, "multiply")(x)
    assert found.dtype == ms.float32
    np.testing.assert_allclose(found.asnumpy(), X @ weight.T, rtol=0, atol=1e-5)
    back = Call(layer, "multiply_back")(Tensor(grad)).asnumpy()
    np.testing.assert_allclose(back, grad @ weight, rtol=0, atol=1e-5)
    adapted = Call(layer, "adapted")(x, Tensor(A), Tensor(B), Tensor(1.5, ms.float32)).asnumpy()
    np.testing.assert_allclose(adapted, X @ (weight + 1.5 * B @ A).T, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(layer.numbers(), weight)


@pytest.mark.parametrize("shape", [(T, IN), (1, T, IN)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_layer(operators, has_bias, shape):
    """Any number of axes before the last; bias, then activation."""
    layer = made(operators, has_bias=has_bias, activation=nn.ReLU())
    found = layer(Tensor(X.reshape(shape))).asnumpy()
    wanted = np.maximum(X @ W.T + (BIAS if has_bias else 0), 0).reshape((*shape[:-1], OUT))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_another_weight_in_its_place(operators):
    activation = nn.ReLU()
    layer = made(operators, ms.float16, activation=activation)
    other = layer.replaced(2 * W, 3 * BIAS)
    assert type(other) is DenseProjection and other.operators is operators and other.activation is activation
    assert other.weight.dtype == other.bias.dtype == ms.float16
    np.testing.assert_array_equal(other.numbers(), (2 * W).astype(np.float16))
    np.testing.assert_array_equal(layer.numbers(), W.astype(np.float16))  # this one stays
    assert not made(operators).replaced(W).has_bias
    head = Head(Parameter(Tensor(W), name="weight"), None, operators)
    assert type(head.replaced(W)) is Head


def test_a_dense_layer_as_a_projection(native):
    """Shares its parameters, which keep their names; a projection is taken as it is."""
    dense = nn.Dense(IN, OUT, Tensor(W), Tensor(BIAS), activation="relu")
    layer = projection_of(dense, native)
    assert layer.weight is dense.weight and layer.bias is dense.bias
    assert [p.name for p in dense.get_parameters()] == ["weight", "bias"]
    assert (layer.in_channels, layer.out_channels) == (IN, OUT)
    np.testing.assert_allclose(layer(Tensor(X)).asnumpy(), dense(Tensor(X)).asnumpy(), rtol=0, atol=1e-5)
    assert projection_of(layer, native) is layer
    bare = projection_of(nn.Dense(IN, OUT, has_bias=False), native)
    assert not bare.has_bias and bare.bias is None


def test_a_layer_to_be_loaded(native):
    layer = projection(IN, OUT, has_bias=True, dtype=ms.float16, operators=native)
    assert [(p.name, p.shape, p.dtype) for p in layer.get_parameters()] == [
        ("weight", (OUT, IN), ms.float16),
        ("bias", (OUT,), ms.float16),
    ]
    assert not layer.numbers().any()
