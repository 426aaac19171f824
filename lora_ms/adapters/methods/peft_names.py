"""PEFT's names for the arguments of a method: its settings are constructed by these, too."""

import difflib
from abc import ABCMeta
from dataclasses import fields
from typing import Any

from lora_ms.errors import LoraMsError

ALIASES = {"r": "lora_rank", "init_r": "lora_rank", "target_r": "target_rank"}
NO_EFFECT = (  # of these, PEFT's values change no number here
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "init_ia3_weights"),
)
REFUSED = (  # and of these they would
    *("fan_in_fan_out", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("layer_replication", "use_qalora", "qalora_group_size", "use_bdlora", "arrow_config"),
)
TASKS = ("CAUSAL_LM", None)


class ByPeftNames(ABCMeta):
    """Classes whose constructor takes PEFT's names beside their own."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        return super().__call__(*args, **translated(cls, given))


def translated(method: type, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` by our names; prints a line of what has no effect.

    Raises:
        LoraMsError: an unknown name, one given under two names, or what is not supported.
    """
    known = [option.name for option in fields(method) if option.init]
    found: dict[str, Any] = {}
    idle = []
    for name, value in given.items():
        ours = ALIASES.get(name, name)
        if ours in known:
            # AdaLoRA's r is PEFT's leftover beside init_r
            if ours in found and found[ours] != value and "init_r" not in given:
                raise LoraMsError(
                    f"{method.__name__}: {ours} is given as {found[ours]} and as {value}: give one of them"
                )
            if (ours not in found or name != "r") and not (name == "target_modules" and value is None):
                found[ours] = value
        elif name == "task_type":
            task = getattr(value, "value", value)  # PEFT's is an enum
            if task not in TASKS:
                raise LoraMsError(f"{method.__name__}: task_type {task!r} is not supported: CAUSAL_LM is")
        elif name in REFUSED:
            if value:
                raise LoraMsError(f"{method.__name__}: {name} is not supported: leave it out")
        elif name in NO_EFFECT:
            idle += [name] if value else []
        else:
            near = difflib.get_close_matches(name, [*known, *ALIASES, "task_type"], 1, 0.0)[0]
            raise LoraMsError(f"{method.__name__}: unknown argument {name}; the nearest is {near}")
    if idle:
        print(f"no effect here: {', '.join(idle)} of {method.__name__}")
    return found
