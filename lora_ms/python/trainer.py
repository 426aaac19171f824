"""Training from Python, with transformers' names."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

from lora_ms.data.pipeline import Preparation, prepare_rows, read, read_rows
from lora_ms.data.report import Tally
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import quantised_layers
from lora_ms.python.model import ModelForCausalLM
from lora_ms.python.peft_model import PeftModel
from lora_ms.recipes import data
from lora_ms.recipes.download import local_rows
from lora_ms.recipes.outputs import weights_of
from lora_ms.recipes.train import NativeRun, train
from lora_ms.runtime import device
from lora_ms.runtime.device import Runtime
from lora_ms.train import tensorboard
from lora_ms.train.callbacks import TrainerCallback
from lora_ms.train.evaluation import Evaluator
from lora_ms.train.log import locked_output
from lora_ms.train.loop import Outcome
from lora_ms.train.settings import TrainSettings

# transformers' name -> TrainSettings'; a field that has one name on both sides needs no line
SETTINGS = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "max_seq_length": "seq_length",
    "lr_scheduler_type": "lr_kind",
    "adam_epsilon": "eps",
    "early_stopping_patience": "patience",
    "gradient_checkpointing": "recompute",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
}
STRATEGIES = ("no", "steps", "epoch")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainingArguments:
    """Settings of a ``Trainer``, by transformers' names."""

    output_dir: str | os.PathLike
    learning_rate: float = 1e-4  # the highest
    num_train_epochs: float = 3  # a whole number
    per_device_train_batch_size: int = 8  # rows
    gradient_accumulation_steps: int = 1  # micro-batches per optimiser step
    max_steps: int = -1  # optimiser steps; -1: as many as the epochs make
    max_seq_length: int = 1024  # tokens; longer rows are dropped and counted
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A; 1: one rate for both
    neftune_noise_alpha: float = 0.0  # noise on the embedding while training, 5 to 15; 0: none
    lr_scheduler_type: str = "linear"  # constant, linear or cosine
    warmup_ratio: float = 0.0
    warmup_steps: int = 0  # overrides the ratio where above 0
    logging_steps: int = 1
    save_strategy: str = "steps"  # no, steps or epoch
    save_steps: int = 0  # optimiser steps; 0: no checkpoint before the end
    save_total_limit: int | None = None  # newest checkpoints that are kept; None: all
    gradient_checkpointing: bool = False  # less memory, more time
    use_parallel: bool = False  # one process per card, started by msrun
    seed: int = 0
    resume_from_checkpoint: bool | str = False  # True: the newest; or a name such as "step_40"
    overwrite_output_dir: bool = False  # delete others' files in the folders that a run replaces
    auto_trans_ckpt: bool = False  # no effect: each process reads its part of the checkpoint either way
    eval_strategy: str = "no"  # no, steps or epoch, of eval_dataset; and once at the end
    evaluation_strategy: str = "no"  # its older name
    eval_steps: int | None = None  # optimiser steps; None: logging_steps
    per_device_eval_batch_size: int = 8  # rows
    early_stopping_patience: int = 0  # evaluations without a better one before the run stops; 0: never
    report_to: str | Sequence[str] = "none"  # or tensorboard; metrics.jsonl is always written
    packing: bool = True  # several rows in a line, each seeing itself alone: the same numbers, less padding

    @property
    def evaluates(self) -> bool:
        """Whether ``eval_dataset`` is evaluated."""
        return bool(self._evaluations)

    @property
    def _evaluations(self) -> set[str]:
        return {self.eval_strategy, self.evaluation_strategy} - {"no"}

    @property
    def _reports(self) -> list[str]:
        return [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)

    def settings(self) -> TrainSettings:
        """The same for the training loop.

        Raises:
            LoraMsError: a setting out of range, or one that is not supported.
        """
        self._check()
        own = {field.name for field in fields(TrainSettings)}
        named = {field.name: SETTINGS.get(field.name, field.name) for field in fields(self)}
        copied = {setting: getattr(self, name) for name, setting in named.items() if setting in own}
        computed = {
            "output_dir": Path(self.output_dir),
            "epochs": int(self.num_train_epochs),
            "betas": (self.adam_beta1, self.adam_beta2),
            "save_steps": {"no": 0, "steps": self.save_steps, "epoch": -1}[self.save_strategy],
            "keep_checkpoint_max": sys.maxsize if self.save_total_limit is None else self.save_total_limit,
            "eval_steps": (self.eval_steps or self.logging_steps) if "steps" in self._evaluations else 0,
            "eval_epochs": int("epoch" in self._evaluations),
            "report_to": tuple(name for name in self._reports if name != "none"),
        }
        return TrainSettings(**{**copied, **computed})

    def _check(self) -> None:
        for name, value, supported in (
            ("save_strategy", self.save_strategy, STRATEGIES),
            ("eval_strategy", self.eval_strategy, STRATEGIES),
            ("evaluation_strategy", self.evaluation_strategy, STRATEGIES),
            *(("report_to", name, ("none", *tensorboard.REPORTS)) for name in self._reports),
            ("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES),
        ):
            if value not in supported:
                raise LoraMsError(f"{name} {value!r} is not supported; supported: {', '.join(supported)}")
        for name in ("num_train_epochs", "logging_steps"):
            value = getattr(self, name)
            if value != int(value) or value < 1:
                raise LoraMsError(f"{name} expects a whole number from 1 on, got {value}")
        for name in ("eval_steps", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LoraMsError(f"{name} expects 1 or more, got {value}")
        if len(self._evaluations) > 1:
            raise LoraMsError("eval_strategy and evaluation_strategy differ: give one of them")
        if self.early_stopping_patience and not self.evaluates:
            raise LoraMsError("early_stopping_patience needs evaluations: set eval_strategy to steps or epoch")


class Trainer:
    """Trains a ``PeftModel``'s adapter, or all parameters of a model of ``AutoModelForCausalLM``.

    Args:
        train_dataset: rows (a sequence of dicts), a path, or a hub's ``owner/name`` (its split train), in any format
            that the command line reads.
        tokenizer: needed for rows of text; saved with the adapter.
        eval_dataset: held-out rows, as ``train_dataset`` (by name: the split test); evaluated as
            ``args.eval_strategy`` says.
        callbacks: called at every point of the run.
    """

    def __init__(
        self,
        model: PeftModel | ModelForCausalLM,
        args: TrainingArguments,
        train_dataset,
        tokenizer=None,
        eval_dataset=None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        wrong = [callback for callback in callbacks if not isinstance(callback, TrainerCallback)]
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
        self.tokenizer = tokenizer
        self.eval_dataset = local_rows(eval_dataset, "test") if isinstance(eval_dataset, str) else eval_dataset
        self.callbacks = callbacks

    def train(self) -> Outcome:
        """Runs to the end; the adapter is then in ``output_dir/adapter`` (the model, without one, in ``/model``).

        Raises:
            LoraMsError: data that teaches nothing, or a loss that is not finite.
        """
        runtime, notices = device.setup(seed=self.args.seed, use_parallel=self.args.use_parallel)
        print(*notices, sep="\n", end="\n" if notices else "")
        settings = self.args.settings()
        tensorboard.check(settings.report_to)
        tally = Tally()
        # whoever gives rows from Python fills their texts there: braces are text
        preparation = Preparation(seq_length=settings.seq_length, keep_placeholders=True)
        rows = read([self.train_dataset], preparation, tally)
        vocab_size = self.model.config.vocab_size
        if self.peft:
            self.peft.unmerge_adapter()
        lead = self.model.leading_ids
        plan = data.plan_rows(rows, self.tokenizer, settings, runtime, vocab_size=vocab_size, tally=tally, lead=lead)
        config = None
        hook = None
        if self.peft:
            config = self.peft.active_peft_config.for_run(plan.total_steps)
            hook = config.step_hook(self.model)
        run = NativeRun(
            self.model,
            plan,
            settings,
            runtime,
            weights_of(self.model, config, self.tokenizer, hook),
            hooks=[] if hook is None else [hook],
            evaluator=self._evaluator(settings, runtime) if self.args.evaluates else None,
            callbacks=self.callbacks,
        )
        with locked_output(settings.output_dir) if runtime.is_main else nullcontext():
            outcome = train(run)
        if self.peft and hook is not None:
            self.peft.peft_config[str(self.peft.active_adapter)] = hook.config()
        return outcome

    def _evaluator(self, settings: TrainSettings, runtime: Runtime) -> Evaluator:
        vocab_size = self.model.config.vocab_size
        preparation = Preparation(seq_length=settings.seq_length, vocab_size=vocab_size)
        store, _ = prepare_rows(read_rows(self.eval_dataset, keep_placeholders=True), self.tokenizer, preparation)
        plan = data.held_out_plan(
            store,
            self.args.per_device_eval_batch_size,
            self.tokenizer,
            settings.seq_length,
            runtime,
            packing=settings.packing,
            lead=self.model.leading_ids,
        )
        return Evaluator(self.model, plan, vocab_size, runtime)
