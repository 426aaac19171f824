"""The sets of operators: which one is chosen, and that all of them compute the same, with their gradients."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from lora_ms.ops import PORTABLE, Operators, ascend, portable, select
from lora_ms.ops.portable import Dropout

T, IN, OUT, RANK = 5, 6, 4, 2


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def test_which_operators_are_chosen():
    assert select("CPU") is PORTABLE
    assert select("CPU", plain=True) is PORTABLE
    assert select("CPU", library="/x.so") is select("CPU", library="/x.so")
    assert select("CPU", library="/x.so") != select("CPU", library="/y.so")
    names = [select("CPU"), select("CPU", library="/x.so"), select("Ascend"), select("Ascend", plain=True)]
    assert [found.name for found in names] == ["portable", "native", "ascend", "ascend, not fused"]


def test_they_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PORTABLE.product = portable.RMSNorm


def test_the_type_between_layers():
    """On the CPU it is float32 whatever the weights are; a card computes in the weights' type."""
    for found in (select("CPU"), select("CPU", library="/x.so")):
        assert found.stream_dtype(ms.float16) == ms.float32
    for found in (select("Ascend"), select("Ascend", plain=True)):
        assert found.stream_dtype(ms.float16) == ms.float16


@pytest.mark.parametrize(
    ("plain", "flash", "dtype", "kind"),
    [
        (False, True, ms.float16, ascend.FlashAttention),
        (False, True, ms.float32, ascend.PlainAttention),
        (False, False, ms.float16, ascend.PlainAttention),
        (True, True, ms.float16, ascend.PlainAttention),
    ],
)
def test_where_the_fused_attention_of_a_card_is_taken(graph_mode, plain, flash, dtype, kind):
    made = select("Ascend", plain=plain).attention(num_heads=2, num_kv_heads=1, head_dim=4, dtype=dtype, flash=flash)
    assert type(made) is kind


def test_a_cards_layouts_are_the_portable_ones(graph_mode):
    """What differs from the portable attention but is no fused operator runs on the CPU, too."""
    x = Tensor(random(2 * 3 * 4, 6))
    np.testing.assert_array_equal(ascend.SwapAxes()(x, 2, 3, 4).asnumpy(), portable.SwapAxes()(x, 2, 3, 4).asnumpy())
    cos, sin = Tensor(random(24, 6, seed=1)), Tensor(random(24, 6, seed=2))
    one, other = ascend.Rotary(6)(x, cos, sin), portable.Rotary(6)(x, cos, sin)
    np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


class Weighted(nn.Cell):
    """The sum of a cell's output times fixed numbers, and its gradients in the first inputs."""

    def __init__(self, cell: nn.Cell, weights: np.ndarray, count: int):
        super().__init__()
        self.cell, self.weights = cell, Tensor(weights)
        self.grad = ops.value_and_grad(self.weighted, tuple(range(count)), has_aux=True)

    def weighted(self, *inputs):
        output = self.cell(*inputs)
        return (output * self.weights).sum(), output

    def construct(self, *inputs):
        return self.grad(*inputs)


def run(cell: nn.Cell, count: int, *inputs: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray]]:
    given = [None if x is None else Tensor(x) for x in inputs]
    weights = random(*cell(*given).shape, seed=9)
    (_, output), grads = Weighted(cell, weights, count)(*given)
    return output.asnumpy(), [grad.asnumpy() for grad in grads]


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


def adapted_inputs() -> list[np.ndarray]:
    x, weight, a, b = random(T, IN), random(OUT, IN, seed=1), random(RANK, IN, seed=2), random(OUT, RANK, seed=3)
    return [x, weight, a, b, np.array(1.5, np.float32)]


def test_an_adapted_product_without_dropout(operators: Operators):
    """One cell serves training and evaluation: without random numbers, nothing is dropped."""
    x, weight, a, b, _ = inputs = adapted_inputs()
    y, (d_x, d_weight, d_a, d_b) = run(operators.adapted_product(0.5), 4, *inputs, None, None)
    whole = weight + 1.5 * b @ a
    close(y, x @ whole.T)
    grad = random(T, OUT, seed=9)
    close(d_x, grad @ whole)
    close(d_weight, grad.T @ x)
    close(d_a, 1.5 * (grad @ b).T @ x)
    close(d_b, 1.5 * grad.T @ (x @ a.T))


def test_an_adapted_product_with_dropout(operators: Operators):
    x, weight, a, b, _ = inputs = adapted_inputs()
    rng = np.random.default_rng(4)
    rows, columns = rng.random((T, 1), np.float32), rng.random((1, IN), np.float32)
    kept = Dropout(0.5)(Tensor(np.ones((T, IN), np.float32)), Tensor(rows), Tensor(columns)).asnumpy()
    assert {*np.unique(kept)} == {0, 2}
    y, (d_x, d_weight, d_a, d_b) = run(operators.adapted_product(0.5), 4, *inputs, rows, columns)
    close(y, x @ weight.T + 1.5 * (x * kept) @ a.T @ b.T)
    grad = random(T, OUT, seed=9)
    close(d_x, grad @ weight + 1.5 * (grad @ b @ a) * kept)
    close(d_weight, grad.T @ x)
    close(d_a, 1.5 * (grad @ b).T @ (x * kept))
    close(d_b, 1.5 * grad.T @ (x * kept @ a.T))


def test_products_and_their_gradients(operators: Operators):
    x, weight = random(T, IN), random(OUT, IN, seed=1)
    y, (d_x, d_weight) = run(operators.product(), 2, x, weight)
    close(y, x @ weight.T)
    grad = random(T, OUT, seed=9)
    close(d_x, grad @ weight)
    close(d_weight, grad.T @ x)
    close(operators.product_back()(Tensor(grad), Tensor(weight)).asnumpy(), grad @ weight)


def test_a_gated_silu_and_its_gradients(operators: Operators, numerical_gradient):
    gate, up = random(T, IN), random(T, IN, seed=1)
    y, grads = run(operators.gated_silu(), 2, gate, up)

    def formula(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return gate / (1 + np.exp(-gate)) * up

    close(y, formula(gate, up))
    weights = random(T, IN, seed=9)
    close(grads[0], numerical_gradient(lambda x: (formula(x, up.astype(float)) * weights).sum(), gate))
    close(grads[1], numerical_gradient(lambda x: (formula(gate.astype(float), x) * weights).sum(), up))


@pytest.mark.parametrize("name", ["product", "rms_norm", "gated_silu"])
def test_the_type_of_the_input_is_that_of_the_output(operators: Operators, name):
    """Half precision in, half precision out, and gradients in the types of what they belong to, but for the weight of
    a product: a loss scale may take that out of float16."""
    inputs = {
        "product": (random(T, IN), random(OUT, IN, seed=1)),
        "rms_norm": (random(T, IN), random(IN, seed=1)),
        "gated_silu": (random(T, IN), random(T, IN, seed=1)),
    }[name]
    cell = operators.rms_norm(1e-5) if name == "rms_norm" else getattr(operators, name)()
    half = [x.astype(np.float16) for x in inputs]
    output, grads = run(cell, 2, *half)
    assert output.dtype == np.float16 and grads[0].dtype == np.float16
    assert grads[1].dtype == (np.float32 if name == "product" else np.float16)
    wide, _ = run(cell, 2, *(x.astype(np.float32) for x in half))
    np.testing.assert_allclose(output, wide, rtol=5e-3, atol=5e-3)
