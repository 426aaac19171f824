"""Operators made of MindSpore's own, for any device; they suit its CPU kernels, as measured on MindSpore 2.9.

Shape legend, for all of ``lora_ms.ops`` and ``lora_ms.nn``: b batch, s sequence, t = b * s tokens, h hidden, n_h query
heads, n_kv key/value heads, g = n_h / n_kv queries per key/value head, d head dimension, c label slots, v vocabulary.

MindSpore's CPU kernels for arithmetic that broadcasts a 4-D tensor, for the gradient of softmax and for transpositions
keep two 8-byte indices per output element for as long as the graph lives, and run about four times slower than
arithmetic on equal shapes. Hence equal shapes here, and gradients written by hand where the automatic ones would
broadcast. In float16 those kernels do little: each elementwise one keeps 16 bytes of index for every number, and a
matrix product makes float32 of both factors. Hence what flows between products is float32, and a float16 weight is
widened when it is needed, for one product.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.ops.dynamic_map import BLOCK, Array, dynamic_map, thresholds

MASKED = -1e9  # added to the score of a hidden key; finite, so that a row of padding gives no NaN
PART_NUMBERS = 1 << 24  # numbers of a float16 head that are widened at once: 64 MB


def stream_dtype(dtype: ms.Type) -> ms.Type:
    """The type of what flows between layers whose weights have ``dtype``."""
    return ms.float32


class MatMul(nn.Cell):
    """A matrix product in the type of ``a``; without a gradient of its own."""

    def __init__(self, transpose_a: bool = False, transpose_b: bool = False):
        super().__init__()
        self.matmul = ops.MatMul(transpose_a, transpose_b)

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != b.dtype:
            # only once `a` is computed: otherwise all weights are widened before the first product
            b = ops.depend(b, a).astype(a.dtype)
        return self.matmul(a, b)


class Product(nn.Cell):
    """``x W^T`` for x [t, in] and W [out, in], in the type of x; the gradient of W is float32."""

    def __init__(self):
        super().__init__()
        self.forward = MatMul(transpose_b=True)
        self.input_gradient = MatMul()
        self.weight_gradient = MatMul(transpose_a=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.forward(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.input_gradient(dout, weight), self.weight_gradient(dout, x).astype(ms.float32)


class EmbeddingRows(nn.Cell):
    """ids [t] and the weight [v, h] -> its rows [t, h]."""

    def construct(self, ids: Tensor, weight: Tensor) -> Tensor:
        return ops.gather(weight, ids, 0)


class RowUpdates(nn.Cell):
    """``y + x A^T B``, with the A and B of each token's line; it has no gradient.

    y [t, out], x [t, in], A [places, rank, in], B [places, rank, out], choice [lines] int32: the places of the lines,
    which have t / lines tokens each.
    """

    def __init__(self):
        super().__init__()
        self.product = ops.BatchMatMul()
        self.product_t = ops.BatchMatMul(transpose_b=True)

    def construct(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, choice: Tensor) -> Tensor:
        lines = x.reshape((choice.shape[0], -1, x.shape[1]))
        low = self.product_t(lines, ops.gather(a, choice, 0).astype(x.dtype))  # [lines, s, rank]
        return y + self.product(low, ops.gather(b, choice, 0).astype(x.dtype)).reshape(y.shape)


class LowRankUpdate(nn.Cell):
    """``scaling x A^T B^T`` for x [t, in], A [rank, in], B [out, rank]; ``scaling`` [] is not trained."""

    def __init__(self):
        super().__init__()
        self.update = _LowRankUpdate()

    def construct(self, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor) -> Tensor:
        return self.update(x, a, b, scaling)[0]


class _LowRankUpdate(nn.Cell):
    """``LowRankUpdate``, and ``scaling x A^T`` [t, rank], which the gradient needs.

    The gradient of B is formed transposed, [rank, out]: a thin left factor is 2.5 times faster than a thin right one.
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


class OuterUniform(nn.Cell):
    """rows [t, 1] and columns [1, n], uniform in [0, 1) -> t * n numbers in [0, 1) that look independent, [t, n].

    Number (i, j) is the fractional part of (8 + 32 rows[i]) (8 + 32 columns[j]): the factors are large enough for
    products of many turns, and small enough that float32 keeps the fraction to 1e-4.
    """

    def __init__(self):
        super().__init__()
        self.outer = ops.MatMul()
        self.floor = ops.Floor()

    def construct(self, rows: Tensor, columns: Tensor) -> Tensor:
        turns = self.outer(8.0 + 32.0 * rows, 8.0 + 32.0 * columns)
        return turns - self.floor(turns)


class Dropout(nn.Cell):
    """x [t, n] with each number zeroed with ``probability``, and the others divided by the share that is kept.

    rows [t, 1], columns [1, n]: random numbers, as ``OuterUniform`` takes them.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability
        self.uniform = OuterUniform()

    def construct(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        kept = (self.uniform(rows, columns) >= self.probability).astype(x.dtype)
        return x * ops.stop_gradient(kept * (1.0 / (1.0 - self.probability)))


class AdaptedProduct(nn.Cell):
    """``x W^T + scaling dropout(x) A^T B^T`` for x [t, in], W [out, in], A [rank, in], B [out, rank], scaling [].

    rows, columns: the random numbers of ``Dropout``; None for no dropout.
    """

    def __init__(self, dropout: float):
        super().__init__()
        self.product = Product()
        self.low_rank = LowRankUpdate()
        self.dropout = Dropout(dropout)

    def construct(
        self,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        seen = x if rows is None else self.dropout(x, rows, columns)
        update = self.low_rank(seen, a, b, scaling)
        return self.product(x, weight) + update


class ColumnScale(nn.Cell):
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


class RMSNorm(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; x [t, h], weight [h]; float32 inside.

    A column is spread over the row by an outer product: a matrix product with an inner size of one, which is faster
    than a broadcast and keeps no indices (8 MB for each broadcast of 1024 x 512, in every layer).
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)
        self.outer = ops.MatMul()
        self.t_matmul = ops.MatMul(transpose_a=True)

    def scale(self, x: Tensor) -> Tensor:
        return ops.rsqrt(self.mean(x * x, (-1,)) + self.eps)  # [t, 1]; ops.square takes four times as long as x * x

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.astype(ms.float32)
        y = y * self.outer(self.scale(y), weight.astype(ms.float32).reshape((1, -1)))
        return y.astype(x.dtype)

    def bprop(self, x, weight, out, dout):
        # with r = scale(x), s = r weight: dx = s dy - x r^2 mean(s dy x), dweight = r^T (dy x)
        y = x.astype(ms.float32)
        grad = dout.astype(ms.float32)
        row = weight.astype(ms.float32).reshape((1, -1))
        scale = self.scale(y)
        scaled = grad * self.outer(scale, row)
        coefficient = ops.square(scale) * self.mean(scaled * y, (-1,))
        dx = scaled - y * self.outer(coefficient, ops.ones_like(row))
        d_weight = self.t_matmul(scale, grad * y).reshape(weight.shape)
        return dx.astype(x.dtype), d_weight.astype(weight.dtype)


class GatedSiLU(nn.Cell):
    """``silu(gate) * up``, with ``silu(z) = z sigmoid(z)``, elementwise."""

    def __init__(self):
        super().__init__()
        self.gated = _GatedSiLU()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.gated(gate, up)[0]


class _GatedSiLU(nn.Cell):
    """``GatedSiLU``, and the sigmoid and SiLU of the gate, which the gradient needs."""

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()

    def construct(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigmoid = self.sigmoid(gate)
        silu = gate * sigmoid
        return silu * up, sigmoid, silu

    def bprop(self, gate, up, out, dout):
        _, sigmoid, silu = out
        grad = dout[0]
        return grad * up * (sigmoid + silu * (1.0 - sigmoid)), grad * silu


class ScoreMask(nn.Cell):
    """first [b, s] -> 0 where a query may look at a key and -1e9 where not, float32 [b * n_kv, g * s, s].

    A query that sees no key sees itself here, as a softmax wants one.
    """

    def __init__(self, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads

    def hidden(self, first: Tensor) -> Tensor:
        """Whether query i may not look at key j, [b, s, s]."""
        batch, seq = first.shape
        places = np.arange(seq, dtype=np.int32)
        keys = ops.tile(Tensor(np.tile(places, (seq, 1))[None], ms.int32), (batch, 1, 1))  # j
        future = ops.tile(Tensor((places[None] > places[:, None])[None]), (batch, 1, 1))  # j > i
        first = ops.minimum(first, ops.tile(Tensor(places[None]), (batch, 1)))
        return ops.logical_or(keys < ops.tile(first.reshape((batch, seq, 1)), (1, 1, seq)), future)

    def construct(self, first: Tensor) -> Tensor:
        batch, seq = first.shape
        scores = ops.tile(self.hidden(first).astype(ms.float32) * MASKED, (1, self.num_heads, 1))
        return scores.reshape((batch * self.num_kv_heads, -1, seq))


class CachedScoreMask(nn.Cell):
    """first [b, new] of new tokens in the slots from ``start`` [b] on, of a cache of ``length`` slots a line -> like
    ``ScoreMask``: [b * n_kv, g * new, length]."""

    def __init__(self, num_heads: int, num_kv_heads: int, length: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.length = length

    def construct(self, first: Tensor, start: Tensor) -> Tensor:
        batch, new = first.shape
        keys = Tensor(np.arange(self.length, dtype=np.int32)[None, None])
        slots = start.reshape((batch, 1, 1)) + Tensor(np.arange(new, dtype=np.int32)[None, :, None])
        seen = ops.logical_and(keys <= slots, keys >= ops.minimum(first.reshape((batch, new, 1)), slots))
        scores = ops.tile((1.0 - seen.astype(ms.float32)) * MASKED, (1, self.num_heads, 1))
        return scores.reshape((batch * self.num_kv_heads, -1, self.length))


class Rotary(nn.Cell):
    """``x * cos + swap(x) * sin``, where swap exchanges the two halves of the last axis.

    x, cos, sin: one shape, [..., d]; the minus sign of the rotation is in the first half of ``sin``.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.half = head_dim // 2
        self.gather = ops.Gather()

    def swap(self, x: Tensor) -> Tensor:
        # one gather of half rows, in half the time of two slices and their concatenation
        halves = x.reshape((-1, self.half))
        order = np.arange(halves.shape[0], dtype=np.int32).reshape((-1, 2))[:, ::-1]
        return self.gather(halves, Tensor(order.reshape((-1,)), ms.int32), 0).reshape(x.shape)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + self.swap(x) * sin

    def bprop(self, x, cos, sin, out, dout):
        # swap is its own transpose; the tables are constants of the step and need no gradient
        return dout * cos + self.swap(dout * sin), ops.zeros_like(cos), ops.zeros_like(sin)


class SwapAxes(nn.Cell):
    """Exchanges the two middle axes of x [b, m, n, d], given as [b * m * n, d] -> [b * n * m, d].

    Projections give a token's heads side by side, attention wants a head's tokens so. A gather of rows needs 4 bytes
    of index for a row, where a transposition keeps 8 for every number, and takes less than half the time.
    """

    def __init__(self):
        super().__init__()
        self.gather = ops.Gather()

    def swap(self, x: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        order = np.arange(batch * rows * columns, dtype=np.int32).reshape((batch, rows, columns)).transpose((0, 2, 1))
        return self.gather(x, Tensor(order.reshape((-1,)), ms.int32), 0)

    def construct(self, x: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        return self.swap(x, batch, rows, columns)

    def bprop(self, x, batch, rows, columns, out, dout):
        return self.swap(dout, batch, columns, rows), 0, 0, 0


class SoftmaxAttention(nn.Cell):
    """``softmax(q k^T + scores) v`` for q [n, m, d], k and v [n, s, d], scores [n, m, s] of 0 and -1e9; q is scaled.

    n = b * n_kv, and the m = g * s_q rows of q are the queries that share one key/value head. Gives the output
    [n, m, d], and what the gradient needs.
    """

    def __init__(self):
        super().__init__()
        self.matmul = ops.BatchMatMul()
        self.matmul_t = ops.BatchMatMul(transpose_b=True)
        self.t_matmul = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.matmul_t(q, k)  # [n, m, s]
        probs = self.softmax(scores.astype(ms.float32) + visible).astype(q.dtype)
        return self.matmul(probs, v), probs

    def bprop(self, q, k, v, visible, out, dout):
        output, probs = out
        grad = dout[0]
        # With P the probabilities and o the output, d scores = P * (grad v^T - rowsum(grad * o)). The row's sum is
        # subtracted within the product, as one more column of both factors: [grad, -sum] [v, 1]^T. That spares the
        # broadcast over [n, m, s]. Rows of a matrix are summed in a fifth of the time that rows of [n, m, d] take.
        row = self.sum((grad * output).astype(ms.float32).reshape((-1, grad.shape[-1])), (1,))  # [n * m, 1]
        row = row.astype(grad.dtype).reshape((grad.shape[0], -1, 1))
        d_scores = probs * self.matmul_t(ops.concat((grad, -row), -1), ops.concat((v, ops.ones_like(v[..., :1])), -1))
        return self.matmul(d_scores, k), self.t_matmul(d_scores, q), self.t_matmul(probs, grad), ops.zeros_like(visible)


class ByHeads(nn.Cell):
    """What attention begins and ends with: q [t, n_h * d], k, v [t, n_kv * d] are rotated, and ordered by heads."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rotary = Rotary(head_dim)
        self.swap = SwapAxes()
        self.kernel: nn.Cell = SoftmaxAttention()

    def split_heads(self, x: Tensor, batch: int, num_heads: int) -> Tensor:
        x = x.reshape((-1, self.head_dim))  # [b * s * n, d]
        x = self.swap(x, batch, x.shape[0] // (batch * num_heads), num_heads)
        return x.reshape((batch * self.num_kv_heads, -1, self.head_dim))

    def merge_heads(self, x: Tensor, batch: int) -> Tensor:
        x = x.reshape((-1, self.head_dim))  # [b * n_h * s, d]
        x = self.swap(x, batch, self.num_heads, x.shape[0] // (batch * self.num_heads))
        return x.reshape((-1, self.num_heads * self.head_dim))

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b * n_kv, g * s, d], keys and values [b * n_kv, s, d], rotated."""
        q = self.rotary(q.reshape((-1, self.head_dim)), rope[0], rope[1])
        k = self.rotary(k.reshape((-1, self.head_dim)), rope[2], rope[3])
        return (
            self.split_heads(q, batch, self.num_heads),
            self.split_heads(k, batch, self.num_kv_heads),
            self.split_heads(v, batch, self.num_kv_heads),
        )


class Attention(ByHeads):
    """Rotary positions and attention over tokens: q [t, n_h * d], k, v [t, n_kv * d], not rotated -> [t, n_h * d].

    rope: cos and sin for queries [t * n_h, d], scaled by 1/sqrt(d), and for keys [t * n_kv, d], as ``RotaryTables``
    has them. visible: what ``ScoreMask`` gives.
    """

    KEPT = 0  # tensors that ``keeping`` gives besides the output

    def keeping(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor) -> tuple[Tensor, ...]:
        """The output, and what the gradient needs besides and should not compute again …."""
        return (self.construct(q, k, v, rope, visible),)

    def known(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor, kept: tuple) -> Tensor:
        """The output, whose gradient may use what ``keeping`` gave; here it is all computed again."""
        return self.construct(q, k, v, rope, visible)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor) -> Tensor:
        batch = visible.shape[0] // self.num_kv_heads
        q, k, v = self.by_heads(q, k, v, rope, batch)
        return self.merge_heads(self.kernel(q, k, v, visible)[0], batch)


def write_rows(buffer: Parameter, rows: Tensor, new: Tensor, length: int) -> Tensor:
    """Puts ``new``, of [n, d] numbers, into the rows [n] of ``buffer``; returns all of it as [heads, length, d]."""
    head_dim = new.shape[-1]
    written = ops.scatter_update(buffer, rows, new.reshape((-1, head_dim)))
    return written.reshape((-1, length, head_dim))


class CachedAttention(ByHeads):
    """``Attention`` of new tokens to those in a cache, into which they are written; it has no gradient.

    cache: the layer's keys and values, each [lines * n_kv * length, d], the rows [b * n_kv * new] that the new tokens
    take, and those where their heads begin [b * n_kv]: of all lines in their order, or of fewer. visible: what
    ``CachedScoreMask`` gives.
    """

    def used(self, keys: Tensor, begins: Tensor, length: int) -> Tensor:
        """Of a cache [lines * n_kv, length, d] the heads that begin at ``begins``, [b * n_kv, length, d]."""
        return keys if keys.shape[0] == begins.shape[0] else ops.gather(keys, begins // length, 0)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor, cache: tuple) -> Tensor:
        keys, values, rows, begins = cache
        batch, length = visible.shape[0] // self.num_kv_heads, visible.shape[2]
        q, k, v = self.by_heads(q, k, v, rope, batch)
        k = self.used(write_rows(keys, rows, k, length), begins, length)
        v = self.used(write_rows(values, rows, v, length), begins, length)
        output = self.kernel(q, k, v, visible)[0]  # MindSpore warns of an unused name behind a write
        return self.merge_heads(output, batch)


class HeadProduct(nn.Cell):
    """hidden [c, h] and the head [v, h] -> logits [c, v] float32; a float16 head is widened part by part."""

    def __init__(self):
        super().__init__()
        self.product = MatMul(transpose_b=True)

    def construct(self, hidden: Tensor, head: Tensor) -> Tensor:
        x = hidden.astype(ms.float32)
        if head.dtype == ms.float32:
            return self.product(x, head)
        rows = PART_NUMBERS // head.shape[1] or 1
        parts: list[Tensor] = []
        for start in range(0, head.shape[0], rows):
            ready = parts[-1] if parts else x
            parts.append(self.product(x, head_part(head, start, rows, ready)))
        return ops.concat(parts, 1)


class HeadProductBack(nn.Cell):
    """probs [c, v] float32 and the head [v, h] -> probs head [c, h]; a float16 head is widened part by part."""

    def __init__(self):
        super().__init__()
        self.product = MatMul()

    def construct(self, probs: Tensor, head: Tensor) -> Tensor:
        if head.dtype == ms.float32:
            return self.product(probs, head)
        rows = PART_NUMBERS // head.shape[1] or 1
        total = self.product(probs[:, :rows], head_part(head, 0, rows, probs))
        for start in range(rows, head.shape[0], rows):
            total = total + self.product(probs[:, start : start + rows], head_part(head, start, rows, total))
        return total


def head_part(head: Tensor, start: int, rows: int, ready: Tensor) -> Tensor:
    """Rows [start, start + rows) of the head in float32, widened only once ``ready`` is computed."""
    # a gather, as slices are taken in float32 alone; no min(), which MindSpore does not read where a gradient is formed
    end = start + rows if start + rows < head.shape[0] else head.shape[0]
    index = np.arange(start, end, dtype=np.int32)
    # no number is above infinity, so this adds 0: an index that depends on `ready` is what makes the part wait for it
    # (ops.depend on a parameter is optimised away)
    nothing = (ready.reshape((-1,))[:1] > np.inf).astype(ms.int32)
    return ops.gather(head, Tensor(index, ms.int32) + nothing, 0).astype(ms.float32)


class CrossEntropy(nn.Cell):
    """Cross-entropy of c slots, with its gradient: ``-log softmax(hidden head^T)[target]``.

    hidden [c, h], head [v, h], targets [c] int32, below 0 for a slot that does not count -> (summed loss [],
    d loss / d hidden [c, h] float32, number of slots whose largest logit is the target's []), float32.
    """

    def __init__(self):
        super().__init__()
        self.head_product: nn.Cell = HeadProduct()
        self.head_product_back: nn.Cell = HeadProductBack()
        self.t_matmul = MatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.max = ops.ArgMaxWithValue(axis=-1, keep_dims=True)

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.head_product(hidden, head)  # [c, v]
        valid = (targets >= 0).astype(ms.float32).reshape((-1, 1))  # [c, 1]
        index = ops.maximum(targets, 0)
        probs = self.softmax(logits)
        # log-sum-exp from the largest logit, whose probability is at least 1/v and so never underflows
        top, top_logit = self.max(logits)
        log_sum = top_logit - ops.log(ops.gather_elements(probs, 1, top))  # [c, 1]
        loss = (log_sum - ops.gather_elements(logits, 1, index.reshape((-1, 1)))) * valid
        # (probs - onehot) head = probs head - head[target]
        grad = self.head_product_back(probs, head)
        grad = grad - ops.gather(head, index, 0).astype(grad.dtype)
        right = (top.reshape((-1,)) == targets).astype(ms.float32)
        return loss.sum(), grad.astype(ms.float32) * valid, right.sum()

    def head_gradient(self, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """d loss / d head [v, h] float32, whatever the head's type; the logits are computed again."""
        valid = (targets >= 0).astype(ms.float32).reshape((-1, 1))
        probs = self.softmax(self.head_product(hidden, head))
        weighted = hidden.astype(ms.float32) * valid
        taken = ops.unsorted_segment_sum(weighted, ops.maximum(targets, 0), head.shape[0])
        return self.t_matmul(probs, weighted) - taken


class AdamW(nn.Cell):
    """One step of AdamW (Loshchilov and Hutter, 2019), as ``torch.optim.AdamW`` takes it, on vectors [n].

    old, grad [n]; state, the parameters of ``state_of``, which the step brings forward; scale [], a factor on the
    gradient, of which what is not finite counts as 0; taken []: 1, or 0 where the state shall stay as it is; count []
    of steps, this one included; rate, the learning rate, and decay: [] or [n] -> old after the step.
    """

    @staticmethod
    def state_of(n: int) -> dict[str, Array]:
        """What the state of n numbers is at the start: the moments, by name."""
        return {"exp_avg": np.zeros(n, np.float32), "exp_avg_sq": np.zeros(n, np.float32)}

    def __init__(self, beta1: float, beta2: float, eps: float):
        super().__init__()
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.divide = ops.RealDiv()  # `/`, on the CPU, keeps two 8-byte indices per number

    def used(self, grad: Tensor, scale: Tensor) -> Tensor:
        """The gradient as the step takes it."""
        return ops.select(ops.isfinite(grad), grad, ops.zeros_like(grad)) * scale

    def shares(self) -> tuple[Tensor, Tensor]:
        """The weights [] of the new gradient in the moments."""
        return Tensor(1.0 - self.beta1, ms.float32), Tensor(1.0 - self.beta2, ms.float32)

    def corrections(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [] on exp_avg and on the root of exp_avg_sq, both of which begin at 0."""
        of_mean = 1.0 / (1.0 - ops.pow(Tensor(self.beta1, ms.float32), count))
        of_root = 1.0 / ops.sqrt(1.0 - ops.pow(Tensor(self.beta2, ms.float32), count))
        return of_mean, of_root

    def construct(
        self,
        old: Tensor,
        grad: Tensor,
        state: tuple[Parameter, ...],
        scale: Tensor,
        taken: Tensor,
        count: Tensor,
        rate: Tensor,
        decay: Tensor,
    ) -> Tensor:
        exp_avg, exp_avg_sq = self.brought_forward(state, self.used(grad, scale), taken)
        of_mean, of_root = self.corrections(count)
        update = self.divide(of_mean * exp_avg, ops.sqrt(exp_avg_sq) * of_root + self.eps)
        return old - rate * (decay * old + update)

    def brought_forward(self, state: tuple[Parameter, ...], grad: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """The moments [n] with a new gradient, which ``state`` then is."""
        exp_avg, exp_avg_sq = self.with_gradient(state[0], state[1], grad, taken)
        ops.assign(state[0], exp_avg)
        ops.assign(state[1], exp_avg_sq)
        return exp_avg, exp_avg_sq

    def with_gradient(self, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """The moments with a new gradient."""
        share1, share2 = self.shares()
        exp_avg = exp_avg + taken * share1 * (grad - exp_avg)
        return exp_avg, exp_avg_sq + taken * share2 * (grad * grad - exp_avg_sq)


class AdamW8bit(AdamW):
    """``AdamW`` with eight bits for a number of a moment (Dettmers and others, 2022), as bitsandbytes' ``AdamW8bit``.

    Each moment is a code for each number, an entry of ``dynamic_map``, and a factor for each block of neighbours.
    Blocks follow one another in the vector of all parameters; in bitsandbytes each parameter begins a block of its
    own, and one of fewer than 4,096 numbers keeps float32.
    """

    def __init__(self, beta1: float, beta2: float, eps: float):
        super().__init__(beta1, beta2, eps)
        self.maps = [Tensor(dynamic_map(signed)) for signed in (True, False)]
        self.thresholds = [Tensor(thresholds(signed)) for signed in (True, False)]
        self.search = ops.SearchSorted(dtype=ms.int32)
        self.gather = ops.Gather()

    @staticmethod
    def state_of(n: int) -> dict[str, Array]:
        blocks = -(-n // BLOCK)
        codes, factors = np.zeros(blocks * BLOCK, np.uint8), np.zeros(blocks, np.float32)
        return {
            "exp_avg": codes,
            "exp_avg_factors": factors,
            "exp_avg_sq": codes.copy(),
            "exp_avg_sq_factors": factors.copy(),
        }

    def brought_forward(self, state: tuple[Parameter, ...], grad: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        n = grad.shape[0]
        padded = ops.concat((grad, ops.zeros(state[0].shape[0] - n, ms.float32)))  # to whole blocks
        exp_avg = self.numbers(state[0], state[1], self.maps[0])
        exp_avg_sq = self.numbers(state[2], state[3], self.maps[1])
        exp_avg, exp_avg_sq = self.with_gradient(exp_avg, exp_avg_sq, padded, taken)
        stays = taken == 0.0
        self.store(exp_avg, state[0], state[1], self.thresholds[0], stays)
        self.store(exp_avg_sq, state[2], state[3], self.thresholds[1], stays)
        return exp_avg[:n], exp_avg_sq[:n]

    def numbers(self, codes: Parameter, factors: Parameter, values: Tensor) -> Tensor:
        """What a moment is, float32."""
        found = self.gather(values, codes.astype(ms.int32), 0)
        return (found.reshape(-1, BLOCK) * factors.reshape(-1, 1)).reshape(-1)

    def store(self, moment: Tensor, codes: Parameter, factors: Parameter, limits: Tensor, stays: Tensor) -> None:
        blocks = moment.reshape(-1, BLOCK)
        largest = ops.abs(blocks).max(1)
        divisors = ops.select(largest > 0.0, largest, ops.ones_like(largest))
        found = self.search(limits, self.divide(blocks, divisors.reshape(-1, 1)).reshape(-1)).astype(ms.uint8)
        ops.assign(codes, ops.select(ops.broadcast_to(stays, codes.shape), codes, found))
        ops.assign(factors, ops.select(ops.broadcast_to(stays, factors.shape), factors, largest))
