"""Values and hand-written gradients of the portable operators, against float64 formulas and central differences."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from lora_ms.ops.portable import Rotary, SoftmaxAttention

pytestmark = pytest.mark.usefixtures("graph_mode")


class Weighted(nn.Cell):
    """Sum of a cell's (first) output times fixed numbers: a number whose gradient needs that of every output."""

    def __init__(self, cell: nn.Cell, weights: np.ndarray, first: bool = False):
        super().__init__()
        self.cell, self.weights, self.first = cell, Tensor(weights), first

    def construct(self, *inputs):
        output = self.cell(*inputs)
        if self.first:
            output = output[0]
        return (output * self.weights).sum()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def attend(q, k, v, visible):
    scores = q @ k.transpose(0, 2, 1) + visible
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    return probs / probs.sum(-1, keepdims=True) @ v


def test_attention_and_its_gradients(gradients, numerical_gradient):
    """Two rows of each product share a head; keys that lie ahead are hidden."""
    q, k, v, weights = random(2, 6, 4), random(2, 3, 4, seed=1), random(2, 3, 5, seed=2), random(2, 6, 5, seed=3)
    visible = np.tile(np.where(np.tri(3), 0, -1e9), (2, 2, 1)).astype(np.float32)
    value, grads = gradients(Weighted(SoftmaxAttention(), weights, first=True), (0, 1, 2), q, k, v, visible)
    np.testing.assert_allclose(value, (attend(q, k, v, visible) * weights).sum(), rtol=1e-5)
    arrays = [q, k, v]
    for place, found in enumerate(grads):

        def number(x, place=place):
            wide = [x if i == place else a.astype(np.float64) for i, a in enumerate(arrays)]
            return (attend(*wide, visible) * weights).sum()

        np.testing.assert_allclose(found, numerical_gradient(number, arrays[place]), rtol=0, atol=2e-6)


def rotate(x, angles):
    """Turns each pair (x[i], x[i + d/2]) counter-clockwise by its angle."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


def test_rotation_and_its_gradient(gradients, numerical_gradient):
    x, weights, angles = random(5, 6), random(5, 6, seed=1), random(5, 3, seed=2)
    cos = np.concatenate((np.cos(angles), np.cos(angles)), -1)
    sin = np.concatenate((-np.sin(angles), np.sin(angles)), -1)
    output = Rotary(6)(Tensor(x), Tensor(cos), Tensor(sin)).asnumpy()
    np.testing.assert_allclose(output, rotate(x, angles), rtol=0, atol=1e-6)
    _, (found,) = gradients(Weighted(Rotary(6), weights), (0,), x, cos, sin)
    wanted = numerical_gradient(lambda y: (rotate(y, angles.astype(np.float64)) * weights).sum(), x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_norm_and_its_gradients(gradients, numerical_gradient, operators):
    """The small rows make eps count."""
    eps = 1e-3
    x, gain, weights = random(4, 6), random(6, seed=1), random(4, 6, seed=2)
    x[0] *= 1e-2
    x[1] = 0

    def norm(y, g):
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + eps) * g

    wide_x, wide_gain = x.astype(np.float64), gain.astype(np.float64)
    output = operators.rms_norm(eps)(Tensor(x), Tensor(gain)).asnumpy()
    np.testing.assert_allclose(output, norm(wide_x, wide_gain), rtol=0, atol=2e-6)
    _, (d_x, d_gain) = gradients(Weighted(operators.rms_norm(eps), weights), (0, 1), x, gain)
    want_x = numerical_gradient(lambda y: (norm(y, wide_gain) * weights).sum(), x)
    want_gain = numerical_gradient(lambda g: (norm(wide_x, g) * weights).sum(), gain)
    np.testing.assert_allclose(d_x, want_x, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(d_gain, want_gain, rtol=0, atol=2e-6)


def test_low_rank_update_and_its_gradients(gradients, numerical_gradient, operators):
    x, a, b, weights = random(5, 6), random(2, 6, seed=1), random(4, 2, seed=2), random(5, 4, seed=3)
    scaling = np.float32(1.5)
    update = operators.low_rank_update()(Tensor(x), Tensor(a), Tensor(b), Tensor(scaling))
    np.testing.assert_allclose(update.asnumpy(), 1.5 * x @ a.T @ b.T, rtol=0, atol=1e-5)
    _, grads = gradients(Weighted(operators.low_rank_update(), weights), (0, 1, 2), x, a, b, scaling)
    arrays = [x, a, b]
    for place, found in enumerate(grads):

        def number(value, place=place):
            wide = [value if i == place else array.astype(np.float64) for i, array in enumerate(arrays)]
            return (1.5 * wide[0] @ wide[1].T @ wide[2].T * weights).sum()

        np.testing.assert_allclose(found, numerical_gradient(number, arrays[place]), rtol=0, atol=2e-5)


def test_scaled_columns_and_their_gradients(gradients, operators):
    """y = x diag(s): dx = dy diag(s), ds = the columns' sums of dy * x."""
    x, scale, weights = random(5, 3), random(3, seed=1), random(5, 3, seed=2)
    scaled = operators.column_scale()(Tensor(x), Tensor(scale)).asnumpy()
    np.testing.assert_allclose(scaled, x * scale, rtol=0, atol=1e-6)
    _, (d_x, d_scale) = gradients(Weighted(operators.column_scale(), weights), (0, 1), x, scale)
    np.testing.assert_allclose(d_x, weights * scale, rtol=0, atol=1e-6)
    np.testing.assert_allclose(d_scale, (weights * x).sum(0), rtol=0, atol=1e-5)
