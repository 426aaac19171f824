"""Llama's config.json as a ``DecoderConfig`` (Llama 2, 3, 3.1, 3.2, and DeepSeek-R1-Distill-Llama)."""

from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig

# the keys of rope_scaling that each type needs
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope(hf: dict) -> tuple[float, dict | None]:
    """Base and scaling from either layout: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters`` (since 5.0)."""
    parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(parameters.pop("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if kind not in ROPE_TYPES:
        raise LoraMsError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    missing = [key for key in ROPE_TYPES[kind] if key not in parameters]
    if missing:
        raise LoraMsError(f"config.json: rope_type {kind} needs {', '.join(missing)}")
    return theta, None if kind == "default" else {"rope_type": kind, **parameters}


def common_sizes(hf: dict) -> dict:
    """The fields of ``DecoderConfig`` that all families have, by the names of config.json."""
    if hf.get("hidden_act", "silu") != "silu":
        raise LoraMsError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; supported: silu")
    theta, scaling = rope(hf)
    heads = hf["num_attention_heads"]
    eos = hf.get("eos_token_id")
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    }


def llama_config(hf: dict) -> DecoderConfig:
    """hf: the parsed config.json.

    Raises:
        LoraMsError: it asks for what the decoder does not compute.
    """
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise LoraMsError(f"config.json: {key} true is not supported for Llama")
    return DecoderConfig(**common_sizes(hf))
