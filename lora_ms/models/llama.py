"""Llama's config.json as a ``DecoderConfig`` (Llama 2, 3, 3.1, 3.2, and DeepSeek-R1-Distill-Llama)."""

from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import end_tokens, says_tied
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.rope_settings import rope

# sizes without a default
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def common_sizes(hf: dict) -> dict:
    """The fields of ``DecoderConfig`` that all families have, by the names of config.json."""
    if hf.get("hidden_act", "silu") != "silu":
        raise LoraMsError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; supported: silu")
    theta, scaling = rope(hf)
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads, head_dim = hf.get("num_key_value_heads") or heads, hf.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise LoraMsError(f"config.json: {heads} num_attention_heads cannot share {kv_heads} num_key_value_heads")
    if head_dim < 2 or head_dim % 2:
        raise LoraMsError(f"config.json: heads of {head_dim} channels cannot be rotated: their number must be even")
    return {
        **{key: hf[key] for key in REQUIRED},
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        "tie_word_embeddings": says_tied(hf),
        "eos_token_ids": end_tokens(hf, "config.json"),
    }


def window_of(hf: dict) -> int:
    """Tokens of the sliding window that config.json asks for; 0 for none.

    Raises:
        LoraMsError: sliding_window is no number of tokens.
    """
    window = hf["sliding_window"]
    if window is None:
        return 0
    if type(window) is not int or window < 1:
        raise LoraMsError(f"config.json: sliding_window {window!r} is no number of tokens")
    return window


def llama_config(hf: dict) -> DecoderConfig:
    """hf: the parsed config.json.

    Raises:
        LoraMsError: it asks for what the decoder does not compute.
    """
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise LoraMsError(f"config.json: {key} true is not supported for Llama")
    return DecoderConfig(**common_sizes(hf))
