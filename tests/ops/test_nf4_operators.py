"""Products with weights in NF4: as with the numbers that they stand for, with the gradient in x."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.nf4 import NF4Projection
from lora_ms.ops.portable import Dropout
from lora_ms.quant import nf4

T, RANK = 5, 3
# rows of a multiple of 64 numbers; rows of no such number, with a last block that is not full; rows of odd length
SHAPES = [(6, 128), (4, 48), (5, 26), (4, 27)]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


class Gradients(nn.Cell):
    """The sum of a cell's output times fixed numbers, and its gradients in the inputs ``places``."""

    def __init__(self, cell: nn.Cell, weights: np.ndarray, places: tuple[int, ...]):
        super().__init__()
        self.weighted = Weighted(cell, weights)
        self.grad = ops.value_and_grad(self.weighted, places, has_aux=True)

    def construct(self, *inputs):
        return self.grad(*inputs)


class Weighted(nn.Cell):
    def __init__(self, cell: nn.Cell, weights: np.ndarray):
        super().__init__()
        self.cell = cell
        self.weights = Tensor(weights)

    def construct(self, *inputs):
        y = self.cell(*inputs)
        return (y * self.weights).sum(), y


class Projected(nn.Cell):
    def __init__(self, layer: NF4Projection, dropout: float | None = None):
        super().__init__()
        self.layer = layer
        self.adapted = dropout is not None
        self.product = layer.adapted_product(dropout or 0.0)

    def construct(self, x, a=None, b=None, scaling=None, rows=None, columns=None):
        if self.adapted:
            return self.layer.multiply_adapted(self.product, x, a, b, scaling, (rows, columns))
        return self.layer(x)


def made(shape: tuple[int, int], double: bool, operators) -> NF4Projection:
    bias = Parameter(Tensor(random(shape[0], seed=4)), name="bias")
    return NF4Projection(nf4.quantise(random(*shape), double), bias, operators)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(operators, shape, double):
    layer = made(shape, double, operators)
    weight, x, grad = layer.numbers(), random(T, shape[1], seed=1), random(T, shape[0], seed=2)
    (_, y), d_x = Gradients(Projected(layer), grad, (0,))(Tensor(x))
    np.testing.assert_allclose(y.asnumpy(), x @ weight.T + layer.bias.asnumpy(), rtol=0, atol=5e-5)
    np.testing.assert_allclose(d_x.asnumpy(), grad @ weight, rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_adapted_product(operators, shape):
    layer = made(shape, True, operators)
    a, b = random(RANK, shape[1], seed=5), random(shape[0], RANK, seed=6)
    x, grad = random(T, shape[1], seed=1), random(T, shape[0], seed=2)
    rows, columns = (abs(random(*size, seed=7)) % 1 for size in ((T, 1), (1, shape[1])))
    seen = Dropout(0.5)(*map(Tensor, (x, rows, columns))).asnumpy()
    kept = seen / x
    inputs = [Tensor(value) for value in (x, a, b, np.float32(1.5), rows, columns)]
    (_, y), (d_x, d_a, d_b) = Gradients(Projected(layer, 0.5), grad, (0, 1, 2))(*inputs)
    weight = layer.numbers()
    wanted = {
        "y": (y, x @ weight.T + 1.5 * seen @ a.T @ b.T),
        "dx": (d_x, grad @ weight + 1.5 * (grad @ b @ a) * kept),
        "da": (d_a, 1.5 * (grad @ b).T @ seen),
        "db": (d_b, 1.5 * grad.T @ (seen @ a.T)),
    }
    for name, (found, value) in wanted.items():
        np.testing.assert_allclose(found.asnumpy(), value, rtol=0, atol=2e-4, err_msg=name)


def test_rows_and_back(operators):
    """What DoRA and the head's losses ask for: a few rows, and the way back without a gradient."""
    layer = made((6, 128), True, operators)

    class Both(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def construct(self, rows, grad):
            return self.layer.multiply_rows(rows), self.layer.multiply_back(grad)

    rows, grad = random(2, 128, seed=8), random(T, 6, seed=9)
    low, back = Both()(Tensor(rows), Tensor(grad))
    np.testing.assert_allclose(low.asnumpy(), rows @ layer.numbers().T, rtol=0, atol=5e-5)
    np.testing.assert_allclose(back.asnumpy(), grad @ layer.numbers(), rtol=0, atol=5e-5)


def test_float16_between_layers(operators):
    """As on a card: the product is in the type of x."""
    layer = made((6, 128), False, operators)
    x = random(T, 128, seed=1).astype(np.float16)
    y = Projected(layer)(Tensor(x))
    assert y.dtype == ms.float16
    wanted = x.astype(np.float32) @ layer.numbers().T + layer.bias.asnumpy()
    np.testing.assert_allclose(y.asnumpy().astype(np.float32), wanted, rtol=0, atol=0.1)


def test_what_stands_in_its_place(operators):
    layer = made((6, 128), True, operators)
    assert [p.name for p in layer.get_parameters()] == [
        *("codes", "absmax", "nested_codes", "nested_absmax", "offset"),
        "bias",
    ]
    assert not any(p.requires_grad for p in layer.weights())
    assert layer.codes.shape == (6, 64) and layer.codes.dtype == ms.uint8
    biased = layer.with_bias(Parameter(Tensor(np.zeros(6, np.float32)), name="bias"))
    np.testing.assert_array_equal(biased.numbers(), layer.numbers())
    dense = layer.trainable()
    np.testing.assert_array_equal(dense.numbers(), layer.numbers())
    assert dense.weight.requires_grad and dense.bias is layer.bias
    replaced = layer.replaced(np.ones((6, 128), np.float32))
    assert replaced.numbers().all() and not replaced.has_bias and not replaced.quantised
