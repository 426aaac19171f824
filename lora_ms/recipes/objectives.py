"""The further terms of the loss that a configuration asks for, as part of the training steps."""

from collections.abc import Sequence

from mindspore import Parameter, nn

from lora_ms.objectives.base import ObjectiveKeys, Start
from lora_ms.train.hooks import Observer
from lora_ms.train.objectives import Objective


class ConfiguredTerms:
    """The terms that are functions of the trained parameters (a ``train.hooks.StepHook``).

    Args:
        model: with the parameters that training begins with.
    """

    def __init__(self, keys: Sequence[ObjectiveKeys], model: nn.Cell):
        self.keys = keys
        trained = {name: p for name, p in model.parameters_and_names() if p.requires_grad}
        self.start = Start(list(trained), list(trained.values()))

    def objectives(self, params: Sequence[Parameter]) -> list[Objective]:
        terms = [keys.parameter_term(self.start) for keys in self.keys]
        return [term for term in terms if term is not None]

    def observer(self, params: Sequence[Parameter]) -> Observer | None:
        return None

    def after_step(self, step: int) -> None:
        """Nothing."""

    def describe(self) -> str:
        lines = [line for keys in self.keys for line in keys.notes(self.start)]
        shares = " + ".join(f"{keys.weight:g} {keys.type}" for keys in self.keys)
        return "\n".join([f"loss: cross_entropy + {shares}", *lines])

    def summary(self) -> str:
        return ""
