"""SmolLM3's config.json as a ``DecoderConfig``: a Llama that rotates queries and keys in three layers of four."""

from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.llama import common_sizes
from lora_ms.models.qwen import ATTENTION, sliding

DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "no_rope_layer_interval": 4,
    "sliding_window": None,
}


def unrotated(hf: dict) -> tuple[int, ...]:
    """Indices of the layers that do not rotate: those with a 0 in ``no_rope_layers`` (a 1 rotates, whatever its name
    says), else the last of every ``no_rope_layer_interval``.

    Raises:
        LoraMsError: no_rope_layers does not say it of every layer.
    """
    count, flags, interval = hf["num_hidden_layers"], hf.get("no_rope_layers"), hf["no_rope_layer_interval"]
    if flags is None:
        return tuple(range(interval - 1, count, interval))
    if len(flags) < count or any(flag not in (0, 1) for flag in flags):
        raise LoraMsError(f"config.json: no_rope_layers {flags} is not 0 or 1 for each of the {count} layers")
    return tuple(i for i in range(count) if flags[i] == 0)


def smollm3_config(hf: dict) -> DecoderConfig:
    """hf: the parsed config.json. A sliding window is, without ``layer_types``, in the layers that do not rotate.

    Raises:
        LoraMsError: it asks for what the decoder does not compute.
    """
    hf = {**DEFAULTS, **hf}
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise LoraMsError(f"config.json: {key} true is not supported for SmolLM3")
    layers = unrotated(hf)
    if hf.get("layer_types") is None:
        has_window = bool(hf.get("use_sliding_window")) and hf["sliding_window"] is not None
        hf["layer_types"] = [ATTENTION[has_window and i in layers] for i in range(hf["num_hidden_layers"])]
    return DecoderConfig(**common_sizes(hf), **sliding(hf), unrotated_layers=layers)
