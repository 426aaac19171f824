"""``adapter_config.json``, both ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_ms.adapters.matching import leaf_of
from lora_ms.adapters.methods import METHODS
from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.errors import LoraMsError

# keys that change numbers and are not computed here, beside those that are empty
UNSUPPORTED = (
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
)


@dataclass(frozen=True)
class Adapted:
    """The adapter in a model, by path: modules that it adapts, modules that it saves whole, and plain modules."""

    specs: Mapping[str, Any]  # of the adapters, as the method has them
    saved: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


def to_peft(config: AdapterConfig, found: Adapted, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json of the adapter ``found``.

    PEFT puts an adapter on every module whose path ends with one of ``target_modules``, and then misses the tensors of
    those that have none in the file. So leaf names are written where they choose exactly the adapted modules, and
    whole paths otherwise.
    """
    leaves = {leaf_of(name) for name in found.specs}
    ambiguous = any(leaf_of(name) in leaves for name in found.plain) or config.tells_paths_apart(found.specs)
    targets = sorted(found.specs if ambiguous else leaves)
    placing = {
        "target_modules": targets,
        "exclude_modules": None,  # what it left out is not in target_modules
        "modules_to_save": sorted(found.saved) or None,
    }
    return {
        "peft_type": config.PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **{key: placing[key] for key in config.PEFT_PLACING},
        **config.to_peft(found.specs, targets),
    }


def from_peft(peft: Mapping[str, Any], where: str) -> AdapterConfig:
    """The settings in a parsed adapter_config.json; ``where`` begins every error.

    Raises:
        LoraMsError: another peft_type, keys that are missing, or that ask for what is not computed here; all are
            listed.
    """
    methods = {method.PEFT_TYPE: method for method in METHODS.values()}
    kind = peft.get("peft_type")
    if kind not in methods:
        raise LoraMsError(f"{where}: peft_type {kind!r} is not supported; supported: {', '.join(methods)}")
    method = methods[kind]
    faults = [f"{key}: {peft[key]}" for key in UNSUPPORTED if peft.get(key) and key not in method.PEFT_KEYS]
    if faults:
        raise LoraMsError(f"{where}: not supported: {', '.join(faults)}")
    missing = [key for key in method.PEFT_REQUIRED if peft.get(key) is None]
    if missing:
        raise LoraMsError(f"{where}: {', '.join(missing)} is missing")
    try:
        return method.from_peft(peft)
    except LoraMsError as error:
        raise LoraMsError(f"{where}: {error}") from None
    except TypeError as error:
        raise LoraMsError(f"{where}: a value of the wrong type ({error})") from None
