"""Mistral's config.json as a ``DecoderConfig``: a Llama whose layers may have a sliding window, as in v0.1."""

from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.llama import common_sizes, window_of

DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def mistral_config(hf: dict) -> DecoderConfig:
    """hf: the parsed config.json. ``sliding_window`` null is none, and a missing one 4096, as in transformers."""
    hf = {**DEFAULTS, **hf}
    window = window_of(hf)
    layers = tuple(range(hf["num_hidden_layers"])) if window else ()
    return DecoderConfig(**common_sizes(hf), sliding_window=window, sliding_layers=layers)
