"""What a further term of the loss is: its keys in a YAML, and what is made of them.

A term is a subclass of ``ObjectiveKeys`` in a module that imports no MindSpore, a cell in another, and a line of
``OBJECTIVES``. There are three kinds:

    a function of the trained parameters   ``parameter_term``: its gradient is added once a step, by the optimiser
    a function of the rows                 ``row_term``: differentiated with the cross-entropy, in every micro-batch
    a comparison of answers                ``preference_term``: the same, in the place of the cross-entropy

``weight`` multiplies a term; what metrics.jsonl shows, and the sum that is the loss, has it in it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lora_ms.values import Number, Section

if TYPE_CHECKING:
    from mindspore import Parameter, nn


Preferences = Literal["none", "pairs", "labelled"]  # rows of two answers, and of one with a label


class Start(NamedTuple):
    """The parameters that train, in the order of the model, with the values that training begins with."""

    names: Sequence[str]  # dotted paths
    params: Sequence["Parameter"]


class GivenRows(NamedTuple):
    """The rows of a run, and what the model makes of them before it is trained."""

    general: NDArray[np.bool_]  # [rows]: whether it is one that is not to be forgotten, by its part of the mix
    label_counts: NDArray[np.int64]  # [rows]
    batch_size: int  # rows of a micro-batch, where they are not packed
    states: Callable[[NDArray[np.int64]], list[NDArray[np.float32]]]  # rows -> of each [label tokens, h], normalised
    head: Callable[[], NDArray[np.float32] | None]  # [v, h]; None where it is not trained


class Answers(NamedTuple):
    """The rows of a run with preferences: two answers each."""

    label_counts: NDArray[np.int64]  # [rows, 2]: tokens of each answer
    liked: NDArray[np.bool_]  # [rows]: whether the first one is
    batch_size: int  # rows of a micro-batch, where they are not packed
    references: NDArray[np.float64] | None  # [rows, 2]: log-likelihoods before training, without an adapter


class RowTerm(NamedTuple):
    """A term as a function of the rows: the cell that ``train.parts.SummedLoss`` takes, and what it needs of them."""

    cell: "nn.Cell"
    rows: Any  # a data.loader.TermRows
    note: str = ""  # what the user should know before the first step


class ObjectiveKeys(Section):
    """The keys that all terms share."""

    compares_rows: ClassVar[bool] = False  # with others of their micro-batch, which is then batch_size of them
    preferences: ClassVar[Preferences] = "none"  # rows that it learns from, where not any
    has_reference: ClassVar[bool] = False  # whether it needs ``Answers.references``
    has_start: ClassVar[bool] = False  # whether it compares with the model that the run starts from

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

    def check_rows(self, general: NDArray[np.bool_], batch_size: int) -> None:
        """Raises LoraMsError for rows such as the term cannot be computed of; arguments as in ``GivenRows``."""

    def row_term(self, given: "GivenRows") -> "RowTerm | None":
        """The term as a function of the rows; None for a function of the parameters.

        Raises:
            LoraMsError: the rows are not such as the term needs.
        """
        return None

    def preference_term(self, answers: "Answers") -> RowTerm | None:
        """The term as a comparison of answers; None if it does not compare any.

        Raises:
            LoraMsError: the rows are not such as the term needs.
        """
        return None

    def notes(self, start: Start) -> list[str]:
        """What the user should know before the first step, in lines."""
        return []


def preferences_of(terms: Sequence[ObjectiveKeys]) -> Preferences:
    """Which rows of preferences ``terms`` learn from."""
    return next((term.preferences for term in terms if term.preferences != "none"), "none")
