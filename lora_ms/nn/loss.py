"""Summed cross-entropy of chosen tokens, without the whole [tokens, vocabulary] matrix."""

import mindspore as ms
from mindspore import Tensor, nn, ops

IGNORE_INDEX = -100  # a label that teaches nothing


class SummedCrossEntropy(nn.Cell):
    """Sum over c slots of ``-log softmax(hidden head^T)[target]``; slots whose target is -100 count nothing.

    hidden [c, h], head [v, h], targets [c] -> (loss [] float32, d loss / d hidden [c, h]). The gradient is formed
    with the value, chunk by chunk, so that only one chunk of logits is ever held; what is not used is pruned from
    the graph.
    """

    def __init__(self, chunk_rows: int):
        super().__init__()
        self.chunk_rows = chunk_rows
        self.logits = ops.MatMul(transpose_b=True)
        self.matmul = ops.MatMul()
        self.softmax = ops.Softmax(-1)
        self.max = ops.ArgMaxWithValue(axis=-1, keep_dims=True)

    def chunk(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        valid = (targets >= 0).astype(ms.float32).reshape((-1, 1))  # [c, 1]
        index = ops.maximum(targets, 0)
        logits = self.logits(hidden, head).astype(ms.float32)  # [c, v]
        probs = self.softmax(logits)
        # log-sum-exp from the largest logit, whose probability is at least 1/v and so never underflows
        top, top_logit = self.max(logits)
        log_sum = top_logit - ops.log(ops.gather_elements(probs, 1, top))  # [c, 1]
        target_logit = ops.gather_elements(logits, 1, index.reshape((-1, 1)))
        loss = ((log_sum - target_logit) * valid).sum()
        # (probs - onehot) head = probs head - head[target]
        grad = self.matmul(probs.astype(head.dtype), head).astype(ms.float32) - ops.gather(head, index, 0).astype(ms.float32)
        return loss, grad * valid

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, grads = ops.zeros((), ms.float32), ()
        for start in range(0, hidden.shape[0], self.chunk_rows):
            end = min(start + self.chunk_rows, hidden.shape[0])
            part, grad = self.chunk(hidden[start:end], head, targets[start:end])
            loss, grads = loss + part, grads + (grad,)
        return loss, ops.concat(grads, 0) if len(grads) > 1 else grads[0]

    def bprop(self, hidden, head, targets, out, dout):
        d_hidden = (out[1] * dout[0]).astype(hidden.dtype)
        return d_hidden, ops.zeros_like(head), ops.zeros_like(targets)
