"""Summed cross-entropy of chosen tokens, without the whole [tokens, vocabulary] matrix."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from lora_ms.nn.parallel import Shard
from lora_ms.nn.projection import HeadProduct
from lora_ms.ops import native as cpu

IGNORE_INDEX = -100  # a label that teaches nothing


class SummedCrossEntropy(nn.Cell):
    """Sum over c slots of ``-log softmax(hidden head^T)[target]``; slots whose target is -100 count nothing.

    hidden [c, h], head [v, h], targets [c] -> (loss [] float32, d loss / d hidden [c, h] float32, number of slots
    whose largest logit is the target's [] float32).

    The gradient is formed with the value, chunk by chunk, so that one chunk of logits [chunk_rows, v] is held at a
    time. The gradient of ``head`` costs the logits again, in backward; where the head is frozen, and where no
    gradient is asked for, the graph compiler prunes what nobody uses.
    """

    def __init__(self, chunk_rows: int):
        super().__init__()
        self.chunk_rows = chunk_rows
        self.matmul = ops.MatMul()
        self.head_product = HeadProduct()
        self.matmul_t, self.t_matmul = cpu.MatMul("times_transposed"), cpu.MatMul("transposed_times")
        self.softmax = ops.Softmax(-1)
        self.max = ops.ArgMaxWithValue(axis=-1, keep_dims=True)
        self.own, self.operator = cpu.there(), cpu.cross_entropy()

    def chunk(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.head_product.logits(hidden, head)  # [c, v]
        if self.own:
            loss, right, grad = self.operator(logits, targets)
            return loss.sum(), self.head_product.mixed(grad, head), right.sum()
        valid = (targets >= 0).astype(ms.float32).reshape((-1, 1))  # [c, 1]
        index = ops.maximum(targets, 0)
        probs = self.softmax(logits)
        # log-sum-exp from the largest logit, whose probability is at least 1/v and so never underflows
        top, top_logit = self.max(logits)
        log_sum = top_logit - ops.log(ops.gather_elements(probs, 1, top))  # [c, 1]
        loss = (log_sum - ops.gather_elements(logits, 1, index.reshape((-1, 1)))) * valid
        # (probs - onehot) head = probs head - head[target]
        grad = self.head_product.mixed(probs, head)
        grad = grad - ops.gather(head, index, 0).astype(grad.dtype)
        right = (top.reshape((-1,)) == targets).astype(ms.float32)
        return loss.sum(), grad.astype(ms.float32) * valid, right.sum()

    def head_chunk(self, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        if self.own:
            x = hidden.astype(ms.float32)
            grad = self.operator(self.matmul_t(x, head.astype(ms.float32)), targets)[2]
            return self.t_matmul(grad, x).astype(head.dtype)
        valid = (targets >= 0).astype(hidden.dtype).reshape((-1, 1))
        probs = self.softmax(self.matmul_t(hidden, head).astype(ms.float32)).astype(head.dtype)
        weighted = hidden * valid
        taken = ops.unsorted_segment_sum(weighted, ops.maximum(targets, 0), head.shape[0])
        return self.t_matmul(probs, weighted) - taken  # [v, h]

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts: list[Tensor] = []
        grads: list[Tensor] = []
        rights: list[Tensor] = []
        for start in range(0, hidden.shape[0], self.chunk_rows):
            end = start + self.chunk_rows
            piece = hidden[start:end]
            if grads:  # one chunk after another: left free, all their logits are computed first
                piece = ops.depend(piece, grads[-1])
            part, grad, right = self.chunk(piece, head, targets[start:end])
            parts.append(part)
            grads.append(grad)
            rights.append(right)
        return ops.addn(parts), ops.concat(grads, 0), ops.addn(rights)

    def bprop(self, hidden, head, targets, out, dout):
        d_loss = dout[0]
        d_head = ops.zeros_like(head)
        for start in range(0, hidden.shape[0], self.chunk_rows):
            end = start + self.chunk_rows
            piece = ops.depend(hidden[start:end], d_head)
            d_head = d_head + self.head_chunk(piece, head, targets[start:end])
        d_hidden = (out[1] * d_loss).astype(hidden.dtype)
        return d_hidden, d_head * d_loss.astype(head.dtype), ops.zeros_like(targets)


class SplitCrossEntropy(SummedCrossEntropy):
    """The same where each rank of ``shard`` has v / n rows of the head, one rank after another; the head is frozen.

    Each chunk costs a sum over the ranks of 2 n + 1 numbers a slot, the step one of the hidden states' gradient.
    """

    def __init__(self, chunk_rows: int, shard: Shard):
        super().__init__(chunk_rows)
        self.index, self.count = shard.index, shard.count
        place = np.eye(shard.count, dtype=np.float32)[shard.index : shard.index + 1]
        self.place = Tensor(place)  # [1, n]: 1 in this rank's column
        self.all_reduce = ops.AllReduce(group=shard.group)
        self.highest = ops.ReduceMax(keep_dims=True)
        self.sum = ops.ReduceSum(keep_dims=True)

    def chunk(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        valid = (targets >= 0).astype(ms.float32).reshape((-1, 1))  # [c, 1]
        row = targets - self.index * head.shape[0]
        here = ops.logical_and(row >= 0, row < head.shape[0])
        index = row * here.astype(row.dtype)
        own = here.astype(ms.float32).reshape((-1, 1))
        logits = self.head_product.logits(hidden, head)  # [c, v / n]
        probs = self.softmax(logits)
        top, top_logit = self.max(logits)
        log_sum = top_logit - ops.log(ops.gather_elements(probs, 1, top))  # of this rank's rows, [c, 1]
        logit = ops.gather_elements(logits, 1, index.reshape((-1, 1))) * own
        # every rank's log-sum and largest logit in a column of its own, and the logit of the target
        table = (self.matmul(log_sum, self.place), self.matmul(top_logit, self.place), logit)
        table = self.all_reduce(ops.concat(table, 1))
        n = self.count
        largest = self.highest(table[:, :n], 1)
        whole = largest + ops.log(self.sum(ops.exp(table[:, :n] - largest), 1))  # [c, 1]
        grad = self.head_product.mixed(probs, head).astype(ms.float32) * ops.exp(log_sum - whole)
        grad = grad - ops.gather(head, index, 0).astype(ms.float32) * own
        logit = table[:, 2 * n :]
        right = (logit >= self.highest(table[:, n : 2 * n], 1)).astype(ms.float32) * valid
        return ((whole - logit) * valid).sum(), grad * valid, right.sum()

    def bprop(self, hidden, head, targets, out, dout):
        d_hidden = self.all_reduce(out[1] * dout[0]).astype(hidden.dtype)
        return d_hidden, ops.zeros_like(head), ops.zeros_like(targets)


def summed_cross_entropy(vocab_size: int, numbers: int, shard: Shard) -> SummedCrossEntropy:
    """The loss over ``vocab_size`` entries that holds about ``numbers`` logits at a time, on one rank or several."""
    rows = max(16, numbers // (vocab_size // shard.count))
    return SplitCrossEntropy(rows, shard) if shard.count > 1 else SummedCrossEntropy(rows)
