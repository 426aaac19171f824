"""The settings of a run: a configuration that says nothing gives their defaults, and every key reaches its setting."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest

import lora_ms
from lora_ms.config import load_config
from lora_ms.config.problems import known_keys
from lora_ms.config.schema import RunConfig
from lora_ms.recipes.settings import settings_of
from lora_ms.train.settings import TrainSettings, yaml_keys

LONGEST = 4096  # tokens that the model takes
# settings whose key is a property of RunConfig, or has its own words: key of the YAML, value, and the setting's
OTHER_KEYS = {
    "batch_size": ("runner_config.batch_size", 3, 3),
    "learning_rate": ("lr_schedule.learning_rate", 0.5, 0.5),
    "lr_kind": ("lr_schedule.type", "linear", "linear"),
    "eight_bits": ("optimizer.type", "AdamW8bit", True),
    "paged": ("optimizer.type", "PagedAdamW", True),
    "betas": ("optimizer.betas", [0.5, 0.6], (0.5, 0.6)),
    "max_grad_norm": ("runner_wrapper.max_grad_norm", 2.0, 2.0),
    "logging_steps": ("runner_config.logging_steps", 5, 5),
    "save_steps": ("callbacks.1.save_checkpoint_steps", 6, 6),
    "keep_checkpoint_max": ("callbacks.1.keep_checkpoint_max", 7, 7),
    "resume": ("resume_training", "step_8", "step_8"),
    "memory_budget_mb": ("context.max_device_memory", "2GB", 2048.0),
}


def settings(options: list[str] = ()) -> TrainSettings:
    return settings_of(load_config(None, options=options), LONGEST)


def test_a_configuration_that_says_nothing_gives_the_defaults():
    found, defaults = asdict(settings()), asdict(TrainSettings(Path("output")))
    different = {name: value for name, value in found.items() if value != defaults[name]}
    assert different == {"eval_steps": 100}  # of a run that evaluates, by MindFormers' default


@pytest.mark.parametrize("name", yaml_keys())
def test_every_key_reaches_its_setting(name):
    default = getattr(settings(), name)
    if name in OTHER_KEYS:
        key, value, expected = OTHER_KEYS[name]
    else:
        key = yaml_keys()[name].replace("pet_config.", "model.model_config.pet_config.")
        assert key in known_keys(RunConfig)
        value = expected = not default if isinstance(default, bool) else default + 3
    assert expected != default
    assert getattr(settings([f"{key}={value}"]), name) == expected


def test_without_an_adapter_its_settings_are_the_defaults():
    assert settings(["pet_config=null"]) == settings()


def test_arguments_by_transformers_names(tmp_path):
    """Every argument that is a setting reaches it; those that are more than a copy are tested beside the interface."""
    given = {
        "learning_rate": 0.5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_steps": 5,
        "max_seq_length": 6, "weight_decay": 0.7, "adam_epsilon": 0.8, "max_grad_norm": 0.9, "loraplus_lr_ratio": 10.0,
        "neftune_noise_alpha": 11.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.2, "warmup_steps": 13,
        "logging_steps": 14, "seed": 15, "packing": False, "gradient_checkpointing": True,
        "resume_from_checkpoint": "step_16",
    }  # fmt: skip
    changed = asdict(lora_ms.TrainingArguments(tmp_path, **given).settings())
    plain = asdict(lora_ms.TrainingArguments(tmp_path).settings())
    values = [changed[field.name] for field in fields(TrainSettings) if changed[field.name] != plain[field.name]]
    assert sorted(map(str, values)) == sorted(map(str, given.values()))
