"""LoRA fine-tuning of Llama and Qwen models on MindSpore."""

from importlib import import_module

# public name -> the module that has it
MODULES = {
    "AdaLoraConfig": "lora_ms.adapters.config",
    "AutoModelForCausalLM": "lora_ms.python.model",
    "AutoTokenizer": "lora_ms.python.model",
    "LoRADense": "lora_ms.adapters.methods.lora_cells",
    "LoraConfig": "lora_ms.adapters.config",
    "LoraMsError": "lora_ms.errors",
    "PeftModel": "lora_ms.python.peft_model",
    "Trainer": "lora_ms.python.trainer",
    "TrainerCallback": "lora_ms.train.callbacks",
    "TrainingArguments": "lora_ms.python.trainer",
    "get_peft_model": "lora_ms.python.peft_model",
}
__all__ = list(MODULES)


def __getattr__(name: str):
    # MindSpore takes seconds to import: not before a name that needs it is asked for
    if name not in MODULES:
        raise AttributeError(f"module 'lora_ms' has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
