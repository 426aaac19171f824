"""MindFormers' own trainer: a training step that runs without an NPU, and a callback that reports each step."""

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.train import Callback
from numpy.typing import NDArray

from lora_ms.bridge.settings import STEP
from lora_ms.errors import LoraMsError

IGNORED = -100  # label that carries no loss

# step from 1, loss, gradient norm, learning rate, tokens, label tokens -> whether the run is to end
Report = Callable[[int, float, float | None, float, int, int], bool]


class PortableTrainOneStepCell(nn.TrainOneStepCell):
    """MindFormers' training step without Ascend's overflow operators, of which float32 has no need.

    It takes MFTrainOneStepCell's arguments and returns what that returns: loss, overflow, loss scale, learning rate
    and the gradient's norm before it was clipped.
    """

    def __init__(self, network, optimizer, use_clip_grad=False, max_grad_norm=1.0, scale_sense=1.0, **kwargs):
        from mindformers.core.clip_grad import ClipGradNorm

        super().__init__(network, optimizer)
        self.clips = use_clip_grad
        self.clip_grad_norm = ClipGradNorm(max_norm=max_grad_norm)
        self.rate = deepcopy(optimizer.learning_rate)
        self.grad_fn = ops.value_and_grad(network, None, optimizer.parameters)
        self.no, self.one, self.zero = Tensor(False), Tensor(float(scale_sense)), Tensor(0.0)

    def construct(self, *inputs):
        loss, grads = self.grad_fn(*inputs)
        norm = self.zero
        if self.clips:
            grads, norm = self.clip_grad_norm(grads)
        rate = self.rate
        if self.optimizer.dynamic_lr:
            if self.optimizer.is_group_lr:
                rate = self.rate[-1](self.optimizer.global_step).reshape(())
            else:
                rate = self.rate(self.optimizer.global_step).reshape(())
        loss = ops.depend(loss, self.optimizer(grads))
        return loss, self.no, self.one, rate, norm


def register(package: SimpleNamespace) -> None:
    """Makes the step known to MindFormers by its name."""
    kind = package.MindFormerModuleType.WRAPPER
    if not package.MindFormerRegister.is_exist(kind, STEP):
        package.MindFormerRegister.register_cls(PortableTrainOneStepCell, kind, STEP)


class StepReport(Callback):
    """Calls ``begin`` first, and ``report`` after every step; stops where that says so, and at a loss that is not
    finite.

    tokens: of a batch, padding included; reported where the batch itself is not to be seen.
    """

    def __init__(self, begin: Callable[[], None], report: Report, tokens: int):
        super().__init__()
        self.begin, self.report, self.tokens = begin, report, tokens
        self.first_loss = self.last_loss = float("nan")
        self.steps = 0

    def on_train_begin(self, run_context: Any) -> None:
        """Called by MindSpore."""
        self.begin()

    def on_train_step_end(self, run_context: Any) -> None:
        """Called by MindSpore; of several steps sunk into the device in one piece, the last is seen."""
        told = run_context.original_args()
        output = told.net_outputs
        numbers = [None if value is None else float(np.mean(_host(value))) for value in _several(output)]
        loss, _, _, rate, norm = (*numbers, *[None] * 5)[:5]
        if loss is None or not np.isfinite(loss):
            raise LoraMsError(f"the loss of step {told.cur_step_num} is {loss}: lower the learning rate")
        tokens, labels = self.tokens, self.tokens
        batch = told.get("train_dataset_element")
        if isinstance(batch, (list, tuple)) and len(batch) > 1:
            tokens, labels = counts(_host(batch[1]))
        if not self.steps:
            self.first_loss = loss
        self.steps, self.last_loss = told.cur_step_num, loss
        if self.report(self.steps, loss, norm, rate or 0.0, tokens, labels):
            run_context.request_stop()


def _several(output: Any) -> tuple:
    return tuple(output) if isinstance(output, (list, tuple)) else (output,)


def _host(value: Any) -> NDArray:
    return value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)


def counts(labels: NDArray) -> tuple[int, int]:
    """Tokens up to each row's last label, and labels: of unshifted ``labels`` [rows, seq_length + 1]."""
    learnt = labels[:, 1:] != IGNORED
    ends = learnt.shape[1] - np.argmax(learnt[:, ::-1], axis=1)
    return int(ends[learnt.any(1)].sum()), int(learnt.sum())


def scores(network: nn.Cell, rows: NDArray, labels: NDArray, batch_size: int) -> tuple[float, float, int]:
    """Of all label tokens of rows [n, seq_length]: mean cross-entropy in nats, share that has the highest logit, and
    their number.

    Rows beyond the last whole batch are computed in one that is filled up with the first row, and counted once.
    """
    network.set_train(False)
    total, right, tokens = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        index = np.arange(start, start + batch_size)
        inside = index < len(rows)
        index = np.where(inside, index, 0)
        logits = network(Tensor(rows[index]))[0].asnumpy().astype(np.float32)[:, :-1]
        targets = labels[index, 1:]
        learnt = (targets != IGNORED) & inside[:, None]
        chosen, wanted = logits[learnt], targets[learnt]
        top = chosen.max(-1, keepdims=True)
        log_sum = np.log(np.exp(chosen - top).sum(-1)) + top[:, 0]
        total += float((log_sum - chosen[np.arange(len(wanted)), wanted]).sum())
        right += int((chosen.argmax(-1) == wanted).sum())
        tokens += len(wanted)
    network.set_train(True)
    return total / max(tokens, 1), right / max(tokens, 1), tokens
