"""LoRA fine-tuning of Llama, Mistral, Qwen and SmolLM3 models on MindSpore."""

from importlib import import_module

__version__ = "0.1.0"  # the one place that says so

# public name -> the module that has it; besides these, the settings of each method, such as LoraConfig
MODULES = {
    "AutoModelForCausalLM": "lora_ms.python.model",
    "BitsAndBytesConfig": "lora_ms.python.model",
    "AutoTokenizer": "lora_ms.python.model",
    "LoRADense": "lora_ms.adapters.methods.lora_cells",
    "LoraMsError": "lora_ms.errors",
    "TaskType": "lora_ms.python.model",
    "PeftModel": "lora_ms.python.peft_model",
    "Trainer": "lora_ms.python.trainer",
    "TrainerCallback": "lora_ms.train.callbacks",
    "TrainingArguments": "lora_ms.python.arguments",
    "evaluate_custom": "lora_ms.python.evaluation",
    "get_peft_model": "lora_ms.python.peft_model",
}


def __getattr__(name: str):
    # MindSpore takes seconds to import: not before a name that needs it is asked for
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    if name.endswith("Config") or name == "__all__":
        from lora_ms.adapters.methods import METHODS

        configs = {method.__name__: method for method in METHODS.values()}
        if name == "__all__":
            return sorted([*MODULES, *configs])
        if name in configs:
            return configs[name]
    raise AttributeError(f"module 'lora_ms' has no attribute {name!r}")
