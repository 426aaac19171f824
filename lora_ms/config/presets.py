"""Named settings for ``--preset``: they override the YAML, and flags override them."""

PRESETS = {
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
