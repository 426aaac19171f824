"""Loss, perplexity and token accuracy of held-out rows."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn

from lora_ms.data.loader import DataPlan
from lora_ms.runtime.device import Runtime
from lora_ms.train.callbacks import Evaluation
from lora_ms.train.layerwise import LabelScores
from lora_ms.train.step import SummedLoss

HIGHEST_LOG = 700.0  # its exponential is still a float


@dataclass(frozen=True)
class Scores:
    """Of all label tokens of a pass over some rows."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share that has the highest logit
    label_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, HIGHEST_LOG))

    def line(self) -> str:
        """For people."""
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.3f}  accuracy {self.accuracy:.1%}  "
            f"on {self.label_tokens:,} label tokens"
        )


class Evaluator:
    """Evaluates a model on the rows of a plan, on all ranks together; its graphs are compiled once.

    Args:
        model: see ``steps.Steps``.
        plan: one pass over the rows.
        vocab_size: rows of the head.
        runtime: the processes that share the rows, and the model.
        sample: answers to fixed prompts, of the model as it is; None for none.
    """

    def __init__(
        self,
        model: nn.Cell,
        plan: DataPlan,
        vocab_size: int,
        runtime: Runtime,
        sample: Callable[[], list[dict[str, str]]] | None = None,
    ):
        self.model, self.plan, self.sample = model, plan, sample
        self.label_scores = LabelScores(SummedLoss(model, vocab_size, runtime.shard))
        self.sum_over_data = runtime.data_sum()

    def scores(self) -> Scores:
        """Of one pass; leaves the model in the mode of use."""
        self.model.set_train(False)
        sums, tokens = np.zeros(2), 0
        for step in range(self.plan.steps_per_epoch):
            batches, label_tokens = self.plan.step(step)
            for batch in batches:
                sums += [float(value.asnumpy()) for value in self.label_scores(*map(Tensor, batch[:4]))]
            tokens += label_tokens
        if self.sum_over_data is not None:
            sums = self.sum_over_data(Tensor(sums.astype(np.float32))).asnumpy()
        return Scores(float(sums[0]) / tokens, float(sums[1]) / tokens, tokens)

    def evaluate(self, step: int, epoch: float, best_loss: float | None) -> Evaluation:
        """After optimiser step ``step``; the best one's loss is below ``best_loss``, of those before."""
        begun, training = time.perf_counter(), self.model.training
        scores = self.scores()
        samples = [] if self.sample is None else self.sample()
        self.model.set_train(training)
        return Evaluation(
            step,
            round(epoch, 4),
            scores.loss,
            scores.perplexity,
            scores.accuracy,
            scores.label_tokens,
            round(time.perf_counter() - begun, 3),
            samples,
            best_loss is None or scores.loss < best_loss,
        )
