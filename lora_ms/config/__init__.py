"""Configuration: MindFormers' YAML schema as typed models. Loads without MindSpore."""

from lora_ms.config.load import dump_config, load_config
from lora_ms.config.model import ModelSizes, PetConfig
from lora_ms.config.presets import PRESETS
from lora_ms.config.schema import RunConfig

__all__ = ["PRESETS", "ModelSizes", "PetConfig", "RunConfig", "dump_config", "load_config"]
