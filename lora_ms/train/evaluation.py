"""Loss, perplexity and token accuracy of held-out rows."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from lora_ms.data.loader import DataPlan
from lora_ms.nn.graph import Graph
from lora_ms.runtime.device import Runtime
from lora_ms.train.callbacks import EvaluationRecord
from lora_ms.train.joined_layers import joined_layers
from lora_ms.train.parts import ROTARY_TABLES, Finish, HalfLayers, LayerInputs, ModelParts, SummedLoss
from lora_ms.train.shared_layers import SharedLayers

HIGHEST_LOG = 700.0  # its exponential is still a float


@dataclass(frozen=True)
class Scores:
    """Scores of all label tokens in one pass over some rows."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share that has the highest logit
    label_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, HIGHEST_LOG))

    def line(self) -> str:
        """As one line for the user."""
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.3f}  accuracy {self.accuracy:.1%}  "
            f"on {self.label_tokens:,} label tokens"
        )


class _TopScores(Graph):
    """The last layers and the finish: (x, rope …, visible of each …, rows [c], targets [c]) -> ``LabelScores``' two."""

    title = "the evaluation"

    def __init__(self, half_layers: Sequence[nn.Cell], finish: Finish):
        super().__init__(auto_prefix=False)
        self.half_layers = HalfLayers(half_layers, [True] * len(half_layers))
        self.finish = finish

    def construct(self, x: Tensor, *others) -> tuple[Tensor, Tensor]:
        rope, visible = others[:ROTARY_TABLES], others[ROTARY_TABLES:-2]
        rows, targets = others[-2], others[-1]
        outputs = self.half_layers(x, rope, visible, rows)
        loss, _, right = self.finish.counts(outputs[-1], targets)
        return loss, right


class _TopStates(_TopScores):
    """The same inputs -> the normalised hidden states [c, h] of ``rows``, float32."""

    def construct(self, x: Tensor, *others) -> Tensor:
        rope, visible = others[:ROTARY_TABLES], others[ROTARY_TABLES:-2]
        outputs = self.half_layers(x, rope, visible, others[-2])
        return self.finish.states(outputs[-1]).astype(ms.float32)


class _TopLogProbs(_TopScores):
    """The same inputs -> the log-probabilities of the targets [c], float32."""

    def construct(self, x: Tensor, *others) -> Tensor:
        rope, visible = others[:ROTARY_TABLES], others[ROTARY_TABLES:-2]
        outputs = self.half_layers(x, rope, visible, others[-2])
        return self.finish.label_log_probs(outputs[-1], others[-1])


class _TopComparison(_TopScores):
    """The last layers and a comparison of answers: (x, rope …, visible of each …, rows [c], targets [c], the
    comparison's arrays …) -> what it returns."""

    def __init__(self, half_layers: Sequence[nn.Cell], finish: Finish):
        super().__init__(half_layers, finish)
        self.tail = 2 + finish.extra_inputs  # inputs from rows on

    def construct(self, x: Tensor, *others) -> Tensor:
        rope, visible = others[:ROTARY_TABLES], others[ROTARY_TABLES : -self.tail]
        last = others[-self.tail :]
        outputs = self.half_layers(x, rope, visible, last[0])
        return self.finish(outputs[-1], last[1], *last[2:])


class LabelScores:
    """What an evaluation counts, of the batch that ``SummedLoss`` takes; in the shared graphs of the gradient engine.

    -> (summed cross-entropy [] float32, label tokens that have the highest logit [] float32).
    """

    TOP: type[Graph] = _TopScores

    def __init__(self, loss: SummedLoss):
        self.model = loss.model
        parts = ModelParts(loss.model)
        self.inputs = LayerInputs(loss.model.model)
        joined = joined_layers(loss.model, parts, trains=False)
        self.shared = joined or SharedLayers(parts, [True] * len(parts.half_layers))
        self.top = self.TOP(parts.half_layers[self.shared.top :], loss.finish)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor, *extras: Tensor
    ) -> Any:
        x, rope, visible = self.inputs.by_layer(self.inputs(input_ids, position_ids))
        with self.shared.sharing():
            for block in self.shared.blocks:
                x = block.forward(x, rope, visible)[-1]
        return self.top(x, *rope, *visible[self.shared.top // 2 :], target_index, targets, *extras)


class LabelStates(LabelScores):
    """The normalised hidden states from which the label tokens of a batch are predicted: [c, h] float32."""

    TOP = _TopStates

    def of_rows(self, plan: DataPlan) -> list[np.ndarray]:
        """Of each row of a plan of one pass, [its label tokens, …]; the model is left as ``set_train(False)``."""
        self.model.set_train(False)
        found: list[np.ndarray] = [np.empty(0)] * len(plan.rows)
        for step in range(plan.steps_per_epoch):
            for rows, batch in plan.placed(step):
                states = self(*map(Tensor, batch[:4])).asnumpy()
                ends = np.cumsum(plan.rows.label_counts[rows])
                for row, part in zip(rows, np.split(states[: ends[-1]], ends[:-1]), strict=True):
                    found[int(row)] = part.copy()
        return found


class LabelLogProbs(LabelStates):
    """The log-probabilities of the label tokens of a batch: [c] float32."""

    TOP = _TopLogProbs


class LabelComparisons(LabelScores):
    """What the comparison of a ``SummedLoss`` makes of a batch with its arrays, as a step sums it up."""

    TOP = _TopComparison


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
        self.model = model
        self.plan = plan
        self.sample = sample
        self.label_scores = LabelScores(SummedLoss(model, vocab_size, runtime.shard))
        self.sum_over_data = runtime.data_sum()

    def scores(self) -> Scores:
        """The scores of one pass over the rows; the model is left as ``set_train(False)``."""
        self.model.set_train(False)
        sums = np.zeros(2)
        tokens = 0
        for step in range(self.plan.steps_per_epoch):
            batches, label_tokens = self.plan.step(step)
            for batch in batches:
                sums += [float(value.asnumpy()) for value in self.label_scores(*map(Tensor, batch[:4]))]
            tokens += label_tokens
        if self.sum_over_data is not None:
            sums = self.sum_over_data(Tensor(sums.astype(np.float32))).asnumpy()
        return Scores(loss=float(sums[0]) / tokens, accuracy=float(sums[1]) / tokens, label_tokens=tokens)

    def shown(self) -> dict[str, Any]:
        """The scores as fields of ``EvaluationRecord``."""
        scores = self.scores()
        return {
            "eval_loss": scores.loss,
            "eval_perplexity": scores.perplexity,
            "eval_accuracy": scores.accuracy,
            "eval_label_tokens": scores.label_tokens,
        }

    def evaluate(self, step: int, epoch: float, best_loss: float | None) -> EvaluationRecord:
        """After optimiser step ``step``; the best one's loss is below ``best_loss``, of those before."""
        begun = time.perf_counter()
        training = self.model.training
        shown = self.shown()
        samples = [] if self.sample is None else self.sample()
        self.model.set_train(training)
        return EvaluationRecord(
            step=step,
            epoch=round(epoch, 4),
            **shown,
            eval_time_s=round(time.perf_counter() - begun, 3),
            samples=samples,
            best=math.isfinite(shown["eval_loss"]) and (best_loss is None or shown["eval_loss"] < best_loss),
        )


class PreferenceEvaluator(Evaluator):
    """Evaluates a model on held-out rows of preferences: the loss that it is trained by, and what a step shows of it.

    Args:
        plan: one pass over the rows, whose only term is that of ``comparison``.
        comparison: as ``SummedLoss`` takes it.
        others: as of ``Evaluator``.
    """

    def __init__(
        self,
        model: nn.Cell,
        plan: DataPlan,
        vocab_size: int,
        runtime: Runtime,
        sample: Callable[[], list[dict[str, str]]] | None = None,
        *,
        comparison: Any,
    ):
        super().__init__(model, plan, vocab_size, runtime, sample)
        self.comparisons = LabelComparisons(SummedLoss(model, vocab_size, runtime.shard, comparison=comparison))
        self.further = comparison.SUMS

    def shown(self) -> dict[str, Any]:
        self.model.set_train(False)
        sums = np.zeros(1 + self.further)  # the loss of all rows, and the further sums
        tokens = 0
        for step in range(self.plan.steps_per_epoch):
            batches, label_tokens = self.plan.step(step)
            # a batch's loss is a mean over the rows of the step, times its label tokens
            rows_by_tokens = len(self.plan.step_rows(step)) / label_tokens
            for batch in batches:
                found = self.comparisons(*map(Tensor, (*batch[:4], *batch.extras))).asnumpy().astype(np.float64)
                found[0] *= rows_by_tokens
                sums += found
            tokens += label_tokens
        if self.sum_over_data is not None:
            sums = self.sum_over_data(Tensor(sums.astype(np.float32))).asnumpy().astype(np.float64)
        metrics = self.plan.terms[0].metrics(sums[1:])
        return {
            "eval_loss": float(sums[0]) / len(self.plan),
            "eval_perplexity": None,
            "eval_accuracy": None,
            "eval_label_tokens": tokens,
            "metrics": {f"eval_{name}": value for name, value in metrics.items() if np.isfinite(value)},
        }
