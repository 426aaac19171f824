"""``callbacks``: a list of mappings, told apart by ``type``."""

from collections.abc import Container
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_ms.values import NoEffect, Path, Section, Whole


class CheckpointMonitor(Section):
    """When ``checkpoints/step_N`` is written."""

    type: Literal["CheckpointMonitor"] = "CheckpointMonitor"
    save_checkpoint_steps: Whole = Field(0, ge=0)  # optimiser steps between two checkpoints, 0: none before the end
    keep_checkpoint_max: Whole = Field(5, ge=1)  # the newest ones are kept
    prefix: NoEffect = "CKP"
    directory: NoEffect = None
    config: NoEffect = None
    save_checkpoint_seconds: NoEffect = 0
    keep_checkpoint_per_n_minutes: NoEffect = 0
    integrated_save: NoEffect = False
    async_save: NoEffect = False
    save_trainable_params: NoEffect = True
    save_network_params: NoEffect = False
    save_optimizer: NoEffect = True
    checkpoint_format: NoEffect = "safetensors"
    remove_redundancy: NoEffect = False
    exception_save: NoEffect = False
    append_info: NoEffect = None


class LossMonitor(Section):
    """Loss lines: here always on."""

    type: Literal["MFLossMonitor"] = "MFLossMonitor"
    per_print_times: Whole = Field(1, ge=1)  # optimiser steps, where runner_config.logging_steps is not given
    learning_rate: NoEffect = None
    origin_epochs: NoEffect = None
    dataset_size: NoEffect = None
    micro_batch_num: NoEffect = 1
    global_batch_size: NoEffect = 0
    check_for_nan_in_loss_and_grad: NoEffect = True


class ObsMonitor(Section):
    """Upload to Huawei's object storage."""

    type: Literal["ObsMonitor"] = "ObsMonitor"
    src_dir: NoEffect = None
    target_dir: NoEffect = None
    step_upload_frequence: NoEffect = 100
    epoch_upload_frequence: NoEffect = -1
    keep_last: NoEffect = True


class EvalCallBack(Section):
    """Evaluation while training: as ``do_eval: True``, at these intervals."""

    type: Literal["EvalCallBack"] = "EvalCallBack"
    step_interval: Whole = Field(100, ge=-1)  # optimiser steps, -1 or 0: none
    epoch_interval: Whole = Field(-1, ge=-1)  # epochs, -1 or 0: none
    eval_func: NoEffect = None

    @classmethod
    def given_counts(cls) -> Container[str]:
        return ("step_interval", "epoch_interval")


class SummaryMonitor(Section):
    """MindSpore's summary file: loss, evaluation, rate, norm, speed and memory; written as the run ends."""

    type: Literal["SummaryMonitor"] = "SummaryMonitor"
    summary_dir: Path = ""  # "": output_dir/summary
    collect_freq: Whole = Field(10, ge=1)  # optimiser steps between two that it holds
    collect_specified_data: NoEffect = None
    keep_default_action: NoEffect = True
    custom_lineage_data: NoEffect = None
    collect_tensor_freq: NoEffect = None
    max_file_size: NoEffect = None
    export_options: NoEffect = None


class ProfileMonitor(Section):
    """MindSpore's profile of some steps: as ``profile: True``."""

    type: Literal["ProfileMonitor"] = "ProfileMonitor"
    start_step: Whole = Field(1, ge=1)  # the first, from 1
    stop_step: Whole = Field(10, ge=1)  # the last
    output_path: Path = ""  # "": output_dir/profile
    start_profile: NoEffect = True
    profile_rank_ids: NoEffect = None
    profile_pipeline: NoEffect = False
    profile_communication: NoEffect = False
    profile_memory: NoEffect = True
    profiler_level: NoEffect = 0
    with_stack: NoEffect = False
    data_simplification: NoEffect = True
    mstx: NoEffect = False
    config: NoEffect = None

    @classmethod
    def given_counts(cls) -> Container[str]:
        return ("start_step", "stop_step")

    @model_validator(mode="after")
    def _some_steps(self) -> "ProfileMonitor":
        if self.start_step > self.stop_step:
            raise ValueError(f"start_step {self.start_step} is after stop_step {self.stop_step}: swap them")
        return self


CALLBACKS: dict[str, type[Section]] = {
    "CheckpointMonitor": CheckpointMonitor,
    "MFLossMonitor": LossMonitor,
    "ObsMonitor": ObsMonitor,
    "EvalCallBack": EvalCallBack,
    "SummaryMonitor": SummaryMonitor,
    "ProfileMonitor": ProfileMonitor,
}
NO_EFFECT_CALLBACKS = (ObsMonitor,)  # their mere presence is reported

Callback = Annotated[
    CheckpointMonitor | LossMonitor | ObsMonitor | EvalCallBack | SummaryMonitor | ProfileMonitor,
    Field(discriminator="type"),
]
