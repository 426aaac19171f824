"""What a further term of the loss is: its keys in a YAML, and what is made of them.

A term is a subclass of ``ObjectiveKeys`` in a module that imports no MindSpore, a cell in another, and a line of
``OBJECTIVES``. There are two kinds:

    a function of the trained parameters   ``parameter_term``: its gradient is added once a step, by the optimiser
    a function of the rows                 ``row_term``: differentiated with the cross-entropy, in every micro-batch

``weight`` multiplies a term; what metrics.jsonl shows, and the sum that is the loss, has it in it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from lora_ms.values import Number, Section

if TYPE_CHECKING:
    from mindspore import Parameter, nn


class Start(NamedTuple):
    """The parameters that train, in the order of the model, with the values that training begins with."""

    names: Sequence[str]  # dotted paths
    params: Sequence["Parameter"]


class ObjectiveKeys(Section):
    """The keys that all terms share."""

    type: str
    weight: Number = Field(1.0, ge=0)  # what the term is multiplied by

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share, as JSON values."""
        return self.model_dump(mode="json", by_alias=True)

    def check(self) -> None:
        """Raises LoraMsError for what is wrong with the files that the keys name."""

    def parameter_term(self, start: Start) -> "nn.Cell | None":
        """A ``train.objectives.Objective``; None for a function of the rows.

        Raises:
            LoraMsError: the keys do not suit what is trained.
        """
        return None

    def notes(self, start: Start) -> list[str]:
        """What the user should know before the first step, in lines."""
        return []
