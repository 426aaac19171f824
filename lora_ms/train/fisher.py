"""The diagonal Fisher information of a model's parameters, as EWC takes it."""

import sys
from collections.abc import Iterator

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.data.loader import DataPlan
from lora_ms.errors import LoraMsError
from lora_ms.nn.graph import Graph
from lora_ms.runtime.device import Runtime
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import Flatten
from lora_ms.train.parts import SummedLoss, check_float32

FLOAT16_SCALE = 1024.0  # of the loss of a model in float16, whose small gradients would be 0


class GradientSum(nn.Cell):
    """Where ``MicroStep`` puts the gradient of ``params``, one after another as ``grad`` [n], without an optimiser."""

    def __init__(self, params: list[Parameter], loss_scale: float):
        super().__init__(auto_prefix=False)
        self.params = ms.ParameterTuple(params)
        self.flatten = Flatten()
        self.grad = Parameter(ops.zeros(sum(p.size for p in params), ms.float32), name="grad", requires_grad=False)
        self.loss_scale = Parameter(Tensor(loss_scale, ms.float32), name="loss_scale", requires_grad=False)


class AddSquare(Graph):
    """Adds the square of ``grad`` times a number [] to ``total`` [n], and empties ``grad``."""

    def __init__(self, gradient: GradientSum):
        super().__init__(auto_prefix=False)
        self.gradient = gradient
        n = gradient.grad.size
        self.total = Parameter(ops.zeros(n, ms.float32), name="total", requires_grad=False)

    def construct(self, factor: Tensor) -> Tensor:
        own = self.gradient.grad * factor
        total = ops.assign_add(self.total, own * own)
        ops.assign(self.gradient.grad, ops.depend(ops.zeros_like(own), total))
        return total


class RowProgress:
    """A bar on a terminal; a line for each tenth elsewhere; nothing where ``shown`` is False."""

    def __init__(self, done: int, total: int, shown: bool):
        self.total = total
        self.shown = shown
        self.bar = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(initial=done, total=total, unit="row", dynamic_ncols=True)

    def show(self, step: int) -> None:
        """``step`` are done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        elif self.shown and step * 10 // self.total > (step - 1) * 10 // self.total:
            print(f"{step:,} of {self.total:,}", flush=True)

    def close(self) -> None:
        """Leaves the terminal on a new line."""
        if self.bar is not None:
            self.bar.close()


class FisherRun:
    """Squares the gradient of every row's mean loss, row by row, and adds them up.

    Args:
        params: the parameters, in the model's order; they alone have ``requires_grad``.
        plan: one pass over the rows, a row a micro-batch, of which every process has its share.

    Raises:
        LoraMsError: parameters that are not float32.
    """

    def __init__(self, model: nn.Cell, params: dict[str, Parameter], plan: DataPlan, runtime: Runtime, vocab_size: int):
        check_float32(params.values())
        self.params = params
        self.plan = plan
        self.sum_over_data = runtime.data_sum()
        self.scale = FLOAT16_SCALE if model.dtype == ms.float16 else 1.0
        model.set_train(False)  # no dropout
        gradient = GradientSum(list(params.values()), self.scale)
        self.micro_step = MicroStep(SummedLoss(model, vocab_size), gradient)
        self.square = AddSquare(gradient)
        self.is_main = runtime.is_main

    def steps(self, start: int) -> Iterator[int]:
        """Takes the rows from step ``start`` on; yields the number of steps done after each."""
        for step in range(start, self.plan.steps_per_epoch):
            for rows, batch in self.plan.placed(step):
                inputs = tuple(map(Tensor, batch[:4]))
                self.micro_step.prepare(*inputs)
                loss = float(self.micro_step(*inputs).asnumpy())
                if not np.isfinite(loss):
                    raise LoraMsError(f"{self.plan.rows.where(int(rows[0]))}: its loss is {loss}: take this row out")
                self.square(Tensor(1.0 / (batch.label_tokens * self.scale), ms.float32))
            yield step + 1

    def total(self) -> NDArray[np.float32]:
        """[n]: the sum over the rows so far, of all processes; each must call it."""
        total = self.square.total
        return (total if self.sum_over_data is None else self.sum_over_data(Tensor(total))).asnumpy()

    def any_process(self, seen: bool) -> bool:
        """Whether ``seen`` is True in one of the processes; each must call it."""
        if self.sum_over_data is None:
            return seen
        return bool(self.sum_over_data(Tensor([float(seen)], ms.float32)).asnumpy()[0])

    def restore(self, total: NDArray[np.float32]) -> None:
        """Goes on from what ``total`` returned."""
        if self.is_main:  # the others begin with 0
            self.square.total.set_data(Tensor(total))

    def check_same(self, done: int) -> None:
        """Raises LoraMsError where a process goes on from another step than the others; each must call it."""
        if self.sum_over_data is not None:
            both = self.sum_over_data(Tensor([float(done), 1.0], ms.float32)).asnumpy()
            if both[0] != done * both[1]:
                raise LoraMsError("the processes go on from different steps: they must see the same folder")

    def means(self) -> dict[str, NDArray[np.float32]]:
        """The mean over all rows, by parameter.

        Raises:
            LoraMsError: one that is not finite.
        """
        values = self.total() / np.float32(len(self.plan.rows))
        ends = np.cumsum([p.size for p in self.params.values()])[:-1]
        pieces = zip(self.params.items(), np.split(values, ends), strict=True)
        found = {name: piece.reshape(p.shape) for (name, p), piece in pieces}
        odd = [name for name, value in found.items() if not np.isfinite(value).all()]
        if odd:
            raise LoraMsError(f"the squared gradient of {odd[0]} is not finite: compute in float32")
        return found
