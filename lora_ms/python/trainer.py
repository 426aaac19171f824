"""Training from Python, with transformers' names."""

import difflib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from lora_ms import saving
from lora_ms.adapters.peft_files import ADAPTER_FILES
from lora_ms.data.pipeline import Preparation, prepare_rows, read
from lora_ms.data.report import Tally
from lora_ms.data.tokenizer import save_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.infer.interrupt import interruptible
from lora_ms.models.hub import NUMPY_DTYPES, quantised_layers, save_directory
from lora_ms.python.arguments import TrainingArguments
from lora_ms.python.model import ModelForCausalLM
from lora_ms.python.peft_model import PeftModel
from lora_ms.python.rows import prepared
from lora_ms.recipes import data
from lora_ms.recipes.download import local_rows
from lora_ms.recipes.estimate import fitting
from lora_ms.recipes.evaluate import evaluator_of
from lora_ms.recipes.objectives import Terms, add_terms, preferences_of, reference_log_probs
from lora_ms.recipes.outputs import weights_of
from lora_ms.recipes.train import NativeRun, closing_lines, train
from lora_ms.runtime import device
from lora_ms.runtime.device import Runtime
from lora_ms.train import checkpoint, trackers
from lora_ms.train.callbacks import EvaluationRecord, RunState, StepRecord, TrainerCallback
from lora_ms.train.evaluation import Evaluator
from lora_ms.train.log import locked_output
from lora_ms.train.loop import Outcome
from lora_ms.train.notebook import show_picture
from lora_ms.train.report import fields_of
from lora_ms.train.settings import TrainSettings

# of transformers' Trainer; None there is none here either
NO_EFFECT = ("compute_metrics", "preprocess_logits_for_metrics", "model_init", "optimizer_cls_and_kwargs")
REFUSED = {
    "data_collator": "rows are padded and packed here; tokenise with labels, or give rows of text",
    "compute_loss_func": "the loss is the cross-entropy of the labels, or what args.objectives name",
    "optimizers": "the optimiser is AdamW by TrainingArguments",
}


@dataclass
class TrainerState:
    """How far a trainer has come."""

    global_step: int = 0  # optimiser steps that are done
    max_steps: int = 0  # of the run
    epoch: float = 0.0
    num_train_epochs: float = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)  # the records of metrics.jsonl
    best_metric: float | None = None  # the lowest evaluation loss
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None  # its weights


@dataclass(frozen=True, repr=False)
class TrainOutput(Outcome):
    """How a run ended, by transformers' names as well."""

    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def global_step(self) -> int:
        return self.steps

    @property
    def training_loss(self) -> float:
        """Mean loss of the steps of this run."""
        return sum(self.losses) / max(len(self.losses), 1)

    def __repr__(self) -> str:
        stopped = ", stopped" if self.stopped else ""
        losses = f", loss {self.first_loss:.4f} -> {self.last_loss:.4f}" if self.losses else ""
        return f"TrainOutput(global_step={self.steps}, training_loss={self.training_loss:.4f}{losses}{stopped})"


class _History(TrainerCallback):
    """Keeps ``TrainerState``."""

    def __init__(self, state: TrainerState, every: int):
        self.state = state
        self.every = every

    def on_train_begin(self, state: RunState) -> None:
        self.state.global_step = state.step
        self.state.max_steps = state.total_steps

    def on_step_end(self, state: RunState, record: StepRecord) -> None:
        self.state.global_step = record.step
        self.state.epoch = record.epoch
        if record.step % self.every == 0 or record.step == state.total_steps:
            self.state.log_history.append(fields_of(record))

    def on_evaluate(self, state: RunState, evaluation: EvaluationRecord) -> None:
        self.state.log_history.append(fields_of(evaluation))
        self.state.best_metric = state.best_loss
        self.state.best_global_step = state.best_step
        self.state.best_model_checkpoint = str(state.output_dir / checkpoint.BEST)


class Trainer:
    """Trains the adapter of a ``PeftModel``, or all parameters of a model of ``AutoModelForCausalLM``.

    Args:
        train_dataset: rows (a sequence of dicts, or a ``datasets.Dataset``), a path, or ``owner/name`` on a hub (its
            split train), in any format that the command line reads. In rows with ``input_ids`` but no ``labels``,
            every token is learnt; tokens that ``attention_mask`` leaves out are padding.
        tokenizer: needed for rows of text; it is saved with the adapter.
        eval_dataset: held-out rows, given like ``train_dataset`` (on a hub: the split test); ``args.eval_strategy``
            says when they are evaluated.
        callbacks: their methods are called at each point of the run.
        general_dataset: rows, given like ``train_dataset``, that are trained on as well, and that the terms
            ``contrastive`` and ``kl_anchor`` of ``args.objectives`` take for what is not to be forgotten.
        processing_class: transformers' newer name of ``tokenizer``.
        others: transformers' other arguments; those that would change the training are refused.

    Raises:
        LoraMsError: an argument that is not supported, or unknown.
    """

    def __init__(
        self,
        model: PeftModel | ModelForCausalLM,
        args: TrainingArguments | None = None,
        train_dataset=None,
        tokenizer=None,
        eval_dataset=None,
        callbacks: Sequence[TrainerCallback] | None = None,
        *,
        general_dataset=None,
        processing_class=None,
        **others,
    ):
        args = TrainingArguments() if args is None else args
        if not isinstance(args, TrainingArguments):
            raise LoraMsError(
                f"args must be lora_ms.TrainingArguments, got {type(args).__module__}.{type(args).__name__}"
            )
        _check_others(others)
        wrong = [callback for callback in callbacks or () if not isinstance(callback, TrainerCallback)]
        if wrong:
            raise LoraMsError(f"callbacks must be objects of a subclass of lora_ms.TrainerCallback, got {wrong[0]!r}")
        if args.evaluates and eval_dataset is None:
            raise LoraMsError("eval_strategy is given and eval_dataset is not: give Trainer the rows to evaluate")
        if not isinstance(model, PeftModel) and quantised_layers(model):
            raise LoraMsError("weights of four bits do not train: give Trainer a PeftModel, of get_peft_model")
        self.peft = model if isinstance(model, PeftModel) else None
        self.model = model.model if isinstance(model, PeftModel) else model
        self.args = args
        self.train_dataset = local_rows(train_dataset) if isinstance(train_dataset, str) else train_dataset
        self.tokenizer = tokenizer if processing_class is None else processing_class
        self.eval_dataset = local_rows(eval_dataset, "test") if isinstance(eval_dataset, str) else eval_dataset
        self.general_dataset = local_rows(general_dataset) if isinstance(general_dataset, str) else general_dataset
        self.callbacks = list(callbacks or ())
        self.state = TrainerState(num_train_epochs=args.num_train_epochs)
        # with their datasets, by what is in the model: their graphs are compiled once, and go with that
        self._evaluators: WeakKeyDictionary[Any, list[tuple[Any, Evaluator]]] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Trainer({self.peft or self.model!r}, {self.args!r})"

    @property
    def processing_class(self):
        """transformers' newer name of ``tokenizer``."""
        return self.tokenizer

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Trains to the end; the adapter is then in ``output_dir/adapter`` (without one, the model in ``/model``).

        Ctrl-C, or a notebook's interrupt, finishes the step under way and saves a checkpoint; the result says so.

        resume_from_checkpoint: overrides the value in ``args``.

        Raises:
            LoraMsError: data that teaches nothing, or a loss that is not finite.
        """
        if self.train_dataset is None:
            raise LoraMsError("train_dataset is missing: give Trainer the rows to train on")
        args = self.args
        runtime, notices = device.setup(seed=args.seed, use_parallel=args.use_parallel)
        print(*notices, sep="\n", end="\n" if notices else "")
        settings = args.settings()
        if resume_from_checkpoint is not None:
            settings = replace(settings, resume=resume_from_checkpoint)
        trackers.check(settings.report_to)
        self.state.log_history.clear()
        terms = args.terms()
        self._check_start(settings, terms)
        parts = [self.train_dataset, *([] if self.general_dataset is None else [self.general_dataset])]
        prepared_parts = [self._rows(part, settings.seq_length, terms) for part in parts]
        rows = data.joined_rows(prepared_parts)
        config = None
        if self.peft:
            self.peft.unmerge_adapter()
            config = self.peft.active_peft_config
        if args.per_device_train_batch_size is None and not any(term.compares_rows for term in terms):
            settings = fitting(settings, self.model, config, runtime, rows.longest)
        lead = self.model.leading_ids
        plan = data.plan_training(rows, self.tokenizer, settings, runtime, lead)
        hook = None
        if config is not None:
            config = config.for_run(plan.total_steps)
            hook = config.step_hook(self.model)
        added = add_terms(
            terms,
            self.model,
            plan,
            rows,
            references=self._references(terms, rows, settings.batch_size, runtime),
            general=np.arange(rows.units) >= prepared_parts[0].units,
            tokenizer=self.tokenizer,
            runtime=runtime,
        )
        if added.lines and runtime.is_main:
            print(*added.lines, sep="\n")
        run = NativeRun(
            self.model,
            added.plan,
            settings,
            runtime,
            weights_of(self.model, config, self.tokenizer, hook),
            hooks=[*([] if hook is None else [hook]), *added.hooks],
            row_terms=added.row_terms,
            comparison=added.comparison,
            evaluator=self._evaluator(self.eval_dataset, runtime) if args.evaluates else None,
            callbacks=[_History(self.state, args.logging_steps), *self.callbacks],
        )
        try:
            with interruptible(), locked_output(settings.output_dir) if runtime.is_main else nullcontext():
                outcome = train(run)
        finally:
            self.model.has_trained |= self.state.global_step > 0
        if self.peft and hook is not None and not outcome.stopped:
            self.peft.peft_config[str(self.peft.active_adapter)] = hook.config()
        if args.load_best_model_at_end and self.state.best_model_checkpoint is not None and not outcome.stopped:
            run.weights().read(Path(self.state.best_model_checkpoint))
            print(f"the model has the weights of step {self.state.best_global_step}, the best evaluation")
        if runtime.is_main:
            if outcome.stopped:
                again = "load the model again, and then " if self._wants_start(terms) else ""
                print(*closing_lines(run, outcome)[:1], sep="\n")
                print(f"to go on: {again}train(resume_from_checkpoint=True)")
            show_picture(settings.output_dir / "loss.png")
        return TrainOutput(**vars(outcome), metrics=self._metrics(outcome))

    def _check_start(self, settings: TrainSettings, terms: Terms) -> None:
        """Raises LoraMsError where a run is to go on in this process, and a term needs the model that it began with."""
        wants = self._wants_start(terms)
        if settings.resume and self.model.has_trained and wants:
            raise LoraMsError(
                f"{wants[0]} compares with the model before training, which is gone: load the model again, and give it "
                "to a new Trainer that resumes"
            )

    def _wants_start(self, terms: Terms) -> list[str]:
        """The terms that compare with the model before training, which only a model that is loaded again still is."""
        return [term.type for term in terms if term.has_start or (term.has_reference and self.peft is None)]

    def _metrics(self, outcome: Outcome) -> dict[str, float]:
        loss = sum(outcome.losses) / max(len(outcome.losses), 1)
        return {"train_loss": loss, "epoch": self.state.epoch}

    def evaluate(self, eval_dataset=None) -> dict[str, float]:
        """Loss, perplexity and token accuracy on held-out rows: ``eval_dataset``, or else the trainer's.

        Where ``args.objectives`` learn from preferences, these are rows of preferences too: their loss and rewards.

        Raises:
            LoraMsError: there are no such rows.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise LoraMsError("there are no rows to evaluate: give eval_dataset")
        runtime, _ = device.setup(seed=self.args.seed, use_parallel=self.args.use_parallel)
        with interruptible():
            record = self._evaluator(rows, runtime).evaluate(self.state.global_step, self.state.epoch, None)
        found = fields_of(record)
        self.state.log_history.append(found)
        scores = {name: value for name, value in found.items() if name.startswith("eval_") and name != "eval_time_s"}
        return {**scores, "eval_runtime": record.eval_time_s, "epoch": self.state.epoch}

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Writes the adapter (without one, the model) and the tokenizer; None: where ``train`` wrote them."""
        path = Path(self.args.output_dir) / ("adapter" if self.peft else "model") if output_dir is None else output_dir
        if self.peft is None:
            save_directory(self.model, path, NUMPY_DTYPES[self.model.dtype], add=self._add_tokenizer)
            return
        self.peft.unmerge_adapter()
        with saving.new_folder(Path(path), replaced=ADAPTER_FILES) as part:
            weights_of(self.model, self.peft.active_peft_config, self.tokenizer).write(part)

    def _add_tokenizer(self, folder: Path) -> None:
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    def _rows(self, dataset: Any, seq_length: int, terms: Terms, split: str | None = "train") -> data.PreparedRows:
        # whoever gives rows from Python fills their texts there: braces are text
        preparation = Preparation(
            seq_length=seq_length,
            vocab_size=self.model.config.vocab_size,
            keep_placeholders=True,
            split=split,
            preferences=preferences_of(terms),
        )
        tally = Tally()
        store, report = prepare_rows(read([prepared(dataset)], preparation, tally), self.tokenizer, preparation, tally)
        return data.with_partners(store, report, preparation)

    def _references(self, terms: Terms, rows: data.PreparedRows, batch_size: int, runtime: Runtime) -> Any:
        if not any(term.has_reference for term in terms):
            return None
        with nullcontext() if self.peft is None else self.peft.disable_adapter():
            return reference_log_probs(terms, self.model, rows, batch_size, self.tokenizer, runtime)

    def _evaluator(self, dataset: Any, runtime: Runtime) -> Evaluator:
        known = self._evaluators.setdefault(self.model if self.peft is None else self.peft.adapters.installed, [])
        if (found := next((one for rows, one in known if rows is dataset), None)) is not None:
            return found
        settings, terms, size = self.args.settings(), self.args.terms(), self.args.per_device_eval_batch_size
        rows = self._rows(dataset, settings.seq_length, terms, split=None)
        if self.peft is None and self.state.global_step and any(term.has_reference for term in terms):
            raise LoraMsError(
                "the model before training, which these objectives compare with, is gone: give Trainer the rows as "
                "eval_dataset, and args an eval_strategy"
            )
        references = self._references(terms, rows, size, runtime)
        plan = data.held_out_plan(
            rows.store,
            size,
            self.tokenizer,
            settings.seq_length,
            runtime,
            packing=settings.packing,
            lead=self.model.leading_ids,
            unit=rows.unit,
        )
        evaluator = evaluator_of(terms, self.model, plan, rows, runtime, references=references)
        known.append((dataset, evaluator))
        return evaluator


def _check_others(others: dict[str, Any]) -> None:
    """Raises LoraMsError for what is refused or unknown; prints a line of what has no effect."""
    given = {name: value for name, value in others.items() if value is not None and value != (None, None)}
    for name in given:
        if name in REFUSED:
            raise LoraMsError(f"Trainer: {name} is not supported: {REFUSED[name]}; leave it out")
        if name not in NO_EFFECT:
            known = ["model", "args", "train_dataset", "tokenizer", "eval_dataset", "callbacks", "general_dataset"]
            known.append("processing_class")
            near = difflib.get_close_matches(name, [*known, *NO_EFFECT, *REFUSED], 1, 0.0)[0]
            raise LoraMsError(f"Trainer: unknown argument {name}; the nearest is {near}")
    if given:
        print(f"no effect here: {', '.join(given)} of Trainer; evaluate() gives loss, perplexity and accuracy")
