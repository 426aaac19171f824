"""No key is accepted and then forgotten: each is read somewhere, or declared to have no effect."""

import ast
from pathlib import Path

from lora_ms.config.callbacks import CALLBACKS
from lora_ms.config.problems import known_keys
from lora_ms.config.schema import RunConfig, without_effect
from lora_ms.objectives import OBJECTIVES

PACKAGE = Path(__file__).parents[2] / "lora_ms"

# keys that only decide what a property of RunConfig or of their section says, with its name
DECIDES = {
    "pretrained_model_dir": "load_checkpoint",
    "optimizer.beta1": "betas",
    "optimizer.beta2": "betas",
    "lr_schedule.type": "kind",
    "eval_dataset.batch_size": "eval_batch_size",
    "callbacks.CheckpointMonitor.save_checkpoint_steps": "save_steps",
    "callbacks.MFLossMonitor.per_print_times": "logging_steps",
    "profile": "profiling",
    "profile_start_step": "profiling",
    "profile_stop_step": "profiling",
    "do_eval": "evaluates",
    "eval_step_interval": "eval_intervals",
    "eval_epoch_interval": "eval_intervals",
    "callbacks.EvalCallBack.step_interval": "eval_intervals",
    "callbacks.EvalCallBack.epoch_interval": "eval_intervals",
    "runner_wrapper.use_clip_grad": "max_grad_norm",
    "objectives.ewc.lambda": "strength",
    **{
        f"{name}_dataset.{key}": "sources"
        for name in ("train", "eval")
        for key in ("data_loader.dataset_dir", "data_loader.path", "data_loader.data_files", "mix.dataset_dir")
    },
}
# keys of which every accepted value means the same, and the one on which the command line itself decides
CHECKED_ON_LOADING = {
    "backend",
    "run_mode",
    "auto_trans_ckpt",
    "optimizer.type",
    "train_dataset.data_loader.type",
    "eval_dataset.data_loader.type",
    "runner_wrapper.type",
    "model.model_config.pet_config.pet_type",
    *(f"callbacks.{kind}.type" for kind in CALLBACKS),
    *(f"objectives.{kind}.type" for kind in OBJECTIVES),
}


def attributes_read():
    """Names of attributes that are read outside config/, and those on the keys that TrainSettings' fields name."""
    files = [path for path in PACKAGE.rglob("*.py") if "config" not in path.parts and "cli" not in path.parts]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    calls = (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "setting")
    keys = (ast.literal_eval(call.args[1]) for call in calls if len(call.args) > 1)
    return read.union(*(key.split(".") for key in keys))


def test_every_key_is_read_or_declared_idle():
    read = attributes_read()
    unread = [
        path
        for path, field in known_keys(RunConfig).items()
        if not without_effect(field)
        and path not in CHECKED_ON_LOADING
        and DECIDES.get(path, path.rpartition(".")[2]) not in read
    ]
    assert unread == []
