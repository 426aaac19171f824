"""Qwen's config.json as a ``DecoderConfig`` (Qwen2, Qwen2.5, Qwen3 dense, and DeepSeek-R1-Distill-Qwen)."""

from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.llama import common_sizes


def _full_attention(hf: dict) -> dict:
    if hf.get("use_sliding_window"):
        raise LoraMsError("config.json: use_sliding_window true is not supported; set it to false")
    return hf


def qwen2_config(hf: dict) -> DecoderConfig:
    """Biases on q, k and v."""
    return DecoderConfig(**common_sizes(_full_attention(hf)), attention_bias=True)


def qwen3_config(hf: dict) -> DecoderConfig:
    """No biases; queries and keys are normalised per head, over ``head_dim`` (128 where config.json is silent)."""
    if hf.get("attention_bias"):
        raise LoraMsError("config.json: attention_bias true is not supported for Qwen3")
    return DecoderConfig(**common_sizes(_full_attention({"head_dim": 128, **hf})), qk_norm=True)
