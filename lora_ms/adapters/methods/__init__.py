"""The methods of adapting a model, each a slice of its own. ``base`` says what a method is."""

from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.adapters.methods.bottleneck import BottleneckConfig
from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.methods.miss import MissConfig
from lora_ms.adapters.methods.prefix import PrefixTuningConfig
from lora_ms.adapters.methods.prompt import PromptTuningConfig
from lora_ms.adapters.methods.ptuning import PTuningConfig
from lora_ms.adapters.methods.vera import VeraConfig

METHODS: dict[str, type[AdapterConfig]] = {  # by pet_config's pet_type; the first is the default
    "lora": LoraConfig,
    "adalora": AdaLoraConfig,
    "ia3": IA3Config,
    "vera": VeraConfig,
    "miss": MissConfig,
    "prompt": PromptTuningConfig,
    "ptuning": PTuningConfig,
    "prefix": PrefixTuningConfig,
    "adapter": BottleneckConfig,
}

# names of the parameters that adapter cells train, at the end of their paths
PARAMETERS = frozenset(name for method in METHODS.values() for name in method.PARAMETERS)
