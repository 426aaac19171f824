"""Summed cross-entropy of chosen tokens, without the whole [tokens, vocabulary] matrix."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.ops import PORTABLE, Operators

IGNORE_INDEX = -100  # a label that teaches nothing


class SummedCrossEntropy(nn.Cell):
    """Sum over c slots of ``-log softmax(hidden head^T)[target]``; slots whose target is -100 count nothing.

    hidden [c, h], head [v, h], targets [c] -> (loss [] float32, d loss / d hidden [c, h] float32, number of slots
    whose largest logit is the target's [] float32).

    The gradient is formed with the value, chunk by chunk, so that one chunk of logits [chunk_rows, v] is held at a
    time. The gradient of ``head`` costs the logits again, in backward, and is float32 whatever the head's type: times a
    loss scale it leaves float16. Where the head is frozen, and where no gradient is asked for, the graph compiler
    prunes what nobody uses.
    """

    def __init__(self, chunk_rows: int, operators: Operators = PORTABLE):
        super().__init__()
        self.chunk_rows = chunk_rows
        self.cross_entropy = operators.cross_entropy()

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        rights: list[Tensor] = []
        for start in range(0, hidden.shape[0], self.chunk_rows):
            end = start + self.chunk_rows
            chunk = hidden[start:end]
            if grads:  # one chunk after another: otherwise all logits may be computed first
                chunk = ops.depend(chunk, grads[-1])
            loss, grad, right = self.cross_entropy(chunk, head, targets[start:end])
            losses.append(loss)
            grads.append(grad)
            rights.append(right)
        return ops.addn(losses), ops.concat(grads, 0), ops.addn(rights)

    def bprop(self, hidden, head, targets, out, dout):
        d_loss = dout[0]
        # ops.zeros(head.shape) stays in the graph as a constant where the head is frozen, too
        d_head = ops.zeros_like(head).astype(ms.float32)
        for start in range(0, hidden.shape[0], self.chunk_rows):
            end = start + self.chunk_rows
            chunk = ops.depend(hidden[start:end], d_head)
            d_head = d_head + self.cross_entropy.head_gradient(chunk, head, targets[start:end])
        return (out[1] * d_loss).astype(hidden.dtype), d_head * d_loss, ops.zeros_like(targets)


class TokenLogProbs(nn.Cell):
    """Of c slots ``log softmax(hidden head^T)[target]``; 0 where the target is -100.

    hidden [c, h], head [v, h], targets [c] -> (log-probabilities [c], their gradients by hidden [c, h]), float32.

    As in ``SummedCrossEntropy`` the gradient is formed with the values, and that of ``head`` costs the logits again.
    """

    def __init__(self, chunk_rows: int, operators: Operators = PORTABLE):
        super().__init__()
        self.chunk_rows = chunk_rows
        self.head_product = operators.head_product()
        self.head_product_back = operators.head_product_back()
        self.log_softmax = ops.LogSoftmax(-1)
        self.t_matmul = ops.MatMul(transpose_a=True)

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        grads: list[Tensor] = []
        for start in range(0, hidden.shape[0], self.chunk_rows):
            end = start + self.chunk_rows
            chunk = hidden[start:end]
            if grads:  # one chunk after another: otherwise all logits may be computed first
                chunk = ops.depend(chunk, grads[-1])
            index = ops.maximum(targets[start:end], 0)
            valid = (targets[start:end] >= 0).astype(ms.float32).reshape((-1, 1))
            log_probs = self.log_softmax(self.head_product(chunk, head))  # [c, v]
            taken = ops.gather_elements(log_probs, 1, index.reshape((-1, 1))) * valid
            grad = self.head_product_back(ops.exp(log_probs), head).astype(ms.float32)
            grads.append((ops.gather(head, index, 0).astype(ms.float32) - grad) * valid)
            found.append(taken.reshape((-1,)))
        return ops.concat(found, 0), ops.concat(grads, 0)

    def bprop(self, hidden, head, targets, out, dout):
        d_log_probs = dout[0].reshape((-1, 1))
        d_head = ops.zeros_like(head).astype(ms.float32)
        for start in range(0, hidden.shape[0], self.chunk_rows):
            end = start + self.chunk_rows
            chunk = ops.depend(hidden[start:end], d_head)
            weights = d_log_probs[start:end] * (targets[start:end] >= 0).astype(ms.float32).reshape((-1, 1))
            weighted = chunk.astype(ms.float32) * weights
            probs = ops.exp(self.log_softmax(self.head_product(chunk, head)))
            taken = ops.unsorted_segment_sum(weighted, ops.maximum(targets[start:end], 0), head.shape[0])
            d_head = d_head + (taken - self.t_matmul(probs, weighted))
        return (out[1] * d_log_probs).astype(hidden.dtype), d_head, ops.zeros_like(targets)


class SplitCrossEntropy(SummedCrossEntropy):
    """The same where each rank of ``shard`` has v / n rows of the head, one rank after another; the head is frozen.

    Each chunk costs a sum over the ranks of 2 n + 1 numbers a slot, the step one of the hidden states' gradient.
    """

    def __init__(self, chunk_rows: int, operators: Operators, shard: Shard):
        super().__init__(chunk_rows, operators)
        self.cross_entropy = _SplitChunk(operators, shard)
        self.all_reduce = ops.AllReduce(group=shard.group)

    def bprop(self, hidden, head, targets, out, dout):
        d_hidden = self.all_reduce(out[1] * dout[0]).astype(hidden.dtype)
        return d_hidden, ops.zeros_like(head), ops.zeros_like(targets)


class _SplitChunk(nn.Cell):
    """One chunk of ``SplitCrossEntropy``, as ``Operators.cross_entropy`` gives it; but d hidden is this rank's part."""

    def __init__(self, operators: Operators, shard: Shard):
        super().__init__()
        self.head_product = operators.head_product()
        self.head_product_back = operators.head_product_back()
        self.softmax = ops.Softmax(-1)
        self.max = ops.ArgMaxWithValue(axis=-1, keep_dims=True)
        self.matmul = ops.MatMul()
        self.index = shard.index
        self.count = shard.count
        column = np.eye(shard.count, dtype=np.float32)[shard.index : shard.index + 1]
        self.column = Tensor(column)  # [1, n]: 1 in this rank's column
        self.all_reduce = ops.AllReduce(group=shard.group)
        self.highest = ops.ReduceMax(keep_dims=True)
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        valid = (targets >= 0).astype(ms.float32).reshape((-1, 1))  # [c, 1]
        row = targets - self.index * head.shape[0]
        here = ops.logical_and(row >= 0, row < head.shape[0])  # the target is among this rank's rows
        index = row * here.astype(row.dtype)
        mine = here.astype(ms.float32).reshape((-1, 1))
        logits = self.head_product(hidden, head)  # [c, v / n]
        probs = self.softmax(logits)
        top, top_logit = self.max(logits)
        log_sum = top_logit - ops.log(ops.gather_elements(probs, 1, top))  # of this rank's rows, [c, 1]
        logit = ops.gather_elements(logits, 1, index.reshape((-1, 1))) * mine
        # every rank's log-sum and largest logit in a column of its own, and the logit of the target
        table = (self.matmul(log_sum, self.column), self.matmul(top_logit, self.column), logit)
        table = self.all_reduce(ops.concat(table, 1))
        n = self.count
        largest = self.highest(table[:, :n], 1)
        whole = largest + ops.log(self.sum(ops.exp(table[:, :n] - largest), 1))  # [c, 1]
        grad = self.head_product_back(probs, head).astype(ms.float32) * ops.exp(log_sum - whole)
        grad = grad - ops.gather(head, index, 0).astype(ms.float32) * mine
        logit = table[:, 2 * n :]
        right = (logit >= self.highest(table[:, n : 2 * n], 1)).astype(ms.float32) * valid
        return ((whole - logit) * valid).sum(), grad * valid, right.sum()


def token_log_probs(vocab_size: int, numbers: int, operators: Operators = PORTABLE) -> TokenLogProbs:
    """Over ``vocab_size`` entries, with about ``numbers`` logits at a time."""
    return TokenLogProbs(max(16, numbers // vocab_size), operators)


def summed_cross_entropy(
    vocab_size: int, numbers: int, operators: Operators = PORTABLE, shard: Shard = WHOLE
) -> SummedCrossEntropy:
    """The loss over ``vocab_size`` entries that holds about ``numbers`` logits at a time, on one rank or several."""
    rows = max(16, numbers // (vocab_size // shard.count))
    return SplitCrossEntropy(rows, operators, shard) if shard.count > 1 else SummedCrossEntropy(rows, operators)
