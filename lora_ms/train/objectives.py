"""Extra terms of the loss, such as AdaLoRA's orthogonality: functions of the trained parameters.

The loss of an optimiser step is the mean cross-entropy of its label tokens plus the value of each term.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from mindspore import Tensor, nn

CROSS_ENTROPY = "cross_entropy"  # what metrics.jsonl calls the loss without the terms, where there are any


class Objective(Protocol):
    """One term, with its weight in it: an ``nn.Cell``, the trained parameters [n] -> (value [], gradient [n]), all
    float32. The parameters are one flat vector, in the order of the model."""

    name: str  # its key in metrics.jsonl

    def __call__(self, parameters: Tensor) -> Any: ...


class Objectives(nn.Cell):
    """(parameters [n], gradient [n]) -> (gradient with those of the terms [n], value [] of each term …)."""

    def __init__(self, terms: Sequence[Any]):
        super().__init__()
        self.terms = nn.CellList(list(terms))

    def construct(self, parameters: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        values: tuple[Tensor, ...] = ()
        for term in self.terms:
            value, own = term(parameters)
            gradient = gradient + own
            values = values + (value,)
        return (gradient,) + values


def term_names(terms: Sequence[Objective], taken: Sequence[str]) -> list[str]:
    """Their keys in metrics.jsonl, where ``taken`` are keys of other things.

    Raises:
        ValueError: a key that is already there.
    """
    names: list[str] = []
    for term in terms:
        if term.name in (*taken, *names, CROSS_ENTROPY):
            raise ValueError(f"a loss term cannot be named {term.name}: metrics.jsonl has that key already")
        names.append(term.name)
    return names
