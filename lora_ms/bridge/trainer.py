"""Inside MindFormers' trainer: a training step that runs without an NPU, and a callback that reports each step."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.train import Callback
from numpy.typing import NDArray

from lora_ms.bridge.settings import STEP
from lora_ms.errors import LoraMsError

IGNORED = -100  # label that carries no loss


@dataclass(frozen=True)
class StepNumbers:
    """What MindFormers tells of one optimiser step."""

    step: int  # of this process, from 1
    loss: float  # nats per label token
    grad_norm: float | None  # before clipping; None where it is not computed
    learning_rate: float
    tokens: int  # without padding
    label_tokens: int


class PortableTrainOneStepCell(nn.TrainOneStepCell):
    """MindFormers' training step without Ascend's overflow operators, which float32 does not need.

    Arguments and results are MFTrainOneStepCell's: loss, overflow, loss scale, learning rate, and the gradient's norm
    before it was clipped.
    """

    def __init__(self, network, optimizer, use_clip_grad=False, max_grad_norm=1.0, scale_sense=1.0, **kwargs):
        from mindformers.core.clip_grad import ClipGradNorm

        super().__init__(network, optimizer)
        self.clips = use_clip_grad
        self.clip_grad_norm = ClipGradNorm(max_norm=max_grad_norm)
        self.rate = deepcopy(optimizer.learning_rate)
        self.grad_fn = ops.value_and_grad(network, None, optimizer.parameters)
        self.no_overflow = Tensor(False)
        self.scale = Tensor(float(scale_sense))
        self.zero = Tensor(0.0)

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
        return loss, self.no_overflow, self.scale, rate, norm


def register(package: SimpleNamespace) -> None:
    """Registers the step with MindFormers, whose configuration then names it."""
    kind = package.MindFormerModuleType.WRAPPER
    if not package.MindFormerRegister.is_exist(kind, STEP):
        package.MindFormerRegister.register_cls(PortableTrainOneStepCell, kind, STEP)


class StepReport(Callback):
    """Calls ``begin`` before the first step and ``report`` after every step; ends the run at a loss that is not finite.

    Args:
        begin: called once.
        report: returns whether the run is to end.
        tokens: of a batch, padding included; reported where MindFormers does not show the batch.
    """

    def __init__(self, begin: Callable[[], None], report: Callable[[StepNumbers], bool], tokens: int):
        super().__init__()
        self.begin = begin
        self.report = report
        self.tokens = tokens
        self.losses: list[float] = []
        self.steps = 0

    def on_train_begin(self, run_context: Any) -> None:
        """Called by MindSpore."""
        self.begin()

    def on_train_step_end(self, run_context: Any) -> None:
        """Called by MindSpore; where several steps are sunk into the device together, after the last of them."""
        told = run_context.original_args()
        output = told.net_outputs
        numbers = [None if value is None else float(np.mean(_on_host(value))) for value in _as_tuple(output)]
        loss, _, _, rate, norm = (*numbers, *[None] * 5)[:5]
        if loss is None or not np.isfinite(loss):
            raise LoraMsError(f"the loss of step {told.cur_step_num} is {loss}: lower the learning rate")
        tokens = labels = self.tokens
        batch = told.get("train_dataset_element")
        if isinstance(batch, (list, tuple)) and len(batch) > 1:
            tokens, labels = counts(_on_host(batch[1]))
        self.losses.append(loss)
        self.steps = told.cur_step_num
        numbers_of_step = StepNumbers(
            step=self.steps,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate or 0.0,
            tokens=tokens,
            label_tokens=labels,
        )
        if self.report(numbers_of_step):
            run_context.request_stop()


def _as_tuple(output: Any) -> tuple:
    return tuple(output) if isinstance(output, (list, tuple)) else (output,)


def _on_host(value: Any) -> NDArray:
    return value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)


def counts(labels: NDArray) -> tuple[int, int]:
    """Tokens up to each row's last label, and label tokens; ``labels`` [rows, seq_length + 1] are not shifted."""
    learnt = labels[:, 1:] != IGNORED
    ends = learnt.shape[1] - np.argmax(learnt[:, ::-1], axis=1)
    return int(ends[learnt.any(1)].sum()), int(learnt.sum())


def scores(network: nn.Cell, rows: NDArray, labels: NDArray, batch_size: int) -> tuple[float, float, int]:
    """Mean cross-entropy of the label tokens in nats, share of them that has the highest logit, and their number.

    rows, labels: [n, seq_length]. The last batch is filled up with the first row, whose copies do not count.
    """
    network.set_train(False)
    total = 0.0
    right = 0
    tokens = 0
    for start in range(0, len(rows), batch_size):
        index = np.arange(start, start + batch_size)
        inside = index < len(rows)
        index = np.where(inside, index, 0)
        logits = network(Tensor(rows[index]))[0].asnumpy().astype(np.float32)[:, :-1]
        targets = labels[index, 1:]
        learnt = (targets != IGNORED) & inside[:, None]
        chosen = logits[learnt]
        expected = targets[learnt]
        top = chosen.max(-1, keepdims=True)
        log_sum = np.log(np.exp(chosen - top).sum(-1)) + top[:, 0]
        total += float((log_sum - chosen[np.arange(len(expected)), expected]).sum())
        right += int((chosen.argmax(-1) == expected).sum())
        tokens += len(expected)
    network.set_train(True)
    return total / max(tokens, 1), right / max(tokens, 1), tokens
