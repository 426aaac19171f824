"""The cells of ``preference_terms``: from the log-probabilities of a micro-batch's targets to a loss.

Shapes: c label slots. Rows of the micro-batch, which have two answers each, are counted in c places.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

CERTAIN = -1e-6  # a mean log-probability above it, of an answer that is certain, has no odds


class Comparison(nn.Cell):
    """log-probabilities [c], row of a slot [c], whether it is the first answer's, and the second's [c], table [c, 7]
    -> [7]: the loss; and six sums that have no gradient, three times a total and its count: of rewards of chosen
    answers, of rejected ones, and of rows that are ranked as they should.

    table: see ``ComparedRows.arrays``.
    """

    name = ""
    count = 4
    SUMS = 6

    def __init__(self, beta: float, label_smoothing: float = 0.0, sft_weight: float = 0.0):
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.sft_weight = sft_weight
        self.softplus = ops.Softplus()

    def rewards(self, first: Tensor, second: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """The rewards of both answers of each row [c], from the sums of their log-probabilities [c]."""
        return self.beta * (first - table[:, 0]), self.beta * (second - table[:, 1])

    def ranked(self, margin: Tensor) -> Tensor:
        """``-log σ(margin)``, but for the rows that are taken to be the wrong way round."""
        found = (1.0 - self.label_smoothing) * self.softplus(-margin)
        if self.label_smoothing > 0:
            found = found + self.label_smoothing * self.softplus(margin)
        return found

    def losses(self, first: Tensor, second: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        """For each row [c]: the loss, both rewards, and how far the row is ranked as it should be."""
        raise NotImplementedError

    def construct(self, log_probs: Tensor, row: Tensor, is_first: Tensor, is_second: Tensor, table: Tensor) -> Tensor:
        places = log_probs.shape[0]
        first = ops.unsorted_segment_sum(log_probs * is_first, row, places)
        second = ops.unsorted_segment_sum(log_probs * is_second, row, places)
        loss, chosen, rejected, margin = self.losses(first, second, table)
        if self.sft_weight > 0:
            loss = loss - self.sft_weight * first / table[:, 2]
        of_chosen, of_rejected = table[:, 4], table[:, 5]
        rows = ops.maximum(of_chosen, of_rejected)
        right = (margin > 0).astype(ms.float32) * rows
        sums = [chosen * of_chosen, of_chosen, rejected * of_rejected, of_rejected, right, rows]
        value = (loss * table[:, 6]).sum()
        return ops.stack([value] + [ops.stop_gradient(one.sum()) for one in sums])


class Dpo(Comparison):
    """``-log σ(margin)`` of rewards against the reference."""

    name = "dpo"

    def losses(self, first: Tensor, second: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        chosen, rejected = self.rewards(first, second, table)
        margin = chosen - rejected
        return self.ranked(margin), chosen, rejected, margin


class Simpo(Comparison):
    """``-log σ(margin - gamma)`` of mean log-probabilities."""

    name = "simpo"

    def __init__(self, beta: float, gamma: float, label_smoothing: float = 0.0, sft_weight: float = 0.0):
        super().__init__(beta, label_smoothing, sft_weight)
        self.gamma = gamma

    def losses(self, first: Tensor, second: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        chosen, rejected = self.beta * first / table[:, 2], self.beta * second / table[:, 3]
        margin = chosen - rejected
        return self.ranked(margin - self.gamma), chosen, rejected, margin


class Orpo(Comparison):
    """``-log π(chosen) - beta log σ(log odds ratio)`` of mean log-probabilities."""

    name = "orpo"

    def losses(self, first: Tensor, second: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        chosen, rejected = first / table[:, 2], second / table[:, 3]
        odds = self.log_odds(chosen) - self.log_odds(rejected)
        return self.beta * self.ranked(odds) - chosen, self.beta * chosen, self.beta * rejected, chosen - rejected

    def log_odds(self, log_prob: Tensor) -> Tensor:
        """log p / (1 - p)."""
        below = ops.minimum(log_prob, Tensor(CERTAIN, ms.float32))
        return log_prob - ops.log(-ops.expm1(below))


class Kto(Comparison):
    """``1 - σ(±(reward - z))``; the second answers, which belong to other rows, make z."""

    name = "kto"

    def losses(self, first: Tensor, second: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        reward, others = self.rewards(first, second, table)
        rows = table[:, 4] + table[:, 5]
        z = ops.maximum((others * rows).sum() / rows.sum(), Tensor(0.0, ms.float32))
        gain = (reward - ops.stop_gradient(z)) * (table[:, 4] - table[:, 5])
        return 1.0 - ops.sigmoid(gain), reward, reward, gain
