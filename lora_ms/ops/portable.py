"""The one place that chooses between Ascend's fused operators, our own for the CPU (``nn.cpu``) and portable ones.

Shape legend, for all of ``lora_ms.nn``: b batch, s sequence, t = b * s tokens, h hidden, n_h query heads,
n_kv key/value heads, g = n_h / n_kv queries per key/value head, d head dimension, c label slots, v vocabulary.

The portable forms suit the CPU kernels as measured on MindSpore 2.9: arithmetic that broadcasts a 4-D tensor, and
the gradient of softmax, keep two 8-byte indices per output element for as long as the graph lives and run about
four times slower than arithmetic on equal shapes. Hence equal shapes, and gradients written out by hand where the
automatic ones would broadcast.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from lora_ms.ops import native as cpu

MASKED = -1e9  # added to a forbidden score; finite, so that a row of padding gives no NaN


def on_ascend() -> bool:
    """Whether the device is an Ascend card; asked once, when a cell is made."""
    return ms.get_context("device_target") == "Ascend"


_plain = False


def use_plain_operators(wanted: bool) -> None:
    """Whether cells made from now on do without Ascend's fused operators, which the 310B lacks in training."""
    global _plain
    _plain = wanted


def fuses() -> bool:
    """Whether cells take fused operators; asked once, when a cell is made."""
    return on_ascend() and not _plain


class RMSNormKernel(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; x [t, h], weight [h]; float32 inside.

    A column is spread over the row by an outer product: a matrix product with an inner size of one, which is faster
    than a broadcast and keeps no indices (8 MB for each broadcast of 1024 x 512, in every layer).
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.fused, self.own = fuses(), cpu.there()
        if self.own:
            self.operator = cpu.RMSNormOperator(eps)
        self.mean = ops.ReduceMean(keep_dims=True)
        self.outer = ops.MatMul()
        self.t_matmul = ops.MatMul(transpose_a=True)

    def scale(self, x: Tensor) -> Tensor:
        return ops.rsqrt(self.mean(x * x, (-1,)) + self.eps)  # [t, 1]; ops.square takes four times as long as x * x

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.fused:
            return ops.rms_norm(x, weight.astype(x.dtype), self.eps)[0]
        y = x.astype(ms.float32)
        if self.own:
            return self.operator(y, weight).astype(x.dtype)
        y = y * self.outer(self.scale(y), weight.astype(ms.float32).reshape((1, -1)))
        return y.astype(x.dtype)

    def bprop(self, x, weight, out, dout):
        if self.own:
            return self.operator.bprop(x, weight, out, dout)
        # with r = scale(x), s = r weight: dx = s dy - x r^2 mean(s dy x), dweight = r^T (dy x)
        y, grad, row = x.astype(ms.float32), dout.astype(ms.float32), weight.astype(ms.float32).reshape((1, -1))
        scale = self.scale(y)
        scaled = grad * self.outer(scale, row)
        coefficient = ops.square(scale) * self.mean(scaled * y, (-1,))
        dx = scaled - y * self.outer(coefficient, ops.ones_like(row))
        d_weight = self.t_matmul(scale, grad * y).reshape(weight.shape)
        return dx.astype(x.dtype), d_weight.astype(weight.dtype)


class LowRankKernel(nn.Cell):
    """``scaling x A^T B^T`` for x [t, in], A [rank, in], B [out, rank]; the low product [t, rank] comes second.

    ``scaling`` [] is not trained. The gradient of B is formed transposed, [rank, out]: a thin left factor is 2.5 times
    faster than a thin right one.
    """

    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul()
        self.matmul_t = ops.MatMul(transpose_b=True)
        self.t_matmul = ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
        low = self.matmul_t(x, a) * scaling
        return self.matmul_t(low, b), low

    def bprop(self, x, a, b, scaling, out, dout):
        low, grad = out[1], dout[0]
        d_low = self.matmul(grad, b) * scaling  # [t, rank]
        d_b = self.t_matmul(low, grad).transpose((1, 0))
        return self.matmul(d_low, a), self.t_matmul(d_low, x), d_b, ops.zeros_like(scaling)


class ColumnScaleKernel(nn.Cell):
    """x [t, n] with each column multiplied by its number in ``scale`` [n].

    Rows of ones in a matrix product spread the scale over x and sum its gradient: no broadcast, no reduction.
    """

    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul()

    def construct(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * self.matmul(ops.ones((x.shape[0], 1), x.dtype), scale.reshape((1, -1)))

    def bprop(self, x, scale, out, dout):
        dx = dout * self.matmul(ops.ones((x.shape[0], 1), x.dtype), scale.reshape((1, -1)))
        return dx, self.matmul(ops.ones((1, x.shape[0]), x.dtype), dout * x).reshape(scale.shape)


class GatedSiLUKernel(nn.Cell):
    """``silu(gate) * up``, with ``silu(z) = z sigmoid(z)``, elementwise."""

    def __init__(self):
        super().__init__()
        self.sigmoid, self.own = ops.Sigmoid(), cpu.there()
        if self.own:
            self.operator = cpu.GatedSiLUOperator()

    def construct(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.own and gate.dtype == ms.float32:
            return self.operator(gate, up), gate, up
        sigmoid = self.sigmoid(gate)
        silu = gate * sigmoid
        return silu * up, sigmoid, silu

    def bprop(self, gate, up, out, dout):
        if self.own and gate.dtype == ms.float32:
            return self.operator.bprop(gate, up, out, dout[0])
        _, sigmoid, silu = out
        grad = dout[0]
        return grad * up * (sigmoid + silu * (1.0 - sigmoid)), grad * silu


class AdamWKernel(nn.Cell):
    """One step of AdamW (Loshchilov and Hutter, 2019), as ``torch.optim.AdamW`` takes it, on vectors [n].

    old, grad, exp_avg, exp_avg_sq [n]; scale [], a factor on the gradient, of which what is not finite counts as 0;
    taken []: 1, or 0 where the moments shall stay as they are; count [] of steps, this one included; rate, the learning
    rate, and decay: [] or [n] -> old, exp_avg and exp_avg_sq after the step.
    """

    def __init__(self, beta1: float, beta2: float, eps: float):
        super().__init__()
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.own, self.operator, self.stack = cpu.there(), cpu.adamw(), ops.Stack()
        self.divide = ops.RealDiv()  # `/`, on the CPU, keeps two 8-byte indices per number

    def used(self, grad: Tensor, scale: Tensor) -> Tensor:
        """The gradient as the step takes it."""
        return ops.select(ops.isfinite(grad), grad, ops.zeros_like(grad)) * scale

    def construct(
        self,
        old: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        scale: Tensor,
        taken: Tensor,
        count: Tensor,
        rate: Tensor,
        decay: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        share1, share2 = Tensor(1.0 - self.beta1, ms.float32), Tensor(1.0 - self.beta2, ms.float32)
        correct1 = 1.0 / (1.0 - ops.pow(Tensor(self.beta1, ms.float32), count))
        correct2 = 1.0 / ops.sqrt(1.0 - ops.pow(Tensor(self.beta2, ms.float32), count))
        if self.own:
            eps = Tensor(self.eps, ms.float32)
            step = self.stack((scale, taken, share1, share2, correct1, correct2, eps))
            return self.operator(old, grad, exp_avg, exp_avg_sq, rate, decay, step)
        grad = self.used(grad, scale)
        exp_avg = exp_avg + taken * share1 * (grad - exp_avg)
        exp_avg_sq = exp_avg_sq + taken * share2 * (grad * grad - exp_avg_sq)
        update = self.divide(correct1 * exp_avg, ops.sqrt(exp_avg_sq) * correct2 + self.eps)
        return old - rate * (decay * old + update), exp_avg, exp_avg_sq


class RotaryKernel(nn.Cell):
    """``x * cos + swap(x) * sin``, where swap exchanges the two halves of the last axis.

    x, cos, sin: one shape, [..., d]; the minus sign of the rotation is in the first half of ``sin``. Off Ascend, halves
    are exchanged by one gather, in half the time of two slices and their concatenation.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.half = head_dim // 2
        self.fused = on_ascend()
        self.gather = ops.Gather()

    def swap(self, x: Tensor) -> Tensor:
        if self.fused:
            return ops.concat((x[..., self.half :], x[..., : self.half]), -1)
        halves = x.reshape((-1, self.half))
        order = np.arange(halves.shape[0], dtype=np.int32).reshape((-1, 2))[:, ::-1]
        return self.gather(halves, Tensor(order.reshape((-1,)), ms.int32), 0).reshape(x.shape)

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
        # of the product, which spares the broadcast. Rows of a matrix are summed in a fifth of the time of [n, m, d]
        row = self.sum((grad * output).astype(ms.float32).reshape((-1, grad.shape[-1])), (1,))  # [n * m, 1]
        row = row.astype(grad.dtype).reshape((grad.shape[0], -1, 1))
        d_scores = probs * self.matmul_t(ops.concat((grad, -row), -1), ops.concat((v, ops.ones_like(v[..., :1])), -1))
        return self.matmul(d_scores, k), self.t_matmul(d_scores, q), self.t_matmul(probs, grad), ops.zeros_like(bias)


class FlashAttentionKernel(nn.Cell):
    """``AttentionKernel`` by Ascend's fused operator, which keeps no [m, s] matrix; float16 or bfloat16 only.

    Written from the documentation of ``ops.flash_attention_score``; it has not run on a card.
    """

    def construct(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if bias.dtype == ms.uint8:  # the operator's own form, [b, 1, s, s]: all heads of a line share it
            batch, _, seq, _ = bias.shape
            shape = (batch, -1, seq, q.shape[-1])
            query, key, value = q.reshape(shape), k.reshape(shape), v.reshape(shape)
            hidden, heads = bias, query.shape[1]
        else:
            query, key, value = q.expand_dims(1), k.expand_dims(1), v.expand_dims(1)
            hidden, heads = (bias < 0).astype(ms.uint8).expand_dims(1), 1  # [n, 1, m, s], 1 where it may not look
        output = ops.flash_attention_score(
            query, key, value, heads, attn_mask=hidden, scalar_value=1.0, input_layout="BNSD"
        )
        return output.reshape(q.shape), q


class RowMask(nn.Cell):
    """Which keys a query may see where a line holds several rows: those of its own row, up to itself.

    position_ids [b, s], from 0 in each row -> 0 or -1e9, float32 [b * n_kv, g * s, s]; where ``fused``, the fused
    operator's own form: 1 where a query may not look, uint8 [b, 1, s, s]; where the CPU has operators of ours, the
    first key that a query may see, int32 [b, s].
    """

    def __init__(self, num_heads: int, num_kv_heads: int, fused: bool):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.fused, self.own = num_heads, num_kv_heads, fused, cpu.there()

    def construct(self, position_ids: Tensor) -> Tensor:
        batch, seq = position_ids.shape
        places = np.arange(seq, dtype=np.int32)
        if self.own:
            return ops.tile(Tensor(places[None], ms.int32), (batch, 1)) - position_ids.astype(ms.int32)
        keys = ops.tile(Tensor(np.tile(places, (seq, 1))[None], ms.int32), (batch, 1, 1))  # [b, s, s]: j
        future = ops.tile(Tensor((places[None] > places[:, None])[None]), (batch, 1, 1))  # j > i
        starts = ops.tile(Tensor(places[None], ms.int32), (batch, 1)) - position_ids.astype(ms.int32)
        hidden = ops.logical_or(keys < ops.tile(starts.reshape((batch, seq, 1)), (1, 1, seq)), future)
        if self.fused:
            return hidden.astype(ms.uint8).expand_dims(1)
        bias = ops.tile(hidden.astype(ms.float32) * MASKED, (1, self.num_heads, 1))
        return bias.reshape((batch * self.num_kv_heads, -1, seq))
