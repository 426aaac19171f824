"""The settings of a training run, which the command line and the Python interface both fill.

A new setting is a line here: its name, default and unit, and the key of the YAML that gives it. ``recipes.settings``
copies it from there, and ``python.trainer`` from an argument of the same name; they name only settings that are more
than a copied value.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from lora_ms.data.packing import Kind
from lora_ms.train.groups import Group
from lora_ms.train.optimizer import LossScaling

Value = TypeVar("Value")


def setting(default: Value, yaml: str = "", decides: bool = False) -> Value:
    """A field of ``TrainSettings``.

    Args:
        yaml: the key that gives it, a dotted path of ``RunConfig``'s attributes; "" where no single key does.
        decides: whether it decides the numbers of the steps, so that a resumed run must share it.
    """
    return field(default=default, metadata={"yaml": yaml, "decides": decides})


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run: each is declared here alone, with its unit."""

    output_dir: Path

    # rows and lines; what decides the numbers here is compared by what follows from it, the plan of the data
    epochs: int = setting(1, "runner_config.epochs")  # passes over the data
    batch_size: int = setting(1, "batch_size")  # rows per rank and micro-batch
    accumulation: int = setting(1, "runner_config.gradient_accumulation_steps")  # micro-batches per optimiser step
    max_steps: int = setting(-1, "runner_config.max_steps")  # optimiser steps; -1: as many as the epochs make
    seq_length: int = 1024  # tokens of the longest row kept
    packing: bool = setting(True, "train_dataset.packing")  # several rows in a line
    length_buckets: int = setting(4, "train_dataset.length_buckets")  # lengths of line where rows are not packed
    drop_remainder: bool = setting(False, "train_dataset.drop_remainder")  # no short step at the end of an epoch
    seed: int = setting(0, "seed", decides=True)  # of order, dropout and noise
    shuffle: bool = setting(True, "train_dataset.data_loader.shuffle", decides=True)  # a new order in each epoch

    # the schedule
    learning_rate: float = setting(1e-4, "learning_rate", decides=True)  # the highest
    lr_kind: str = setting("cosine", "lr_schedule.kind", decides=True)  # constant, linear or cosine
    lr_end: float = setting(0.0, "lr_schedule.lr_end", decides=True)  # the last
    warmup_ratio: float = 0.0  # share of the schedule's steps
    warmup_steps: int = 0  # optimiser steps; overrides the ratio where above 0
    warmup_rounds_up: bool = (
        False  # what the ratio makes is rounded up, as transformers does; else down, as MindFormers
    )
    schedule_steps: int = setting(-1, "lr_schedule.total_steps")  # optimiser steps of the schedule; -1: of the run

    # the optimiser
    betas: tuple[float, float] = setting((0.9, 0.999), "optimizer.betas", decides=True)  # decay of the two moments
    eps: float = setting(1e-8, "optimizer.eps", decides=True)
    weight_decay: float = setting(0.0, "optimizer.weight_decay", decides=True)
    groups: tuple[Group, ...] = setting((), decides=True)  # of parameters, with a rate and a decay of their own
    # L2 norm of the whole gradient above which it is scaled down; None: never
    max_grad_norm: float | None = setting(1.0, "max_grad_norm", decides=True)
    loraplus_lr_ratio: float = setting(1.0, "pet_config.loraplus_lr_ratio", decides=True)  # rate of B over that of A
    # the highest learning rate of an adapter on the embedding, where that ratio is not 1
    loraplus_lr_embedding: float = setting(1e-6, "pet_config.loraplus_lr_embedding", decides=True)
    objectives: tuple[dict, ...] = setting((), decides=True)  # further terms of the loss: what decides their numbers
    compares_rows: bool = False  # whether one of them compares the rows of a micro-batch with each other
    # noise on the embedding's output; 0: none
    neftune_noise_alpha: float = setting(0.0, "pet_config.neftune_noise_alpha", decides=True)
    loss_scale: float = setting(65536.0, decides=True)  # first loss scale; used in float16 only
    dynamic_scale: bool = setting(True, decides=True)  # it falls at an overflow and grows without
    scale_window: int = setting(1000, decides=True)  # steps without overflow before it grows
    scale_factor: float = setting(2.0, decides=True)  # what it is then multiplied by
    eight_bits: bool = setting(False, "optimizer.eight_bits", decides=True)  # AdamW's moments in eight bits
    paged: bool = setting(False, "optimizer.paged")  # AdamW's moments in a file of output_dir, mapped
    swap: bool = setting(False, "optimizer.swap")  # AdamW's moments in the host's memory between steps

    # what is written, and when
    logging_steps: int = setting(1, "logging_steps")  # optimiser steps between two that are logged
    save_steps: int = setting(0, "save_steps")  # optimiser steps between checkpoints; 0: at the end alone; -1: an epoch
    keep_checkpoint_max: int = setting(5, "keep_checkpoint_max")  # the newest ones are kept
    report_to: tuple[str, ...] = ()  # of trackers.REPORTS; besides metrics.jsonl
    run_name: str = ""  # of the run in these; "": the name of output_dir
    logging_dir: str = ""  # of TensorBoard's files; "": output_dir/tensorboard
    summary_steps: int = 0  # optimiser steps between two that MindSpore's summary file holds; 0: no such file
    summary_dir: str = ""  # its folder; "": output_dir/summary
    profile_steps: tuple[int, int] | None = None  # the first and the last step to profile, from 1
    profile_dir: str = ""  # "": output_dir/profile
    resume: bool | str = setting(False, "resume_training")  # True: from the newest checkpoint; or a checkpoint's name

    overwrite: bool = setting(False, "overwrite_output_dir")  # delete what no run has written where a run writes

    # evaluation
    eval_steps: int = 0  # optimiser steps between evaluations; 0: one at the end; -1: an epoch
    eval_epochs: int = 0  # epochs between evaluations; 0: none but those of eval_steps
    keep_best: bool = setting(True, "evaluation.keep_best")  # the weights of the lowest evaluation loss, in best/
    patience: int = setting(0, "evaluation.patience")  # evaluations without a better one before it stops; 0: never

    # time and memory
    sink_size: int = 1  # optimiser steps between two reads of the loss from the device; 0 or less: an epoch
    # layers whose activations are recomputed in the backward pass: all, the first N, or those with these indices
    recompute: bool | int | list[int] = setting(False, "recompute_config.recompute")
    adaptive_batch: bool = setting(False, "runner_config.adaptive_batch")  # smaller micro-batches as memory gets short
    # MB of this process, for adaptive_batch; None: what the machine has
    memory_budget_mb: float | None = setting(None, "context.max_device_memory_mb")

    def identity(self) -> dict[str, object]:
        """What a resumed run must share; tuples as lists, as JSON returns them."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.metadata.get("decides")}
        return json.loads(json.dumps(values))

    def shared(self) -> dict[str, object]:
        """What the processes of a run must share: all but folders and the memory of a machine."""
        apart = ("output_dir", "summary_dir", "profile_dir", "logging_dir", "memory_budget_mb")
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in apart}

    @property
    def layout(self) -> Kind:
        """How rows share lines."""
        if self.packing:
            return "packed"
        return "bucketed" if self.length_buckets > 1 else "padded"

    @property
    def loss_scaling(self) -> LossScaling:
        """The loss scaling of a model that computes in float16."""
        return LossScaling(
            initial=self.loss_scale, dynamic=self.dynamic_scale, window=self.scale_window, factor=self.scale_factor
        )


def yaml_keys() -> dict[str, str]:
    """The keys of a configuration by the setting that each gives."""
    return {entry.name: entry.metadata["yaml"] for entry in fields(TrainSettings) if entry.metadata.get("yaml")}
