"""Qwen's config.json as a ``DecoderConfig`` (Qwen2, Qwen2.5, Qwen3 dense, and DeepSeek-R1-Distill-Qwen)."""

from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.llama import common_sizes, window_of

ATTENTION = ("full_attention", "sliding_attention")  # kinds of layers in ``layer_types``


def sliding(hf: dict) -> dict:
    """The window and its layers, as transformers reads them: those of ``layer_types``, else the ones from
    ``max_window_layers`` on; none at all without ``use_sliding_window``.

    Raises:
        LoraMsError: another kind of layers, or layers with a window that is not in use.
    """
    count = hf["num_hidden_layers"]
    window = window_of({"sliding_window": 4096, **hf}) if hf.get("use_sliding_window") else 0
    kinds = hf.get("layer_types")
    if kinds is None:
        lowest = hf.get("max_window_layers", 28)
        if window and type(lowest) is not int:
            raise LoraMsError(f"config.json: max_window_layers {lowest!r} is no number of layers")
        kinds = [ATTENTION[window > 0 and i >= lowest] for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in ATTENTION for kind in kinds):
        raise LoraMsError(
            f"config.json: layer_types {kinds} is not supported; supported: {' or '.join(ATTENTION)} for each of the "
            f"{count} layers"
        )
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if layers and not window:
        raise LoraMsError(
            "config.json: layer_types has sliding_attention, but use_sliding_window is not true or sliding_window is "
            "null: set both, or take layer_types out"
        )
    return {"sliding_window": window if layers else 0, "sliding_layers": layers}


def qwen2_config(hf: dict) -> DecoderConfig:
    """Biases on q, k and v."""
    return DecoderConfig(**common_sizes(hf), **sliding(hf), attention_bias=True)


def qwen3_config(hf: dict) -> DecoderConfig:
    """No biases; queries and keys are normalised per head, over ``head_dim`` (128 where config.json is silent)."""
    if hf.get("attention_bias"):
        raise LoraMsError("config.json: attention_bias true is not supported for Qwen3")
    return DecoderConfig(**common_sizes({"head_dim": 128, **hf}), **sliding(hf), qk_norm=True)
