"""The settings of a run from a configuration."""

from pathlib import Path
from typing import Any

from lora_ms.config import RunConfig
from lora_ms.config.sections import LossScale
from lora_ms.recipes.data import seq_length
from lora_ms.train.groups import Group
from lora_ms.train.settings import TrainSettings, yaml_keys


def settings_of(config: RunConfig, longest: int) -> TrainSettings:
    """The settings that ``config`` holds. Here are only those that are more than the value of one key.

    longest: the model's own limit, in tokens.

    Raises:
        LoraMsError: a file that a term of the loss names is not there, or is none of its kind.
    """
    for term in config.objectives:
        term.check()
    runner = config.runner_config
    schedule = config.lr_schedule
    scale = loss_scale(config)
    eval_steps, eval_epochs = config.eval_intervals
    summary = config.summary
    profiling = config.profiling
    compares_rows = any(keys.compares_rows for keys in config.objectives)
    computed = {
        "output_dir": Path(config.output_dir),
        "seq_length": seq_length(config, longest),
        "packing": config.train_dataset.packing and not compares_rows,
        "compares_rows": compares_rows,
        "warmup_ratio": schedule.warmup_ratio or 0.0,
        "warmup_steps": schedule.warmup_steps or 0,
        "groups": tuple(Group(g.params, g.learning_rate, g.weight_decay) for g in config.optimizer.groups),
        "objectives": tuple(term.identity() for term in config.objectives),
        "loss_scale": scale.loss_scale_value,
        "dynamic_scale": scale.type == "DynamicLossScaleUpdateCell",
        "scale_window": scale.scale_window,
        "scale_factor": scale.scale_factor,
        "eval_steps": eval_steps,
        "eval_epochs": eval_epochs,
        "sink_size": runner.sink_size if runner.sink_mode else 1,
        "report_to": tuple(config.report_to),
        "summary_steps": summary.collect_freq if summary else 0,
        "summary_dir": summary.summary_dir if summary else "",
        "profile_steps": (profiling.start_step, profiling.stop_step) if profiling else None,
        "profile_dir": profiling.output_path if profiling else "",
    }
    return TrainSettings(**{**copied(config), **computed})


def copied(config: RunConfig) -> dict[str, Any]:
    """The settings that are the value of one key; without those of a section that is null, such as ``pet_config``."""
    found = {}
    for setting, key in yaml_keys().items():
        value: Any = config
        *sections, name = key.split(".")
        for section in sections:
            value = None if value is None else getattr(value, section)
        if value is not None:
            found[setting] = getattr(value, name)
    return found


def loss_scale(config: RunConfig) -> LossScale:
    """``runner_wrapper.scale_sense``: a number is a fixed scale; 1, with which float16 cannot train, means dynamic."""
    scale = config.runner_wrapper.scale_sense
    if isinstance(scale, LossScale):
        return scale
    if scale == 1:
        return LossScale(type="DynamicLossScaleUpdateCell", loss_scale_value=65536)
    return LossScale(type="FixedLossScaleUpdateCell", loss_scale_value=scale)
