"""LoRA fine-tuning of Llama and Qwen models on MindSpore."""

__all__ = [
    "AdaLoraConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "LoRADense",
    "LoraConfig",
    "LoraMsError",
    "PeftModel",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "get_peft_model",
]


def __getattr__(name: str):
    # MindSpore takes seconds to import: not before something of it is asked for
    if name == "LoraMsError":
        from lora_ms.errors import LoraMsError

        return LoraMsError
    if name == "LoRADense":
        from lora_ms.adapters.methods.lora_cells import LoRADense

        return LoRADense
    if name in ("PeftModel", "get_peft_model"):
        from lora_ms.python import peft_model

        return getattr(peft_model, name)
    if name.endswith("Config"):
        from lora_ms.adapters.methods import METHODS

        configs = {method.__name__: method for method in METHODS.values()}
        if name in configs:
            return configs[name]
    if name in __all__:
        from lora_ms.python import api

        return getattr(api, name)
    raise AttributeError(f"module 'lora_ms' has no attribute {name!r}")
