"""The further terms of the loss that a configuration asks for, as part of the training steps."""

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, nn

from lora_ms.config import RunConfig
from lora_ms.data.loader import DataPlan, Source
from lora_ms.models.decoder import CausalLM
from lora_ms.nn.graph import Graph
from lora_ms.objectives.base import Answers, GivenRows, ObjectiveKeys, RowTerm, Start
from lora_ms.recipes.data import PreparedRows, held_out_plan
from lora_ms.runtime.device import Runtime
from lora_ms.train.evaluation import LabelLogProbs, LabelStates
from lora_ms.train.hooks import Observer
from lora_ms.train.objectives import CROSS_ENTROPY, Objective
from lora_ms.train.parts import SummedLoss


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
        """In the order of the configuration."""
        terms = [keys.parameter_term(self.start) for keys in self.keys]
        return [term for term in terms if term is not None]

    def observer(self, params: Sequence[Parameter]) -> Observer | None:
        return None

    def after_step(self, step: int) -> None:
        """Nothing."""

    def describe(self) -> str:
        lines = [line for keys in self.keys for line in keys.notes(self.start)]
        compared = next((keys.type for keys in self.keys if keys.preferences != "none"), "")
        others = [f"{keys.weight:g} {keys.type}" for keys in self.keys if keys.type != compared]
        return "\n".join([f"loss: {' + '.join([compared or CROSS_ENTROPY, *others])}", *lines])

    def summary(self) -> str:
        return ""


def reference_log_probs(
    config: RunConfig, model: CausalLM, rows: PreparedRows, tokenizer, runtime: Runtime
) -> np.ndarray | None:
    """[rows, 2] of ``Answers.references``; None where no term needs them. ``model`` has no adapter yet.

    One pass over the rows here costs less than one in every step: a third of a step's work, once and not in each epoch.
    """
    if not any(keys.has_reference for keys in config.objectives):
        return None
    length = int(rows.store.input_lengths.max())
    alone = Runtime(runtime.device)  # each process needs all of them
    plan = held_out_plan(rows.store, config.batch_size, tokenizer, length, alone)
    if runtime.is_main:
        print(f"reference: the model without an adapter scores {len(rows.store):,} answers", flush=True)
    log_probs = LabelLogProbs(SummedLoss(model, model.config.vocab_size)).of_rows(plan)
    return np.array([one.astype(np.float64).sum() for one in log_probs]).reshape(-1, rows.unit)


def preference_term(config: RunConfig, rows: PreparedRows, references: np.ndarray | None) -> RowTerm | None:
    """What takes the cross-entropy's place; None where nothing does.

    Raises:
        LoraMsError: the rows are not such as it needs.
    """
    if config.preferences == "none":
        return None
    counts = rows.store.label_counts.reshape(-1, rows.unit)
    liked = rows.store.columns.liked[:: rows.unit].astype(bool)
    answers = Answers(counts, liked, config.batch_size, references)
    found = [keys.preference_term(answers) for keys in config.objectives]
    return next(term for term in found if term is not None)


class _HeadWeight(Graph):
    """The head [v, h], as the model multiplies by it."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self):
        return self.model.head_weight()


def general_rows(config: RunConfig, plan: DataPlan, shares: Sequence[Source]) -> np.ndarray:
    """[rows] bool: whether each is of a part of ``train_dataset.mix`` whose role is general."""
    if not shares:
        return np.zeros(len(plan.rows), bool)
    roles = [part.role == "general" for part in config.train_dataset.mix]
    return np.repeat(roles, [share.rows for share in shares])


def row_terms(
    config: RunConfig, model: CausalLM, plan: DataPlan, shares: Sequence[Source], tokenizer, runtime: Runtime
) -> list[RowTerm]:
    """The terms that depend on the rows. The model has the parameters that training begins with.

    Raises:
        LoraMsError: the rows are not such as a term needs.
    """

    def states(rows: np.ndarray) -> list[np.ndarray]:
        alone = Runtime(runtime.device)  # each process needs all of them
        length = max(shape.length for shape in plan.layout.shapes)
        passed = held_out_plan(plan.rows.take(rows), plan.usual_lines, tokenizer, length, alone)
        return LabelStates(SummedLoss(model, model.config.vocab_size)).of_rows(passed)

    def head() -> np.ndarray | None:
        trained = any(p.requires_grad for p in model.lm_head.get_parameters())
        return _HeadWeight(model)().asnumpy().astype(np.float32) if trained else None

    given = GivenRows(
        general_rows(config, plan, shares), plan.rows.label_counts, plan.usual_lines, states=states, head=head
    )
    found = [keys.row_term(given) for keys in config.objectives]
    return [term for term in found if term is not None]
