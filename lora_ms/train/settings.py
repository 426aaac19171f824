"""The settings of a training run, which the command line and the Python interface both fill."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_ms.data.packing import Kind
from lora_ms.train.groups import Group
from lora_ms.train.optimizer import LossScaling


def deciding(default: Any) -> Any:
    """A setting that decides the numbers of the steps, so that a resumed run must share it."""
    return field(default=default, metadata={"decides": True})


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run: each is declared here alone, with its unit."""

    output_dir: Path

    # rows and lines; what decides the numbers here is compared by what follows from it, the plan of the data
    epochs: int = 1
    batch_size: int = 1  # rows per rank and micro-batch
    accumulation: int = 1  # micro-batches per optimiser step
    max_steps: int = -1  # optimiser steps; -1: as many as the epochs make
    seq_length: int = 1024  # tokens of the longest row kept
    packing: bool = True  # several rows in a line
    length_buckets: int = 4  # lengths of line where rows are not packed
    drop_remainder: bool = False
    seed: int = deciding(0)
    shuffle: bool = deciding(True)

    # the schedule
    learning_rate: float = deciding(1e-4)  # the highest
    lr_kind: str = deciding("cosine")  # constant, linear or cosine
    lr_end: float = deciding(0.0)
    warmup_ratio: float = 0.0  # share of the schedule's steps
    warmup_steps: int = 0  # optimiser steps; overrides the ratio where above 0
    schedule_steps: int = -1  # optimiser steps of the whole schedule; -1: those of the run

    # the optimiser
    betas: tuple[float, float] = deciding((0.9, 0.999))
    eps: float = deciding(1e-8)
    weight_decay: float = deciding(0.0)
    groups: tuple[Group, ...] = deciding(())  # of parameters, with a rate and a decay of their own
    max_grad_norm: float | None = deciding(1.0)  # above it gradients are scaled down; None: never
    loraplus_lr_ratio: float = deciding(1.0)  # learning rate of B over that of A
    # the highest learning rate of an adapter on the embedding, where that ratio is not 1
    loraplus_lr_embedding: float = deciding(1e-6)
    neftune_noise_alpha: float = deciding(0.0)  # noise on the embedding's output; 0: none
    loss_scale: float = deciding(65536.0)  # first loss scale; used in float16 only
    dynamic_scale: bool = deciding(True)  # it falls at an overflow and grows without
    scale_window: int = deciding(1000)  # steps without overflow before it grows
    scale_factor: float = deciding(2.0)  # what it is then multiplied by
    swap: bool = False  # AdamW's moments in the host's memory between steps

    # what is written, and when
    logging_steps: int = 1
    save_steps: int = 0  # optimiser steps between checkpoints; 0: none before the end; -1: an epoch
    keep_checkpoint_max: int = 5
    report_to: tuple[str, ...] = ()  # of tensorboard.REPORTS; besides metrics.jsonl
    summary_steps: int = 0  # optimiser steps between two that MindSpore's summary file holds; 0: no such file
    summary_dir: str = ""  # its folder; "": output_dir/summary
    profile_steps: tuple[int, int] | None = None  # the first and the last step to profile, from 1
    profile_dir: str = ""  # "": output_dir/profile
    resume: bool | str = False  # True: from the newest checkpoint; or a checkpoint's name

    # evaluation
    eval_steps: int = 0  # optimiser steps between evaluations; 0: one at the end; -1: an epoch
    eval_epochs: int = 0  # epochs between evaluations; 0: none but those of eval_steps
    keep_best: bool = True  # the weights of the lowest evaluation loss, in output_dir/best
    patience: int = 0  # evaluations without a better one before the run stops; 0: never

    # time and memory
    sink_size: int = 1  # optimiser steps between two reads of the loss from the device; 0 or less: an epoch
    # layers whose activations are recomputed in the backward pass: all, the first N, or those with these indices
    recompute: bool | int | list[int] = False
    adaptive_batch: bool = False  # smaller micro-batches where memory is short
    memory_budget_mb: float | None = None  # of this process, for adaptive_batch; None: what the machine has

    def identity(self) -> dict[str, object]:
        """What a resumed run must share; tuples as lists, as JSON returns them."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.metadata.get("decides")}
        return json.loads(json.dumps(values))

    @property
    def layout(self) -> Kind:
        """How rows share lines."""
        if self.packing:
            return "packed"
        return "bucketed" if self.length_buckets > 1 else "padded"

    @property
    def loss_scaling(self) -> LossScaling:
        """Of a model that computes in float16."""
        return LossScaling(
            initial=self.loss_scale, dynamic=self.dynamic_scale, window=self.scale_window, factor=self.scale_factor
        )
