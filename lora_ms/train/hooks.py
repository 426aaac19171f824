"""What a method of adapting a model may add to the steps of a run."""

from collections.abc import Sequence
from typing import Any, Protocol

from mindspore import Parameter, Tensor

from lora_ms.train.objectives import Objective


class Observer(Protocol):
    """An ``nn.Cell`` that is shown what each optimiser step did, in the optimiser's graph."""

    def state(self) -> dict[str, Parameter]:
        """What a checkpoint keeps of it, beside the optimiser's state."""

    def __call__(self, parameters: Tensor, gradient: Tensor, taken: Tensor) -> Any:
        """parameters [n]: the new ones; gradient [n]: as the step used it, clipped; taken []: 1, or 0 where the
        gradient was not finite and the step changed nothing."""


class StepHook(Protocol):
    """Part of a training run, such as AdaLoRA's allocation of ranks.

    ``params`` are the trainable parameters, in the order of the model and of the optimiser's flat vectors.
    ``objectives`` and then ``observer`` are called once, before the first step.
    """

    def objectives(self, params: Sequence[Parameter]) -> Sequence[Objective]:
        """Extra terms of the loss."""

    def observer(self, params: Sequence[Parameter]) -> Observer | None:
        """The hook's observer; None if it has none."""

    def after_step(self, step: int) -> None:
        """Called when optimiser step ``step`` (from 0) is on the device."""

    def describe(self) -> str:
        """What it will do, in one line for the user."""

    def summary(self) -> str:
        """What it has done, in one line for the user."""
