"""``TrainingArguments``: the settings of a ``Trainer``, by transformers' names."""

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from lora_ms.errors import LoraMsError
from lora_ms.recipes.objectives import Terms, terms_of
from lora_ms.train import trackers
from lora_ms.train.settings import TrainSettings

# transformers' name -> TrainSettings'; a field that has one name on both sides needs no line
SETTINGS = {
    "gradient_accumulation_steps": "accumulation",
    "max_seq_length": "seq_length",
    "adam_epsilon": "eps",
    "early_stopping_patience": "patience",
    "gradient_checkpointing": "recompute",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
}
STRATEGIES = ("no", "steps", "epoch")
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
OPTIMIZERS = (  # AdamW: its state in float32, or in eight bits; in memory, or in a file
    *("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_8bit"),
)
BATCH = 8  # rows of a step where no batch size is given
# transformers' arguments that change no number here, with their values there
NO_EFFECT: Mapping[str, Any] = {
    "bf16": False, "fp16": False, "bf16_full_eval": False, "fp16_full_eval": False, "tf32": None,
    "fp16_opt_level": "O1", "fp16_backend": "auto", "half_precision_backend": "auto",
    "do_train": False, "do_eval": False, "do_predict": False, "prediction_loss_only": False,
    "disable_tqdm": None, "log_level": "passive", "log_level_replica": "warning", "log_on_each_node": True,
    "logging_strategy": "steps", "logging_first_step": False, "logging_nan_inf_filter": True,
    "save_safetensors": True, "save_on_each_node": False, "save_only_model": False,
    "restore_callback_states_from_checkpoint": False, "ignore_data_skip": False,
    "use_cpu": False, "no_cuda": False, "use_mps_device": False, "jit_mode_eval": False, "use_ipex": False,
    "data_seed": None, "full_determinism": False, "local_rank": -1, "ddp_backend": None,
    "ddp_find_unused_parameters": None, "ddp_bucket_cap_mb": None, "ddp_broadcast_buffers": None, "ddp_timeout": 1800,
    "fsdp": "", "fsdp_config": None, "fsdp_min_num_params": 0, "fsdp_transformer_layer_cls_to_wrap": None,
    "deepspeed": None, "accelerator_config": None, "parallelism_config": None, "tp_size": 0, "debug": "",
    "dataloader_drop_last": False, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
    "dataloader_pin_memory": True, "dataloader_persistent_workers": False, "remove_unused_columns": True,
    "group_by_length": False, "length_column_name": "length", "label_names": None, "past_index": -1,
    "skip_memory_metrics": True, "auto_find_batch_size": False, "eval_accumulation_steps": None, "eval_delay": 0,
    "eval_on_start": False, "eval_do_concat_batches": True, "batch_eval_metrics": False,
    "eval_use_gather_object": False, "include_inputs_for_metrics": False, "include_for_metrics": [],
    "include_tokens_per_second": False, "include_num_input_tokens_seen": False,
    "gradient_checkpointing_kwargs": None, "torch_compile": False, "torch_compile_backend": None,
    "torch_compile_mode": None, "torchdynamo": None, "ray_scope": "last", "torch_empty_cache_steps": None,
    "use_legacy_prediction_loop": False, "use_liger_kernel": False, "liger_kernel_config": None, "mp_parameters": "",
    "average_tokens_across_devices": False, "split_batches": None, "dispatch_batches": None,
    "push_to_hub": False, "hub_model_id": None, "hub_strategy": "every_save", "hub_token": None,
    "hub_private_repo": None, "hub_always_push": False, "hub_revision": None, "push_to_hub_model_id": None,
    "push_to_hub_organization": None, "push_to_hub_token": None, "project": "huggingface", "trackio_space_id": None,
}  # fmt: skip
# those that would change them
REFUSED: Mapping[str, Any] = {
    "label_smoothing_factor": 0.0, "optim_args": None, "optim_target_modules": None, "lr_scheduler_kwargs": {},
    "per_gpu_train_batch_size": None, "per_gpu_eval_batch_size": None,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class _Settings:
    """The arguments that have an effect."""

    output_dir: str | os.PathLike = "trainer_output"
    learning_rate: float = 1e-4  # the highest that the schedule reaches
    num_train_epochs: float = 3  # a whole number
    per_device_train_batch_size: int | None = None  # rows; None: 8 a step, in micro-batches that fit the memory
    gradient_accumulation_steps: int = 1  # micro-batches per optimiser step
    max_steps: int = -1  # optimiser steps; -1: as many as the epochs make
    max_seq_length: int = 1024  # tokens; longer rows are dropped and counted
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    loraplus_lr_ratio: float = 1.0  # ratio of B's learning rate to A's; 1: one rate for both
    neftune_noise_alpha: float | None = 0.0  # noise on the embedding while training, 5 to 15; 0: none
    lr_scheduler_type: str = "linear"  # constant, linear or cosine
    warmup_ratio: float = 0.0
    warmup_steps: float = 0  # overrides the ratio where above 0; below 1, a share of the steps
    optim: str = "adamw_torch"  # AdamW; 8bit: its state in eight bits; paged: its state in a file
    logging_steps: int = 1
    logging_dir: str | os.PathLike | None = None  # folder of TensorBoard's files; None: output_dir/tensorboard
    save_strategy: str = "steps"  # no, steps, epoch or best
    save_steps: int = 0  # optimiser steps; 0: no checkpoint before the end
    save_total_limit: int | None = None  # newest checkpoints that are kept; None or 0: all
    load_best_model_at_end: bool = False  # the model then has the weights of the lowest evaluation loss
    metric_for_best_model: str | None = None  # only loss
    greater_is_better: bool | None = None  # only False
    gradient_checkpointing: bool = False  # less memory, more time
    use_parallel: bool = False  # one process per card, started by msrun
    seed: int = 0
    resume_from_checkpoint: bool | str | None = False  # True: the newest; or a name such as "step_40"
    overwrite_output_dir: bool = False  # also delete files that no run has written, in folders that a run replaces
    auto_trans_ckpt: bool = False  # no effect: each process reads its part of the checkpoint either way
    eval_strategy: str = "no"  # when to evaluate eval_dataset, besides once at the end: no, steps or epoch
    evaluation_strategy: str = "no"  # its older name
    eval_steps: int | None = None  # optimiser steps; None: logging_steps
    per_device_eval_batch_size: int = 8  # rows
    early_stopping_patience: int = 0  # the run stops after this many evaluations without improvement; 0: never
    report_to: str | Sequence[str] | None = "none"  # tensorboard, wandb, swanlab, mlflow; metrics.jsonl always
    run_name: str | None = None  # name of the run there; None: the name of output_dir
    packing: bool = True  # several rows in a line, none of which sees another: the same numbers, less padding
    objectives: Sequence[Mapping[str, Any]] = ()  # terms of the loss, as the YAML key: [{"type": "dpo", "beta": 0.1}]


class TrainingArguments(_Settings):
    """Settings of a ``Trainer``, by transformers' names; the arguments listed here have an effect.

    transformers' other arguments are accepted; one line lists those that differ from their default there.

    Raises:
        LoraMsError: an unknown name, or one that is not supported.
    """

    def __init__(self, output_dir: str | os.PathLike = "trainer_output", learning_rate: float = 1e-4, **given: Any):
        ours = {field.name for field in fields(_Settings)}
        unknown = [name for name in given if name not in ours | NO_EFFECT.keys() | REFUSED.keys()]
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*ours, *NO_EFFECT], 1, 0.0)[0]
            raise LoraMsError(f"TrainingArguments: unknown argument {unknown[0]}; the nearest is {near}")
        refused = [name for name, usual in REFUSED.items() if given.get(name, usual) not in (usual, None)]
        if refused:
            raise LoraMsError(f"TrainingArguments: {', '.join(refused)} not supported: leave it out")
        idle = [name for name, usual in NO_EFFECT.items() if given.get(name, usual) != usual]
        if idle:
            print(f"no effect here: {', '.join(idle)} of TrainingArguments")
        # transformers' enums have their text as a value
        values = {name: getattr(value, "value", value) for name, value in given.items() if name in ours}
        super().__init__(output_dir, learning_rate, **values)

    def __repr__(self) -> str:
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.default is MISSING or field.name == "output_dir" or getattr(self, field.name) != field.default
        ]
        return f"TrainingArguments({', '.join(given)})"

    @property
    def evaluates(self) -> bool:
        """Whether ``eval_dataset`` is evaluated."""
        return bool(self._evaluations)

    @property
    def _evaluations(self) -> set[str]:
        return {self.eval_strategy, self.evaluation_strategy} - {"no"}

    @property
    def _reports(self) -> list[str]:
        given = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        return trackers.installed() if given == ["all"] else given

    def terms(self) -> Terms:
        """``objectives``, checked.

        Raises:
            LoraMsError: one that is unknown, or keys that are wrong.
        """
        return terms_of(self.objectives) if self.objectives else []

    def settings(self) -> TrainSettings:
        """The same settings, for the training loop.

        Raises:
            LoraMsError: a setting out of range, or one that is not supported.
        """
        self._check()
        terms = self.terms()
        compares_rows = any(term.compares_rows for term in terms)
        own = {field.name for field in fields(TrainSettings)}
        named = {field.name: SETTINGS.get(field.name, field.name) for field in fields(self)}
        copied = {setting: getattr(self, name) for name, setting in named.items() if setting in own}
        computed = {
            "output_dir": Path(self.output_dir),
            "batch_size": self.per_device_train_batch_size or BATCH,
            "epochs": int(self.num_train_epochs),
            "betas": (self.adam_beta1, self.adam_beta2),
            "eight_bits": self.optim.endswith("8bit"),
            "paged": self.optim.startswith("paged"),
            "max_grad_norm": self.max_grad_norm or None,
            "neftune_noise_alpha": self.neftune_noise_alpha or 0.0,
            "lr_kind": SCHEDULES[self.lr_scheduler_type],
            **self._warmup(),
            "resume": self.resume_from_checkpoint or False,
            "save_steps": {"no": 0, "best": 0, "steps": self.save_steps, "epoch": -1}[self.save_strategy],
            "keep_checkpoint_max": self.save_total_limit or sys.maxsize,
            "eval_steps": (self.eval_steps or self.logging_steps) if "steps" in self._evaluations else 0,
            "eval_epochs": int("epoch" in self._evaluations),
            "report_to": tuple(name for name in self._reports if name != "none"),
            "run_name": self.run_name or "",
            "objectives": tuple(term.identity() for term in terms),
            "packing": self.packing and not compares_rows,
            "compares_rows": compares_rows,
            "logging_dir": "" if self.logging_dir is None else str(self.logging_dir),
        }
        return TrainSettings(**{**copied, **computed})

    def _warmup(self) -> dict[str, Any]:
        """As transformers reads the two: warmup_steps below 1 are a share, and ``constant`` has none."""
        if self.lr_scheduler_type == "constant":
            return {"warmup_steps": 0, "warmup_ratio": 0.0}
        steps, ratio = self.warmup_steps, self.warmup_ratio
        if 0 < steps < 1:
            steps, ratio = 0, steps
        return {"warmup_steps": int(steps), "warmup_ratio": ratio, "warmup_rounds_up": True}

    def _check(self) -> None:
        for name, value, supported in (
            ("save_strategy", self.save_strategy, (*STRATEGIES, "best")),
            ("eval_strategy", self.eval_strategy, STRATEGIES),
            ("evaluation_strategy", self.evaluation_strategy, STRATEGIES),
            *(("report_to", name, ("none", *trackers.REPORTS)) for name in self._reports),
            ("lr_scheduler_type", self.lr_scheduler_type, tuple(SCHEDULES)),
            ("optim", self.optim, OPTIMIZERS),
            ("metric_for_best_model", self.metric_for_best_model, (None, "loss", "eval_loss")),
            ("greater_is_better", self.greater_is_better, (None, False)),
        ):
            if value not in supported:
                shown = ", ".join(str(value) for value in supported if value is not None)
                raise LoraMsError(f"{name} {value!r} is not supported; supported: {shown}")
        for name in ("num_train_epochs", "logging_steps"):
            value = getattr(self, name)
            if value != int(value) or value < 1:
                raise LoraMsError(f"{name} expects a whole number from 1 on, got {value}")
        for name in ("eval_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value != int(value)):
                raise LoraMsError(f"{name} expects a whole number from 1 on, got {value}")
        for name in ("save_steps", "save_total_limit", "max_steps"):
            value = getattr(self, name)
            if value is not None and value != int(value):
                raise LoraMsError(f"{name} expects a whole number, got {value}")
        if self.warmup_steps < 0 or (self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps)):
            raise LoraMsError(f"warmup_steps expects a whole number, or a share below 1, got {self.warmup_steps}")
        if len(self._evaluations) > 1:
            raise LoraMsError("eval_strategy and evaluation_strategy differ: give one of them")
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(self, name) and not self.evaluates:
                raise LoraMsError(f"{name} needs evaluations: set eval_strategy to steps or epoch")
