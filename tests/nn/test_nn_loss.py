"""Summed cross-entropy and both of its gradients, against float64."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from lora_ms.nn.loss import SummedCrossEntropy, TokenLogProbs
from lora_ms.objectives.row_cells import Divergence

pytestmark = pytest.mark.usefixtures("graph_mode")
SLOTS, HIDDEN, VOCABULARY = 7, 4, 9
TARGETS = np.array([3, -100, 0, 8, 3, -100, -100], np.int32)


class Value(nn.Cell):
    """Three times the loss, so that the gradient that comes in is not 1."""

    def __init__(self, chunk_rows: int, operators):
        super().__init__()
        self.cross_entropy = SummedCrossEntropy(chunk_rows, operators)

    def construct(self, hidden, head, targets):
        return 3.0 * self.cross_entropy(hidden, head, targets)[0]


def formula(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, and its gradients in hidden and head: (softmax - onehot) head, and its transpose times hidden."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    loss, d_logits = 0.0, np.zeros((len(hidden), len(head)))
    for slot, target in enumerate(targets):
        if target == -100:
            continue
        logits = head @ hidden[slot]
        logits -= logits.max()
        log_probs = logits - np.log(np.exp(logits).sum())
        loss -= log_probs[target]
        d_logits[slot] = np.exp(log_probs)
        d_logits[slot, target] -= 1
    return loss, d_logits @ head, d_logits.T @ hidden


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.standard_normal((SLOTS, HIDDEN), np.float32), rng.standard_normal((VOCABULARY, HIDDEN), np.float32)


@pytest.mark.parametrize("chunk_rows", [3, 7, 100])
def test_loss_and_gradients_in_chunks_of_any_size(gradients, operators, chunk_rows):
    """Chunks of 3, 3 and 1 slots, the last all ignored; one of 7; one larger than there are slots."""
    hidden, head = inputs()
    value, (d_hidden, d_head) = gradients(Value(chunk_rows, operators), (0, 1), hidden, head, TARGETS)
    loss, want_hidden, want_head = formula(hidden, head, TARGETS)
    np.testing.assert_allclose(value, 3 * loss, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, 3 * want_hidden, rtol=0, atol=1e-5)
    np.testing.assert_allclose(d_head, 3 * want_head, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(d_hidden[TARGETS == -100], 0)


def test_all_slots_ignored_is_exactly_zero(gradients, operators):
    hidden, head = inputs()
    value, grads = gradients(Value(3, operators), (0, 1), hidden, head, np.full(SLOTS, -100, np.int32))
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_logits_far_apart_give_no_infinity(gradients, operators):
    """Gaps of 300 and 3000, with the target at the top and at the bottom; exp of either is infinite in float32."""
    hidden = np.zeros((SLOTS, HIDDEN), np.float32)
    hidden[:, 0] = [300, -300, 300, -3000, 3000, 300, -300]
    hidden[:, 1] = np.linspace(-1, 1, SLOTS)
    head = np.zeros((VOCABULARY, HIDDEN), np.float32)
    head[3, 0], head[5, 1] = 1, 1
    targets = np.array([3, 3, 0, 8, 3, 0, -100], np.int32)
    value, (d_hidden, d_head) = gradients(Value(3, operators), (0, 1), hidden, head, targets)
    loss, want_hidden, want_head = formula(hidden, head, targets)
    assert loss > 900
    np.testing.assert_allclose(value, 3 * loss, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, 3 * want_hidden, rtol=0, atol=1e-5)
    np.testing.assert_allclose(d_head, 3 * want_head, rtol=1e-6, atol=1e-3)


def test_right_answers_are_counted(operators):
    hidden, head = inputs()
    best = (hidden @ head.T).argmax(-1).astype(np.int32)
    targets = np.where(np.arange(SLOTS) % 3 == 0, best, (best + 1) % VOCABULARY).astype(np.int32)
    targets[3] = -100
    right = SummedCrossEntropy(3, operators)(*map(Tensor, (hidden, head, targets)))[2]
    assert float(right.asnumpy()) == 2  # slots 0 and 6; 3 is ignored


SCALE = 65536.0  # infinite in float16, as are most gradients times it


class Scaled(nn.Cell):
    """A loss scale times what ``cell`` gives first, summed."""

    def __init__(self, cell: nn.Cell):
        super().__init__()
        self.cell = cell

    def construct(self, *inputs):
        return self.cell(*inputs)[0].sum() * SCALE


def in_float16() -> tuple[np.ndarray, np.ndarray]:
    hidden, head = inputs()
    return hidden.astype(np.float16).astype(np.float32), head.astype(np.float16)


def check(d_head: np.ndarray, wanted: np.ndarray) -> None:
    assert d_head.dtype == np.float32 and np.abs(wanted).max() > 65504
    np.testing.assert_allclose(d_head, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("make, sign", [(SummedCrossEntropy, 1), (TokenLogProbs, -1)])
def test_the_loss_scale_meets_the_gradients_of_a_float16_head_in_float32(gradients, operators, make, sign):
    hidden, head = in_float16()
    _, (d_hidden, d_head) = gradients(Scaled(make(3, operators)), (0, 1), hidden, head, TARGETS)
    _, want_hidden, want_head = formula(hidden, head, TARGETS)
    check(d_hidden, sign * SCALE * want_hidden)
    check(d_head, sign * SCALE * want_head)


def test_the_loss_scale_meets_the_divergence_s_gradient_of_a_float16_head_in_float32(gradients):
    """A first head of zeros: the model gave all tokens the same chance."""
    hidden, head = in_float16()
    cell = Divergence(np.zeros((VOCABULARY, HIDDEN), np.float32))

    class Value(nn.Cell):
        def construct(self, hidden, head, targets, factor):
            return cell(hidden, head, targets, hidden, factor) * SCALE

    _, (d_head,) = gradients(Value(), (1,), hidden, head, TARGETS, np.ones(SLOTS, np.float32))
    wide = head.astype(np.float64)
    chances = np.exp(hidden @ wide.T)
    chances /= chances.sum(1, keepdims=True)
    check(d_head, SCALE * (chances - 1 / VOCABULARY).T @ hidden)
