"""The further terms of the loss that ``objectives`` ask for, as part of the training steps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from mindspore import Parameter, nn
from numpy.typing import NDArray

from lora_ms.config import RunConfig, load_config
from lora_ms.data.loader import DataPlan
from lora_ms.models.decoder import CausalLM
from lora_ms.nn.graph import Graph
from lora_ms.objectives.base import Answers, GivenRows, ObjectiveKeys, RowTerm, Start, preferences_of
from lora_ms.recipes.data import PreparedRows, held_out_plan
from lora_ms.runtime.device import Runtime
from lora_ms.train.evaluation import LabelLogProbs, LabelStates
from lora_ms.train.hooks import Observer, StepHook
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


Terms = Sequence[ObjectiveKeys]


def terms_of(objectives: Sequence[Mapping[str, Any]]) -> Terms:
    """The terms of a list as the key ``objectives`` of a YAML has it.

    Raises:
        LoraMsError: an unknown type or key, a value out of range, terms that exclude each other, or files that are
            wrong.
    """
    found = load_config(None, flags={"objectives": [dict(keys) for keys in objectives]}).objectives
    for keys in found:
        keys.check()
    return found


class AddedTerms(NamedTuple):
    """What ``objectives`` add to a run: arguments of ``NativeRun``, and lines for the user."""

    plan: DataPlan
    hooks: list[StepHook]
    row_terms: list[nn.Cell]
    comparison: nn.Cell | None
    lines: list[str]


def add_terms(
    terms: Terms,
    model: CausalLM,
    plan: DataPlan,
    rows: PreparedRows,
    *,
    references: NDArray[np.float64] | None,
    general: NDArray[np.bool_],
    tokenizer: Any,
    runtime: Runtime,
) -> AddedTerms:
    """The terms of a run of ``plan``. The model has the parameters that training begins with.

    Args:
        references: ``reference_log_probs`` of ``rows``.
        general: see ``GivenRows``.

    Raises:
        LoraMsError: what is trained, or the rows, are not such as a term needs.
    """
    if not terms:
        return AddedTerms(plan, [], [], None, [])
    configured = ConfiguredTerms(terms, model)
    compared = preference_term(terms, rows, plan.usual_lines, references)
    of_rows = row_terms(terms, model, plan, general, tokenizer, runtime) if compared is None else [compared]
    lines = [configured.describe(), *(term.note for term in of_rows if term.note)]
    return AddedTerms(
        plan=replace(plan, terms=[term.rows for term in of_rows]),
        hooks=[configured],
        row_terms=[term.cell for term in of_rows if term is not compared],
        comparison=None if compared is None else compared.cell,
        lines=lines,
    )


def reference_log_probs(
    terms: Terms, model: CausalLM, rows: PreparedRows, batch_size: int, tokenizer: Any, runtime: Runtime
) -> NDArray[np.float64] | None:
    """[rows, 2] of ``Answers.references``; None where no term needs them. ``model`` has no adapter yet.

    One pass over the rows here costs less than one in every step: a third of a step's work, once and not in each epoch.
    """
    if not any(keys.has_reference for keys in terms):
        return None
    length = int(rows.store.input_lengths.max())
    alone = Runtime(runtime.device)  # each process needs all of them
    plan = held_out_plan(rows.store, batch_size, tokenizer, length, alone)
    if runtime.is_main:
        print(f"reference: the model without an adapter scores {len(rows.store):,} answers", flush=True)
    log_probs = LabelLogProbs(SummedLoss(model, model.config.vocab_size)).of_rows(plan)
    return np.array([one.astype(np.float64).sum() for one in log_probs]).reshape(-1, rows.unit)


def preference_term(
    terms: Terms, rows: PreparedRows, batch_size: int, references: NDArray[np.float64] | None
) -> RowTerm | None:
    """What takes the cross-entropy's place; None where nothing does.

    batch_size: rows of a micro-batch, where they are not packed.

    Raises:
        LoraMsError: the rows are not such as it needs.
    """
    if preferences_of(terms) == "none":
        return None
    counts = rows.store.label_counts.reshape(-1, rows.unit)
    liked = rows.store.columns.liked[:: rows.unit].astype(bool)
    answers = Answers(counts, liked, batch_size, references)
    found = [keys.preference_term(answers) for keys in terms]
    return next(term for term in found if term is not None)


class _HeadWeight(Graph):
    """The head [v, h], as the model multiplies by it."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.outputs = model.outputs()

    def construct(self):
        return self.outputs.head_weight()


def general_rows(config: RunConfig, rows: PreparedRows) -> NDArray[np.bool_]:
    """[rows] bool: whether each is of a part of ``train_dataset.mix`` whose role is general."""
    if not rows.shares:
        return np.zeros(rows.units, bool)
    roles = [part.role == "general" for part in config.train_dataset.mix]
    return np.repeat(roles, [share.rows for share in rows.shares])


def check_rows(config: RunConfig, rows: PreparedRows, lines: int) -> None:
    """Raises LoraMsError where a term cannot be computed of ``rows``, so many to a micro-batch."""
    general = general_rows(config, rows)
    for keys in config.objectives:
        keys.check_rows(general, lines)


def row_terms(
    terms: Terms, model: CausalLM, plan: DataPlan, general: NDArray[np.bool_], tokenizer: Any, runtime: Runtime
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

    given = GivenRows(general, plan.rows.label_counts, plan.usual_lines, states=states, head=head)
    found = [keys.row_term(given) for keys in terms]
    return [term for term in found if term is not None]
