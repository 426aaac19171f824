"""Named settings for ``--preset``: they override the YAML, and flags override them."""

from typing import Any

# What context.low_memory stands for, where the YAML and the flags say nothing else. The rows of a step stay: those of a
# micro-batch are taken one after another (load.lower_memory).
LOW_MEMORY = {"model.model_config.compute_dtype": "float16", "recompute_config.recompute": True}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Tens of rows: many passes with a high rate, so that facts which occur once are learnt.
    "few_rows": {
        "pet_config": {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05},
        "lr_schedule": {"learning_rate": 1e-3},
        "runner_config": {"epochs": 15, "batch_size": 4},
    },
    # Hundreds of rows: few adapter parameters and much dropout, against learning them by heart.
    "small_dataset": {
        "pet_config": {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.2},
        "lr_schedule": {"learning_rate": 1e-4},
    },
    # Tens of thousands of rows: more room, and smaller steps because there are many of them.
    "large_dataset": {
        "pet_config": {"lora_rank": 16, "lora_alpha": 64, "lora_dropout": 0.05},
        "lr_schedule": {"learning_rate": 3e-5},
    },
}
