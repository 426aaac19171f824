"""Terms that depend on the rows of a step: ``contrastive`` and ``kl_anchor``.

A row's embedding is the mean of the last hidden states, after the norm, from which its label tokens are predicted.
"""

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lora_ms.errors import LoraMsError
from lora_ms.objectives.base import GivenRows, ObjectiveKeys, RowTerm
from lora_ms.text import size_text
from lora_ms.values import Flag, Number

Ints = NDArray[np.int64]
FEWEST_GENERAL = 2  # rows: a softmax over one is 1, whatever its cosine
FEWEST_COMPARED = 3  # rows


class SilentRows:
    """A ``data.loader.TermRows`` whose value is all there is to show."""

    def metrics(self, sums: NDArray[np.float64]) -> dict[str, float]:
        return {}


class ContrastiveKeys(ObjectiveKeys):
    """The mean over pairs of ``-log softmax(cos / temperature)``: of each domain row against all general rows of its
    micro-batch, at the general row that it is paired with. The first domain row of a micro-batch is paired with its
    first general row, the second with the second, and so on while there are both. Where it is ``symmetric``, the mean
    of that and of the same with both kinds changed over, which is CLIP's form of InfoNCE (Radford et al., 2021)."""

    compares_rows: ClassVar[bool] = True

    type: Literal["contrastive"]
    weight: Number = Field(0.1, ge=0)
    temperature: Number = Field(0.07, gt=0)
    symmetric: Flag = False  # general rows are compared with all domain rows, too

    def check_rows(self, general: NDArray[np.bool_], batch_size: int) -> None:
        if general.sum() < FEWEST_GENERAL or general.all():
            raise LoraMsError(
                f"objectives: contrastive needs domain rows and at least {FEWEST_GENERAL} general ones: give both as "
                "parts of train_dataset.mix, the latter with role: general"
            )
        if batch_size < FEWEST_COMPARED:
            raise LoraMsError(
                f"objectives: contrastive compares a domain row with two general ones at least: a batch_size of "
                f"{FEWEST_COMPARED} or more, not {batch_size}"
            )

    def row_term(self, given: GivenRows) -> RowTerm:
        from lora_ms.objectives.row_cells import Contrast

        self.check_rows(given.general, given.batch_size)
        note = f"contrastive: rows are not packed, but compared in micro-batches of {given.batch_size}"
        return RowTerm(Contrast(self.temperature, self.symmetric), PairedRows(given.general, self.weight), note)


class PairedRows(SilentRows):
    """What ``Contrast`` needs of the rows."""

    count = 4

    def __init__(self, general: NDArray[np.bool_], weight: float):
        self.general = general
        self.weight = weight

    def units(self, rows: Ints) -> int:
        """Pairs."""
        general = int(self.general[rows].sum())
        return min(general, len(rows) - general)

    def arrays(self, rows: Ints, label_counts: Ints, capacity: int, scale: float) -> tuple[NDArray, ...]:
        """The row of each slot, -1 for none; whether a row is general; the row it is paired with, -1 for none; scale.

        Rows count in the micro-batch, whose number of slots is above theirs.
        """
        row_of_slot = np.full(capacity, -1, np.int32)
        row_of_slot[: label_counts.sum()] = np.repeat(np.arange(len(rows)), label_counts)
        is_general = np.zeros(capacity, np.float32)
        is_general[: len(rows)] = self.general[rows]
        partner = np.full(capacity, -1, np.int32)
        pairs = self.units(rows)
        of_domain = np.flatnonzero(~self.general[rows])[:pairs]
        partner[of_domain] = np.flatnonzero(self.general[rows])[:pairs]
        return row_of_slot, is_general, partner, np.array([scale * self.weight], np.float32)


class KlAnchorKeys(ObjectiveKeys):
    """The mean over label tokens of KL(start || now) of the next token: how far the answers have moved from those of
    the model that the run starts from. Of the general rows alone, where parts of ``train_dataset.mix`` have that role.
    """

    has_start: ClassVar[bool] = True

    type: Literal["kl_anchor"]

    def row_term(self, given: GivenRows) -> RowTerm:
        from lora_ms.objectives.row_cells import Divergence

        held = given.general if given.general.any() else np.ones_like(given.general)
        rows = np.flatnonzero(held)
        states = given.states(rows)
        size = sum(state.nbytes for state in states)
        anchored = AnchoredRows(held, dict(zip(rows.tolist(), states, strict=True)), self)
        note = f"kl_anchor: {len(rows):,} rows are held to what the model answers now: {size_text(size)} of memory"
        return RowTerm(Divergence(given.head()), anchored, note)


class AnchoredRows(SilentRows):
    """What ``Divergence`` needs of the rows.

    held: [rows], which are looked at. states: of each of these, [its label tokens, h].
    """

    count = 2

    def __init__(self, held: NDArray[np.bool_], states: dict[int, NDArray[np.float32]], keys: KlAnchorKeys):
        self.held = held
        self.states = states
        self.keys = keys
        self.width = next(iter(states.values())).shape[1]
        self.label_counts = np.zeros(len(held), np.int64)
        for row, state in states.items():
            self.label_counts[row] = len(state)

    def units(self, rows: Ints) -> int:
        """Label tokens."""
        return int(self.label_counts[rows].sum())

    def arrays(self, rows: Ints, label_counts: Ints, capacity: int, scale: float) -> tuple[NDArray, ...]:
        """The states of the start [c, h]; what the divergence of each slot is multiplied by [c]."""
        states = np.zeros((capacity, self.width), np.float32)
        factor = np.zeros(capacity, np.float32)
        end = 0
        for row, count in zip(rows.tolist(), label_counts.tolist(), strict=True):
            if self.held[row]:
                states[end : end + count] = self.states[row]
                factor[end : end + count] = scale * self.keys.weight
            end += count
        return states, factor
