"""The settings of a run: each declared once, with its unit, its default and the key of the YAML that gives it.

``recipes.settings`` fills them from a configuration, ``python.trainer`` from ``TrainingArguments``; what takes no more
than a copy needs no line there.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from lora_ms.data.packing import Kind
from lora_ms.train.groups import Group

T = TypeVar("T")
YAML_KEY = "yaml_key"  # in the metadata of a field
DECIDING = (  # a run's numbers, besides the data and what follows from it
    "seed shuffle learning_rate lr_kind lr_end betas eps weight_decay groups max_grad_norm loraplus_lr_ratio "
    "loraplus_lr_embedding neftune_noise_alpha loss_scale dynamic_scale scale_window scale_factor"
).split()


def yaml_key(key: str, default: T) -> T:
    """A field that a configuration gives as it stands: a dotted path of ``RunConfig``, whose properties count too."""
    return field(default=default, metadata={YAML_KEY: key})


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run, shared by the command line and the Python interface."""

    output_dir: Path
    epochs: int = yaml_key("runner_config.epochs", 1)  # passes over the data
    batch_size: int = yaml_key("batch_size", 1)  # rows per rank and micro-batch
    accumulation: int = yaml_key("runner_config.gradient_accumulation_steps", 1)  # micro-batches per optimiser step
    max_steps: int = yaml_key("runner_config.max_steps", -1)  # optimiser steps; -1: as many as the epochs make
    seq_length: int = 1024  # tokens of the longest row kept
    packing: bool = yaml_key("train_dataset.packing", True)  # several rows in a line
    length_buckets: int = yaml_key("train_dataset.length_buckets", 4)  # lengths of line where rows are not packed
    shuffle: bool = yaml_key("train_dataset.data_loader.shuffle", True)  # a new order in each epoch
    drop_remainder: bool = yaml_key("train_dataset.drop_remainder", False)  # leave out the last, short step of an epoch
    seed: int = yaml_key("seed", 0)  # of order, dropout and noise
    learning_rate: float = yaml_key("learning_rate", 1e-4)  # the highest
    lr_kind: str = yaml_key("lr_schedule.kind", "cosine")  # constant, linear or cosine
    lr_end: float = yaml_key("lr_schedule.lr_end", 0.0)  # the last learning rate
    warmup_ratio: float = 0.0  # share of the schedule's steps
    warmup_steps: int = 0  # optimiser steps; overrides the ratio where above 0
    schedule_steps: int = yaml_key("lr_schedule.total_steps", -1)  # optimiser steps of the schedule; -1: of the run
    betas: tuple[float, float] = yaml_key("optimizer.betas", (0.9, 0.999))  # decay of AdamW's two moments
    eps: float = yaml_key("optimizer.eps", 1e-8)
    weight_decay: float = yaml_key("optimizer.weight_decay", 0.0)
    swap: bool = yaml_key("optimizer.swap", False)  # AdamW's moments in the host's memory between steps
    groups: tuple[Group, ...] = ()  # of parameters, with a rate and a decay of their own
    max_grad_norm: float | None = yaml_key("max_grad_norm", 1.0)  # L2 norm of the whole gradient; None: not clipped
    loraplus_lr_ratio: float = yaml_key("pet_config.loraplus_lr_ratio", 1.0)  # learning rate of B over that of A
    # the highest learning rate of an adapter on the embedding, where the ratio is not 1
    loraplus_lr_embedding: float = yaml_key("pet_config.loraplus_lr_embedding", 1e-6)
    neftune_noise_alpha: float = yaml_key("pet_config.neftune_noise_alpha", 0.0)  # noise on the embedding; 0: none
    loss_scale: float = 65536.0  # first loss scale; used in float16 only
    dynamic_scale: bool = True  # it falls at an overflow and grows without
    scale_window: int = 1000  # steps without overflow before it grows
    scale_factor: float = 2.0  # by which it falls and grows
    logging_steps: int = yaml_key("logging_steps", 1)  # optimiser steps between two that are logged
    save_steps: int = yaml_key("save_steps", 0)  # optimiser steps between checkpoints; 0: only at the end; -1: an epoch
    keep_checkpoint_max: int = yaml_key("keep_checkpoint_max", 5)  # the newest ones are kept
    eval_steps: int = 0  # optimiser steps between evaluations; 0: one at the end; -1: an epoch
    eval_epochs: int = 0  # epochs between evaluations; 0: none but those of eval_steps
    keep_best: bool = yaml_key("evaluation.keep_best", True)  # the weights of the lowest evaluation loss, in best/
    patience: int = yaml_key("evaluation.patience", 0)  # evaluations without a better one before it stops; 0: never
    sink_size: int = 1  # optimiser steps between two reads of the loss from the device
    # layers that are recomputed in the backward pass: all, the first N, or these
    recompute: bool | int | list[int] = yaml_key("recompute_config.recompute", False)
    adaptive_batch: bool = yaml_key("runner_config.adaptive_batch", False)  # smaller micro-batches if memory is short
    # MB of this process, for adaptive_batch; None: what the machine has
    memory_budget_mb: float | None = yaml_key("context.max_device_memory_mb", None)
    report_to: tuple[str, ...] = ()  # of tensorboard.REPORTS; besides metrics.jsonl
    summary_steps: int = 0  # optimiser steps between two that MindSpore's summary file holds; 0: no such file
    summary_dir: str = ""  # its folder; "": output_dir/summary
    profile_steps: tuple[int, int] | None = None  # the first and the last step to profile, from 1
    profile_dir: str = ""  # "": output_dir/profile
    resume: bool | str = yaml_key("resume_training", False)  # True: from the newest checkpoint; or a checkpoint's name

    def identity(self) -> dict[str, object]:
        """What a resumed run must share; tuples as lists, as JSON returns them."""
        values = {name: getattr(self, name) for name in DECIDING}
        return json.loads(json.dumps(values))

    @property
    def layout(self) -> Kind:
        """How rows share lines."""
        return "packed" if self.packing else "bucketed" if self.length_buckets > 1 else "padded"


def yaml_keys() -> dict[str, str]:
    """The keys of a configuration by the setting that each gives."""
    return {one.name: one.metadata[YAML_KEY] for one in fields(TrainSettings) if YAML_KEY in one.metadata}
