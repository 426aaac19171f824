"""The Python interface, with the names that Hugging Face users know."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.data.pipeline import Preparation, prepare_rows, read_rows
from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Generator, pad_rows
from lora_ms.infer.sampling import Sampling
from lora_ms.models import hub
from lora_ms.models.decoder import CausalLM
from lora_ms.python.peft_model import PeftModel
from lora_ms.recipes.outputs import weights_of
from lora_ms.recipes.train import fit, held_out_plan, plan_rows
from lora_ms.runtime import device as runtime_module
from lora_ms.train.callbacks import TrainerCallback
from lora_ms.train.evaluation import Evaluator
from lora_ms.train.loop import Outcome
from lora_ms.train.settings import TrainSettings
from lora_ms.train.tensorboard import REPORTS, check

SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


class Model(CausalLM):
    """A decoder that also generates and saves itself."""

    def generate(
        self,
        input_ids: Tensor | NDArray | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        attention_mask: Tensor | NDArray | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        generator: Generator | None = None,
        **sampling,
    ) -> NDArray[np.int32]:
        """Prompts continued: [batch, prompt + new] token ids, as in transformers.

        Args:
            input_ids: [batch, prompt] ids, or a list of rows of any lengths (padded on the left in the result).
            max_new_tokens: most new tokens of a row.
            attention_mask: [batch, prompt] of 0 and 1; 0 marks padding.
            eos_token_id: one or more ids that end a row; None for the model's own. Without any, rows run on.
            pad_token_id: fills the rest of a row that has ended.
            generator: holds the compiled graphs; None for the model's own.
            sampling: do_sample, temperature, top_k, top_p, repetition_penalty, seed (see ``Sampling``).

        Raises:
            LoraMsError: an empty prompt or a setting out of range.
            TypeError: an unknown setting.
        """
        unknown = set(sampling) - set(SAMPLING_NAMES)
        if unknown:
            raise TypeError(f"generate() got unknown settings: {', '.join(sorted(unknown))}")
        rows = _rows(input_ids, attention_mask)
        ends = self.config.eos_token_ids if eos_token_id is None else eos_token_id
        ends = (ends,) if isinstance(ends, int) else tuple(ends)
        if generator is None:
            # past Cell's own attributes: the generator holds this model
            generator = self.__dict__.setdefault("generator", None) or Generator(self)
            self.__dict__["generator"] = generator
        training = self.training
        new = generator.generate(rows, max_new_tokens, Sampling(**sampling), ends)
        self.set_train(training)
        return pad_rows(rows, new, pad_token_id, max(map(len, input_ids)))

    def cells_have_changed(self) -> None:
        """Forgets the compiled graphs of generation: they hold the cells that stood here before."""
        self.__dict__.pop("generator", None)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face directory in the type of the weights; transformers and vLLM load it."""
        hub.save_directory(self, path, hub.NUMPY_DTYPES[self.dtype])


def _rows(input_ids, attention_mask) -> list[list[int]]:
    ids = [np.asarray(row.asnumpy() if isinstance(row, Tensor) else row) for row in input_ids]
    if attention_mask is None:
        return [row.tolist() for row in ids]
    return [
        row[np.asarray(mask.asnumpy() if isinstance(mask, Tensor) else mask) == 1].tolist()
        for row, mask in zip(ids, attention_mask, strict=True)
    ]


class AutoModelForCausalLM:
    """Models by directory."""

    @staticmethod
    def from_pretrained(path: str | os.PathLike, ms_dtype: ms.Type = ms.float32) -> Model:
        """The model of a Hugging Face directory, with weights of ``ms_dtype`` (float32 or float16).

        Raises:
            LoraMsError: not such a directory, an unsupported architecture, or tensors that do not fit.
        """
        runtime, _ = runtime_module.setup()
        return hub.load_directory(Path(path), ms_dtype, Model, operators=runtime.operators)


class AutoTokenizer:
    """Tokenizers by directory."""

    @staticmethod
    def from_pretrained(path: str | os.PathLike):
        """transformers' own tokenizer of a directory on disk."""
        return load_tokenizer(path)


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
            LoraMsError: a setting out of range, or one that is not there yet.
        """
        for name, value, wanted in (
            ("save_strategy", self.save_strategy, ("no", "steps", "epoch")),
            ("eval_strategy", self.eval_strategy, ("no", "steps", "epoch")),
            ("evaluation_strategy", self.evaluation_strategy, ("no", "steps", "epoch")),
            *(("report_to", name, ("none", *REPORTS)) for name in self._reports),
        ):
            if value not in wanted:
                raise LoraMsError(f"{name} {value!r} is not supported; supported: {', '.join(map(str, wanted))}")
        if self.num_train_epochs != int(self.num_train_epochs) or self.num_train_epochs < 1 or self.logging_steps < 1:
            raise LoraMsError("num_train_epochs and logging_steps want whole numbers from 1 on")
        if self.lr_scheduler_type not in ("constant", "linear", "cosine"):
            raise LoraMsError(f"lr_scheduler_type {self.lr_scheduler_type!r} is none of constant, linear, cosine")
        if len(self._evaluations) > 1:
            raise LoraMsError("eval_strategy and evaluation_strategy differ: give one of them")
        if self.early_stopping_patience and not self.evaluates:
            raise LoraMsError("early_stopping_patience needs evaluations: set eval_strategy to steps or epoch")
        if self.eval_steps is not None and self.eval_steps < 1 or self.per_device_eval_batch_size < 1:
            raise LoraMsError("eval_steps and per_device_eval_batch_size want 1 or more")
        return TrainSettings(
            output_dir=Path(self.output_dir),
            epochs=int(self.num_train_epochs),
            batch_size=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            max_steps=self.max_steps,
            seq_length=self.max_seq_length,
            packing=self.packing,
            seed=self.seed,
            learning_rate=self.learning_rate,
            lr_kind=self.lr_scheduler_type,
            warmup_ratio=self.warmup_ratio,
            warmup_steps=self.warmup_steps,
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            neftune_noise_alpha=self.neftune_noise_alpha,
            logging_steps=self.logging_steps,
            save_steps={"no": 0, "steps": self.save_steps, "epoch": -1}[self.save_strategy],
            keep_checkpoint_max=sys.maxsize if self.save_total_limit is None else self.save_total_limit,
            eval_steps=(self.eval_steps or self.logging_steps) if "steps" in self._evaluations else 0,
            eval_epochs=int("epoch" in self._evaluations),
            patience=self.early_stopping_patience,
            report_to=tuple(name for name in self._reports if name != "none"),
            recompute=self.gradient_checkpointing,
            resume=self.resume_from_checkpoint,
        )


class Trainer:
    """Trains a ``PeftModel``'s adapter, or all parameters of a ``Model``.

    Args:
        train_dataset: rows (a sequence of dicts) or a path, in any format that the command line reads.
        tokenizer: needed for rows of text; saved with the adapter.
        eval_dataset: held-out rows, as ``train_dataset``; evaluated as ``args.eval_strategy`` says.
        callbacks: called at every point of the run.
    """

    def __init__(
        self,
        model: PeftModel | Model,
        args: TrainingArguments,
        train_dataset,
        tokenizer=None,
        eval_dataset=None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        wrong = [callback for callback in callbacks if not isinstance(callback, TrainerCallback)]
        if wrong:
            raise LoraMsError(f"callbacks want objects of a subclass of lora_ms.TrainerCallback, got {wrong[0]!r}")
        if args.evaluates and eval_dataset is None:
            raise LoraMsError("eval_strategy is given and eval_dataset is not: give Trainer the rows to evaluate")
        self.eval_dataset, self.callbacks = eval_dataset, callbacks
        self.peft = model if isinstance(model, PeftModel) else None
        self.model = model.model if isinstance(model, PeftModel) else model
        self.args, self.train_dataset, self.tokenizer = args, train_dataset, tokenizer

    def train(self) -> Outcome:
        """Runs to the end; the adapter is then in ``output_dir/adapter`` (the model, without one, in ``/model``).

        Raises:
            LoraMsError: data that teaches nothing, or a loss that is not finite.
        """
        runtime, notices = runtime_module.setup(seed=self.args.seed, use_parallel=self.args.use_parallel)
        print(*notices, sep="\n", end="\n" if notices else "")
        settings, vocab_size = self.args.settings(), self.model.config.vocab_size
        check(settings.report_to)
        plan = plan_rows(read_rows(self.train_dataset), self.tokenizer, settings, runtime, vocab_size)
        config: AdapterConfig | None = None
        hook = None
        if self.peft:
            self.peft.unmerge_adapter()
            config = self.peft.active_peft_config.for_run(plan.total_steps)
            hook = config.step_hook(self.model)
        weights = weights_of(self.model, config, self.tokenizer, hook)
        evaluator = self._evaluator(settings, runtime) if self.args.evaluates else None
        sizes = (vocab_size, self.model.dtype)
        hooks = [] if hook is None else [hook]
        outcome = fit(self.model, plan, settings, runtime, weights, *sizes, hooks, evaluator, self.callbacks)
        if self.peft and hook is not None:
            self.peft.peft_config[str(self.peft.active_adapter)] = hook.config()
        return outcome

    def _evaluator(self, settings: TrainSettings, runtime: runtime_module.Runtime) -> Evaluator:
        vocab_size, s = self.model.config.vocab_size, settings
        preparation = Preparation(seq_length=s.seq_length, vocab_size=vocab_size)
        store, _ = prepare_rows(read_rows(self.eval_dataset), self.tokenizer, preparation)
        plan = held_out_plan(
            store, self.args.per_device_eval_batch_size, self.tokenizer, s.seq_length, runtime, s.packing
        )
        return Evaluator(self.model, plan, vocab_size, runtime)
