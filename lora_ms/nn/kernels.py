"""The one place that chooses between Ascend's fused operators and portable ones.

Shape legend, for all of ``lora_ms.nn``: b batch, s sequence, t = b * s tokens, h hidden, n_h query heads,
n_kv key/value heads, g = n_h / n_kv queries per key/value head, d head dimension, c label slots, v vocabulary.

The portable forms suit the CPU kernels as measured on MindSpore 2.9: arithmetic that broadcasts a 4-D tensor, and
the gradient of softmax, keep two 8-byte indices per output element for as long as the graph lives and run about
four times slower than arithmetic on equal shapes. Hence equal shapes, and gradients written out by hand where the
automatic ones would broadcast.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops


def on_ascend() -> bool:
    """Whether fused Ascend operators are used; asked once, when a cell is made."""
    return ms.get_context("device_target") == "Ascend"


class RMSNormKernel(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; x [t, h], weight [h]; float32 inside."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.fused = on_ascend()
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.fused:
            return ops.rms_norm(x, weight.astype(x.dtype), self.eps)[0]
        y = x.astype(ms.float32)
        y = y * ops.rsqrt(self.mean(ops.square(y), (-1,)) + self.eps)
        return (y * weight.astype(ms.float32)).astype(x.dtype)


class RotaryKernel(nn.Cell):
    """``x * cos + swap(x) * sin``, where swap exchanges the two halves of the last axis.

    x, cos, sin: one shape, [..., d]; the minus sign of the rotation is in the first half of ``sin``.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.half = head_dim // 2

    def swap(self, x: Tensor) -> Tensor:
        return ops.concat((x[..., self.half :], x[..., : self.half]), -1)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + self.swap(x) * sin

    def bprop(self, x, cos, sin, out, dout):
        # swap is its own transpose; the tables are constants of the step and need no gradient
        return dout * cos + self.swap(dout * sin), ops.zeros_like(cos), ops.zeros_like(sin)


class AttentionKernel(nn.Cell):
    """``softmax(q k^T + bias) v`` for q [n, m, d], k and v [n, s, d], bias [n, m, s]; q is already scaled.

    n = b * n_kv, and the m = g * s_q rows of q are the queries that share one key/value head.
    """

    def __init__(self):
        super().__init__()
        self.matmul = ops.BatchMatMul()
        self.matmul_t = ops.BatchMatMul(transpose_b=True)
        self.t_matmul = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.matmul_t(q, k)  # [n, m, s]
        probs = self.softmax(scores.astype(ms.float32) + bias).astype(q.dtype)
        return self.matmul(probs, v), probs  # [n, m, d]

    def bprop(self, q, k, v, bias, out, dout):
        output, probs = out
        grad = dout[0]
        # d scores = probs * (grad v^T - rowsum(grad * output)); the subtraction of a column is one more column
        # of the product, which spares the broadcast
        row = self.sum((grad * output).astype(ms.float32), (-1,)).astype(grad.dtype)  # [n, m, 1]
        d_scores = probs * self.matmul_t(ops.concat((grad, -row), -1), ops.concat((v, ops.ones_like(v[..., :1])), -1))
        return self.matmul(d_scores, k), self.t_matmul(d_scores, q), self.t_matmul(probs, grad), ops.zeros_like(bias)
