"""MindFormers' configuration: the user's without our keys, changed where it could not run."""

import os
from pathlib import Path
from typing import Any

import yaml

from lora_ms import saving
from lora_ms.errors import LoraMsError

STEP = "PortableTrainOneStepCell"  # registered by bridge.trainer
# our own keys, which MindFormers does not know: at the top and by section
OUR_TOP = (
    "backend",
    "load_adapter",
    "allow_other_template",
    "data_fill",
    "pretrained_model_dir",
    "processor",
    "eval_dataset_task",
    "evaluation",
    "objectives",
    "sequence",
    "report_to",
)
OUR_RUNNER = ("max_steps", "logging_steps", "adaptive_batch")
OUR_CONTEXT = ("cpu_operators", "enable_graph_kernel", "low_memory")
OUR_MODEL = ("type", "pet_config", "head_dim", "max_new_tokens", "temperature", "checkpoint_name_or_path")
# our own keys without effect here
WITHOUT_EFFECT = (
    *("report_to", "evaluation", "runner_config.adaptive_batch"),
    *(f"context.{key}" for key in OUR_CONTEXT),
    *(f"{name}_dataset.{key}" for name in ("train", "eval") for key in ("packing", "length_buckets")),
)
DATASET = (
    "num_parallel_workers python_multiprocessing drop_remainder repeat numa_enable prefetch_size seed auto_tune "
    "filepath_prefix autotune_per_step profile"
).split()
# what MindFormers dropped in 1.6: optimisers with their successor (its AdamW keeps its state in float32), callbacks
DROPPED = {"FP32StateAdamWeightDecay": "AdamW"}
DROPPED_CALLBACKS = ("ObsMonitor",)
RENAMED_CALLBACKS = {"CheckpointMointor": "CheckpointMonitor"}

# model_config: key, MindFormers' default, value on a CPU
OPERATORS = (
    ("use_flash_attention", False, False),
    ("fused_rms_norm", True, False),
    ("use_rope_slice", False, True),
)
TYPES = {
    "compute_dtype": "float16",
    "param_init_type": "float16",
    "layernorm_compute_type": "float32",
    "softmax_compute_type": "float32",
    "rotary_dtype": "float32",
    "residual_dtype": "float32",
    "embedding_init_type": "float32",
}
# of parallel_config, what a run of one process sets to 1, as MindFormers' trainer does
ALONE = ("data_parallel", "model_parallel", "context_parallel", "expert_parallel", "pipeline_stage", "micro_batch_num")
CPU_CONTEXT = ("mode", "max_call_depth")  # keys of the context that a CPU has


def plain(value: Any) -> Any:
    """``value`` as YAML writes it; a text such as ``1e-4``, which YAML 1.1 does not read as a number, becomes one."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def for_mindformers(given: dict, sections: dict, train_files: list[str], eval_files: list[str], max_steps: int) -> dict:
    """MindFormers' configuration.

    Args:
        given: the keys that the user gave, by the YAML's names.
        sections: those that MindFormers gets unchanged.
        train_files, eval_files: MindRecord files; no eval_files: no evaluation.
        max_steps: optimiser steps of the run, where above 0.
    """
    settings = {key: value for key, value in given.items() if key not in OUR_TOP} | plain(sections)
    runner = {key: value for key, value in given.get("runner_config", {}).items() if key not in OUR_RUNNER}
    settings["runner_config"] = {"epochs": 1, "batch_size": 1, "sink_mode": True, **runner}
    settings["context"] = {"mode": 0} | {k: v for k, v in given.get("context", {}).items() if k not in OUR_CONTEXT}
    settings["train_dataset"] = dataset(given.get("train_dataset", {}), train_files, True)
    settings["train_dataset_task"] = {"type": "CausalLanguageModelDataset"}
    settings.pop("eval_dataset", None)
    if eval_files:
        settings["eval_dataset"] = dataset(given.get("eval_dataset", {}), eval_files, False)
        settings["eval_dataset_task"] = {"type": "CausalLanguageModelDataset"}
    settings["do_eval"] = bool(eval_files)
    settings.setdefault("trainer", {"type": "CausalLanguageModelingTrainer", "model_name": "llama"})
    settings.setdefault("metric", {"type": "PerplexityMetric"})
    has_rate = "learning_rate" in settings.get("optimizer", {})
    complete(settings, "optimizer", {"type": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0})
    complete(settings, "runner_wrapper", {"type": "MFTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True})
    settings.setdefault("callbacks", [{"type": "MFLossMonitor"}])
    # a schedule would replace the optimiser's own rate
    if "lr_schedule" in settings or not (has_rate or "grouped_lr_schedule" in settings):
        complete(settings, "lr_schedule", {"type": "CosineWithWarmUpLR", "learning_rate": 1e-4})
    schedule = settings.get("lr_schedule")
    if schedule and max_steps > 0 and schedule.get("total_steps") in (None, -1):
        schedule["total_steps"] = max_steps
    return settings


def complete(settings: dict, name: str, default: dict) -> None:
    """Puts ``default`` under a section that says no ``type``, as one of flags alone does, or is not there."""
    if not settings.get(name, {}).get("type"):
        settings[name] = {**default, **settings.get(name, {})}


def write_settings(file: Path, asked: dict) -> None:
    """Writes the configuration as a file, which MindFormers completes with its own defaults."""
    with saving.new_file(file) as part:
        part.write_text(yaml.safe_dump(asked, sort_keys=False, allow_unicode=True), encoding="utf-8")


def dataset(given: dict, files: list[str], train: bool) -> dict:
    """``train_dataset`` or ``eval_dataset`` of MindRecord files."""
    kept = {key: given[key] for key in DATASET if key in given}
    shuffle = given.get("data_loader", {}).get("shuffle", train)
    place = {"dataset_dir": files[0]} if len(files) == 1 else {"dataset_files": files}
    loader = {"type": "MindDataset", **place, "shuffle": shuffle}
    return {"drop_remainder": train, **kept, "data_loader": loader, "input_columns": ["input_ids", "labels"]}


def without_effect(given: dict) -> list[str]:
    """Our own keys that the user gave a value other than "off", and that have no effect here."""
    found = []
    for key in WITHOUT_EFFECT:
        here: Any = given
        for part in key.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        if here is True or (here and here != 1):
            found.append(key)
    return found


def replace_dropped(settings: dict) -> list[str]:
    """Replaces what this MindFormers no longer has, in place; returns a line for each."""
    lines = []
    kind = settings["optimizer"].get("type")
    if kind in DROPPED:
        optimizer = settings["optimizer"] = {**settings["optimizer"], "type": DROPPED[kind]}
        if "beta1" in optimizer or "beta2" in optimizer:
            optimizer["betas"] = [optimizer.pop("beta1", 0.9), optimizer.pop("beta2", 0.999)]
        lines.append(f"optimizer.type {kind}, which MindFormers has dropped: its {DROPPED[kind]} instead")
    for key in ("callbacks", "eval_callbacks"):
        old = settings.get(key) or []
        old = [{**one, "type": RENAMED_CALLBACKS.get(one.get("type"), one.get("type"))} for one in old]
        settings[key] = [callback for callback in old if callback["type"] not in DROPPED_CALLBACKS]
        names = ", ".join(callback["type"] for callback in old if callback not in settings[key])
        lines += [f"{key} without {names}, which MindFormers has dropped"] if names else []
    return lines


def adapt_to_cpu(settings: dict, model: dict) -> list[str]:
    """Changes what a CPU cannot run, in place; returns a line for each.

    model: LlamaConfig's arguments.

    Raises:
        LoraMsError: several processes are asked for.
    """
    if settings.get("use_parallel"):
        raise LoraMsError(
            "use_parallel: MindFormers' parallel modes need Ascend; give --use_parallel False, or --backend native, "
            "which runs several processes on a CPU, too"
        )
    lines = []
    for key, default, value in OPERATORS:
        if model.get(key, default) != value:
            lines.append(f"model_config.{key} {value}: the other operator needs Ascend")
        model[key] = value
    other = [
        f"{key} {model.get(key, default)}" for key, default in TYPES.items() if model.get(key, default) != "float32"
    ]
    if other:
        lines.append(f"all types float32, in place of {', '.join(other)}")
    model |= dict.fromkeys(TYPES, "float32")
    runner = settings["runner_config"]
    wrapper = settings["runner_wrapper"]
    if runner["sink_mode"]:
        lines.append("runner_config.sink_mode False: there is no device to feed")
    runner["sink_mode"] = False
    accumulated = runner.pop("gradient_accumulation_steps", 1)
    if accumulated > 1:
        runner["batch_size"] *= accumulated
        lines.append(f"batch_size {runner['batch_size']}: {accumulated} accumulated micro-batches in one")
    for name in ("train_dataset", "eval_dataset"):
        workers = settings.get(name, {}).get("num_parallel_workers", 8)
        cores = os.cpu_count() or 1
        if name in settings and workers > cores:
            settings[name]["num_parallel_workers"] = cores
            lines.append(f"{name}.num_parallel_workers {cores}, in place of {workers}: as many as there are cores")
    lines.append(f"runner_wrapper {STEP}, in place of {wrapper.get('type')}: no NPU overflow operators, no loss scale")
    wrapper |= {"type": STEP, "scale_sense": 1.0}
    dropped = [key for key in settings["context"] if key not in (*CPU_CONTEXT, "device_target", "device_id")]
    if dropped:
        lines.append(f"context without {', '.join(dropped)}: settings of Ascend's")
    kept = {key: settings["context"][key] for key in CPU_CONTEXT if key in settings["context"]}
    settings["context"] = {"mode": 0, **kept, "device_target": "CPU"}
    return lines
