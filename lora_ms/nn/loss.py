"""Summed cross-entropy of chosen tokens, without the whole [tokens, vocabulary] matrix."""

import mindspore as ms
from mindspore import Tensor, nn, ops

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
        self.matmul_t = ops.MatMul(transpose_b=True)
        self.t_matmul = ops.MatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.max = ops.ArgMaxWithValue(axis=-1, keep_dims=True)

    def chunk(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        valid = (targets >= 0).astype(ms.float32).reshape((-1, 1))  # [c, 1]
        index = ops.maximum(targets, 0)
        logits = self.matmul_t(hidden, head).astype(ms.float32)  # [c, v]
        probs = self.softmax(logits)
        # log-sum-exp from the largest logit, whose probability is at least 1/v and so never underflows
        top, top_logit = self.max(logits)
        log_sum = top_logit - ops.log(ops.gather_elements(probs, 1, top))  # [c, 1]
        loss = (log_sum - ops.gather_elements(logits, 1, index.reshape((-1, 1)))) * valid
        # (probs - onehot) head = probs head - head[target]
        grad = self.matmul(probs.astype(head.dtype), head) - ops.gather(head, index, 0)
        right = (top.reshape((-1,)) == targets).astype(ms.float32)
        return loss.sum(), grad.astype(ms.float32) * valid, right.sum()

    def head_chunk(self, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
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
