"""Products with float16 weights beside float32 activations, held against NumPy in float32."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from lora_ms.adapters.methods.lora_cells import LoRADense
from lora_ms.nn.loss import SummedCrossEntropy
from lora_ms.ops import portable


def test_a_weight_in_half(operators):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((6, 8), np.float32), rng.standard_normal((4, 8)).astype(np.float16)
    kernel = operators.product()
    out, grad = ms.value_and_grad(summed(kernel), 0)(Tensor(x), Tensor(weight))
    np.testing.assert_allclose(out.asnumpy(), (x @ weight.T.astype(np.float32)).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad.asnumpy(), np.tile(weight.astype(np.float32).sum(0), (6, 1)), rtol=1e-5)
    assert kernel(Tensor(x), Tensor(weight)).dtype == ms.float32


def summed(kernel):
    def total(x, weight):
        return kernel(x, weight).sum()

    return total


def test_a_head_in_half_part_by_part(operators, monkeypatch):
    monkeypatch.setattr(portable, "PART_NUMBERS", 40)  # five rows of the head at a time
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal(shape).astype(np.float16) for shape in ((6, 8), (13, 8)))
    wide = head.astype(np.float32)
    logits = operators.head_product()(Tensor(hidden), Tensor(head)).asnumpy()
    np.testing.assert_allclose(logits, hidden.astype(np.float32) @ wide.T, rtol=1e-5, atol=1e-5)
    probs = rng.random((6, 13), np.float32)
    mixed = operators.head_product_back()(Tensor(probs), Tensor(head)).asnumpy()
    np.testing.assert_allclose(mixed, probs @ wide, rtol=1e-5, atol=1e-5)


def test_the_loss_with_a_head_in_half(operators):
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal(shape).astype(np.float16) for shape in ((6, 8), (13, 8)))
    targets = np.array([3, 0, -100, 12, 7, 1], np.int32)
    loss = SummedCrossEntropy(4, operators)(Tensor(hidden), Tensor(head), Tensor(targets))[0]
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -sum(log_probs[i, target] for i, target in enumerate(targets) if target >= 0)
    np.testing.assert_allclose(float(loss.asnumpy()), expected, rtol=1e-4)


def test_an_adapter_on_a_weight_in_half(gradients, squares, operators):
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((6, 8), np.float32), rng.standard_normal((4, 8)).astype(np.float16)
    layer = LoRADense(8, 4, 2, 3.0, weight_init=Tensor(weight), has_bias=False, dtype=ms.float16, operators=operators)
    a, b = rng.standard_normal((2, 8), np.float32), rng.standard_normal((4, 2), np.float32)
    layer.lora_a.set_data(Tensor(a))
    layer.lora_b.set_data(Tensor(b))
    whole = weight.astype(np.float64) + 1.5 * b @ a
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), x @ whole.T, rtol=1e-5, atol=1e-5)

    (d_x,) = gradients(squares(layer), (0,), x)[1]
    np.testing.assert_allclose(d_x, 2 * x @ whole.T @ whole, rtol=1e-5, atol=1e-4)
