"""The cells of ``row_terms``: terms of a micro-batch's loss, as ``train.parts.SummedLoss`` takes them.

Shapes: c label slots, h hidden size, v vocabulary. Rows of the micro-batch are counted in c places, too, as they are
no more than its slots.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

FAR = -1e9  # a similarity that counts nothing in a softmax
TINY = 1e-6  # of a norm
ROWS = 256  # slots whose logits are held at once


class Contrast(nn.Cell):
    """``scale Σ over pairs -log softmax(cos(domain, general) / temperature)``, see ``PairedRows.arrays``.

    Args:
        symmetric: the mean of that softmax, which is over the general rows, and of one over the domain rows.
    """

    name = "contrastive"
    count = 4

    def __init__(self, temperature: float, symmetric: bool = False):
        super().__init__()
        self.symmetric = symmetric
        self.factor = 1.0 / temperature
        self.matmul = ops.MatMul()
        self.matmul_t = ops.MatMul(transpose_b=True)
        self.t_matmul = ops.MatMul(transpose_a=True)
        self.sum = ops.ReduceSum(keep_dims=True)
        self.log_softmax = ops.LogSoftmax(-1)

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor, *given: Tensor) -> Tensor:
        row, general, partner, scale = given
        places = Tensor(np.arange(hidden.shape[0], dtype=np.int32)).reshape((1, -1))
        of_row = ops.equal(row.reshape((-1, 1)), places).astype(ms.float32)  # [slots, rows]
        counts = ops.maximum(self.sum(of_row, 0), Tensor(1.0, ms.float32)).reshape((-1, 1))
        means = self.t_matmul(of_row, hidden) / counts  # [rows, h]
        units = means / ops.sqrt(self.sum(means * means, 1) + TINY * TINY)
        similar = self.matmul_t(units, units) * self.factor  # [rows, rows]
        chances = self.log_softmax(similar + (1.0 - general.reshape((1, -1))) * FAR)
        paired = ops.equal(partner.reshape((-1, 1)), places).astype(ms.float32)
        value = (paired * chances).sum()
        if self.symmetric:
            is_domain = ops.greater(self.sum(of_row, 0), 0.5).astype(ms.float32) - general.reshape((1, -1))
            back = self.log_softmax(similar + (1.0 - is_domain) * FAR)  # similar is symmetrical
            value = 0.5 * (value + (paired * ops.transpose(back, (1, 0))).sum())
        return -value * scale[0]


class Divergence(nn.Cell):
    """``Σ over slots factor KL(start || now)`` of the next token, see ``AnchoredRows.arrays``.

    The gradient is formed with the value, some slots at a time; that of the head costs the logits again.

    Args:
        head: what the head was at the start [v, h]; None where it is not trained.
    """

    name = "kl_anchor"
    count = 2

    def __init__(self, head: NDArray[np.float32] | None):
        super().__init__()
        self.has_head = head is not None
        if head is not None:
            self.head = Parameter(Tensor(head), name="kl_anchor_head", requires_grad=False)
        self.by_hand = _Divergence()

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor, states: Tensor, factor: Tensor) -> Tensor:
        first = self.head if self.has_head else head.astype(ms.float32)
        return self.by_hand(hidden, head, states, ops.stop_gradient(first), factor)[0]


class _Divergence(nn.Cell):
    """hidden, now [v, h], states, first [v, h], factor [c] -> (value [], d value / d hidden [c, h]).

    All float32 but ``now``, which has the model's type; its gradient is float32, as a loss scale may take it out of
    float16.
    """

    def __init__(self):
        super().__init__()
        self.logits = ops.MatMul(transpose_b=True)
        self.matmul = ops.MatMul()
        self.t_matmul = ops.MatMul(transpose_a=True)
        self.log_softmax = ops.LogSoftmax(-1)

    def moved(self, hidden: Tensor, now: Tensor, states: Tensor, first: Tensor, factor: Tensor) -> tuple:
        """For some slots: the value [] and its gradient by the logits [c, v]."""
        before = self.log_softmax(self.logits(states, first))
        after = self.log_softmax(self.logits(hidden, now))
        chances = ops.exp(before)
        each = factor.reshape((-1, 1))
        return (each * chances * (before - after)).sum(), each * (ops.exp(after) - chances)

    def construct(
        self, hidden: Tensor, now: Tensor, states: Tensor, first: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        now = now.astype(ms.float32)
        for start in range(0, hidden.shape[0], ROWS):
            end = start + ROWS
            value, moved = self.moved(hidden[start:end], now, states[start:end], first, factor[start:end])
            values.append(value)
            gradients.append(self.matmul(moved, now))
        return ops.addn(values), ops.concat(gradients, 0)

    def bprop(self, hidden, now, states, first, factor, out, dout):
        now = now.astype(ms.float32)
        d_now = ops.zeros_like(now)
        for start in range(0, hidden.shape[0], ROWS):
            end = start + ROWS
            _, moved = self.moved(hidden[start:end], now, states[start:end], first, factor[start:end])
            d_now = d_now + self.t_matmul(moved, hidden[start:end])
        d_loss = dout[0]
        zeros = ops.zeros_like
        return out[1] * d_loss, d_now * d_loss, zeros(states), zeros(first), zeros(factor)
