"""Losses that learn from preferences: ``dpo``, ``orpo``, ``simpo`` and ``kto``. They take the cross-entropy's place.

A row is two answers, one after the other: the liked one and the other, or, of ``kto``, the answer that is judged and
the one of another row to the same question. log π is the log-likelihood of an answer, which starts after its question,
and log r the same before training, without an adapter.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lora_ms.errors import LoraMsError
from lora_ms.objectives.base import Answers, ObjectiveKeys, Preferences, RowTerm
from lora_ms.values import Number

if TYPE_CHECKING:
    from mindspore import nn

Ints = NDArray[np.int64]
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class PreferenceKeys(ObjectiveKeys):
    """The keys that all of them share."""

    has_reference: ClassVar[bool] = True  # whether log r is in the formula

    weight: Literal[1] = 1  # it is the loss itself
    beta: Number = Field(0.1, gt=0)  # what a reward is multiplied by

    def cell(self) -> "nn.Cell":
        """The formula, a ``preference_cells.Comparison``."""
        raise NotImplementedError

    def importance(self, liked: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[rows]: what the loss of a row is multiplied by."""
        return np.ones(len(liked), np.float32)

    def preference_term(self, answers: Answers) -> RowTerm:
        references = answers.references
        if references is None:
            references = np.zeros(answers.label_counts.shape)
        rows = ComparedRows(answers, references, self.importance(answers.liked), self.preferences == "labelled")
        return RowTerm(self.cell(), rows)


class DpoKeys(PreferenceKeys):
    """Direct preference optimisation (Rafailov et al., 2023): ``-log σ(margin)``, where margin is the chosen answer's
    reward less the other's, and a reward is beta (log π - log r)."""

    preferences: ClassVar[Preferences] = "pairs"

    type: Literal["dpo"]
    label_smoothing: Number = Field(0.0, ge=0, lt=0.5)  # share of the rows that are taken to be the wrong way round
    sft_weight: Number = Field(0.0, ge=0)  # of the chosen answer's mean cross-entropy, which is added

    def cell(self) -> "nn.Cell":
        from lora_ms.objectives.preference_cells import Dpo

        return Dpo(self.beta, self.label_smoothing, self.sft_weight)


class OrpoKeys(PreferenceKeys):
    """Odds ratio preference optimisation (Hong et al., 2024), without a reference: the chosen answer's mean
    cross-entropy, and beta times ``-log σ`` of the log odds ratio, with log π as a mean over an answer's tokens."""

    preferences: ClassVar[Preferences] = "pairs"
    has_reference: ClassVar[bool] = False

    type: Literal["orpo"]

    def cell(self) -> "nn.Cell":
        from lora_ms.objectives.preference_cells import Orpo

        return Orpo(self.beta)


class SimpoKeys(PreferenceKeys):
    """Simple preference optimisation (Meng et al., 2024), without a reference: ``-log σ(margin - gamma)``, where a
    reward is beta log π, as a mean over an answer's tokens."""

    preferences: ClassVar[Preferences] = "pairs"
    has_reference: ClassVar[bool] = False

    type: Literal["simpo"]
    beta: Number = Field(2.0, gt=0)
    gamma: Number = Field(1.0, ge=0)  # margin that is aimed at
    label_smoothing: Number = Field(0.0, ge=0, lt=0.5)
    sft_weight: Number = Field(0.0, ge=0)

    def cell(self) -> "nn.Cell":
        from lora_ms.objectives.preference_cells import Simpo

        return Simpo(self.beta, self.gamma, self.label_smoothing, self.sft_weight)


class KtoKeys(PreferenceKeys):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024), of single answers: ``1 - σ(±(reward - z))`` with + for
    an answer that is liked; z is beta times the mean of log π - log r over the other rows' answers of the micro-batch,
    0 at least, and has no gradient."""

    preferences: ClassVar[Preferences] = "labelled"
    compares_rows: ClassVar[bool] = True

    type: Literal["kto"]
    desirable_weight: Number = Field(1.0, ge=0)  # of answers that are liked
    undesirable_weight: Number = Field(1.0, ge=0)

    def cell(self) -> "nn.Cell":
        from lora_ms.objectives.preference_cells import Kto

        return Kto(self.beta)

    def importance(self, liked: NDArray[np.bool_]) -> NDArray[np.float32]:
        return np.where(liked, self.desirable_weight, self.undesirable_weight).astype(np.float32)

    def check_rows(self, general: NDArray[np.bool_], batch_size: int) -> None:
        if batch_size < 2:
            raise LoraMsError("objectives: kto compares the rows of a micro-batch: a batch_size of 2 or more, not 1")

    def preference_term(self, answers: Answers) -> RowTerm:
        self.check_rows(np.zeros(len(answers.liked), bool), answers.batch_size)
        found = super().preference_term(answers)
        return found._replace(note=f"kto: rows are not packed, but compared in micro-batches of {answers.batch_size}")


class ComparedRows:
    """What a ``preference_cells.Comparison`` needs of the rows (a ``data.loader.TermRows``).

    references: [rows, 2]. importance: [rows]. judged: the first answer of a row alone is, by its label.
    """

    count = 4

    def __init__(
        self, answers: Answers, references: NDArray[np.float64], importance: NDArray[np.float32], judged: bool
    ):
        self.label_counts = answers.label_counts
        liked = answers.liked if judged else np.ones(len(answers.liked), bool)
        disliked = ~answers.liked if judged else np.ones(len(answers.liked), bool)
        columns = [references, answers.label_counts, liked[:, None], disliked[:, None], importance[:, None]]
        self.table = np.concatenate(columns, 1).astype(np.float32)

    def units(self, rows: Ints) -> int:
        return len(rows)

    def arrays(self, rows: Ints, label_counts: Ints, capacity: int, scale: float) -> tuple[NDArray, ...]:
        """The row of each slot; whether a slot is the first answer's, and the second's; of each row its references,
        lengths, whether its reward counts as a chosen and as a rejected one, and the factor of its loss.

        Rows count in the micro-batch, whose number of slots is above theirs.
        """
        lengths = self.label_counts[rows].reshape(-1)
        used = int(lengths.sum())
        row_of_slot = np.zeros(capacity, np.int32)
        row_of_slot[:used] = np.repeat(np.arange(len(lengths)) // 2, lengths)
        second = np.repeat(np.arange(len(lengths)) % 2, lengths)
        answers = np.zeros((2, capacity), np.float32)
        answers[0, :used] = 1 - second
        answers[1, :used] = second
        table = np.zeros((capacity, self.table.shape[1]), np.float32)
        table[:, 2:4] = 1  # nothing is divided by 0
        table[: len(rows)] = self.table[rows]
        table[:, -1] *= scale
        return row_of_slot, *answers, table

    def metrics(self, sums: NDArray[np.float64]) -> dict[str, float]:
        """What is shown of a step, by what its micro-batches' cells have summed up."""
        chosen, rejected, right = (total / count if count else 0.0 for total, count in sums.reshape(3, 2).tolist())
        return dict(zip(METRICS, (chosen, rejected, chosen - rejected, right), strict=True))
