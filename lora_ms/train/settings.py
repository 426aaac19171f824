"""What a run is told, whichever door it came in by."""

import json
from dataclasses import dataclass
from pathlib import Path

from lora_ms.data.packing import Kind
from lora_ms.train.groups import Group

DECIDING = (  # a run's numbers, besides the data and what follows from it
    "seed shuffle learning_rate lr_kind lr_end betas eps weight_decay groups max_grad_norm loraplus_lr_ratio "
    "loraplus_lr_embedding neftune_noise_alpha loss_scale dynamic_scale scale_window scale_factor"
).split()


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run; the command line and the Python API both end here."""

    output_dir: Path
    epochs: int = 1
    batch_size: int = 1  # rows per rank and micro-batch
    accumulation: int = 1  # micro-batches per optimiser step
    max_steps: int = -1  # optimiser steps; -1: as many as the epochs make
    seq_length: int = 1024  # tokens of the longest row kept
    packing: bool = True  # several rows in a line
    length_buckets: int = 4  # lengths of line where rows are not packed
    shuffle: bool = True
    drop_remainder: bool = False
    seed: int = 0
    learning_rate: float = 1e-4  # the highest
    lr_kind: str = "cosine"  # constant, linear or cosine
    lr_end: float = 0.0
    warmup_ratio: float = 0.0  # share of the schedule's steps
    warmup_steps: int = 0  # optimiser steps; overrides the ratio where above 0
    schedule_steps: int = -1  # optimiser steps of the whole schedule; -1: those of the run
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    swap: bool = False  # AdamW's moments in the host's memory between steps
    groups: tuple[Group, ...] = ()  # of parameters, with a rate and a decay of their own
    max_grad_norm: float | None = 1.0
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A
    loraplus_lr_embedding: float = 1e-6  # the highest of an adapter on the embedding, where the ratio is not 1
    neftune_noise_alpha: float = 0.0  # noise on the embedding's output; 0: none
    loss_scale: float = 65536.0  # first loss scale; used in float16 only
    dynamic_scale: bool = True  # it falls at an overflow and grows without
    scale_window: int = 1000  # steps without overflow before it grows
    scale_factor: float = 2.0  # by this
    logging_steps: int = 1
    save_steps: int = 0  # optimiser steps between checkpoints; 0: none before the end; -1: an epoch
    keep_checkpoint_max: int = 5
    eval_steps: int = 0  # optimiser steps between evaluations; 0: one at the end; -1: an epoch
    eval_epochs: int = 0  # epochs between evaluations; 0: none but those of eval_steps
    keep_best: bool = True  # the weights of the lowest evaluation loss, in output_dir/best
    patience: int = 0  # evaluations without a better one before the run stops; 0: never
    sink_size: int = 1  # optimiser steps between two reads of the loss from the device
    recompute: bool | int | list[int] = False  # layers computed again in the backward pass: all, the first N, these
    adaptive_batch: bool = False  # smaller micro-batches where memory is short
    memory_budget_mb: float | None = None  # of this process, for adaptive_batch; None: what the machine has
    report_to: tuple[str, ...] = ()  # of watch.REPORTS; besides metrics.jsonl
    summary_steps: int = 0  # optimiser steps between two that MindSpore's summary file holds; 0: no such file
    summary_dir: str = ""  # its folder; "": output_dir/summary
    profile_steps: tuple[int, int] | None = None  # the first and the last step to profile, from 1
    profile_dir: str = ""  # "": output_dir/profile
    resume: bool | str = False  # True: from the newest checkpoint; or a checkpoint's name

    def identity(self) -> dict[str, object]:
        """What a resumed run must share; tuples as lists, as JSON returns them."""
        values = {name: getattr(self, name) for name in DECIDING}
        return json.loads(json.dumps(values))

    @property
    def layout(self) -> Kind:
        """How rows share lines."""
        return "packed" if self.packing else "bucketed" if self.length_buckets > 1 else "padded"
