"""MindFormers' names of weights and Hugging Face's, both ways: its Llama cells (``legacy``) and its ``mcore`` ones."""

import re
from typing import NamedTuple

# Hugging Face's name inside a layer, MindFormers' in its Llama, and in its mcore models
LAYER = (
    ("self_attn.q_proj", "attention.wq", "self_attention.linear_q"),
    ("self_attn.k_proj", "attention.wk", "self_attention.linear_k"),
    ("self_attn.v_proj", "attention.wv", "self_attention.linear_v"),
    ("self_attn.o_proj", "attention.wo", "self_attention.linear_proj"),
    ("self_attn.q_norm", "attention.q_norm", "self_attention.q_layernorm"),
    ("self_attn.k_norm", "attention.k_norm", "self_attention.k_layernorm"),
    ("mlp.gate_proj", "feed_forward.w1", "mlp.gating"),
    ("mlp.up_proj", "feed_forward.w3", "mlp.hidden"),
    ("mlp.down_proj", "feed_forward.w2", "mlp.linear_fc2"),
    ("input_layernorm", "attention_norm", "input_layernorm"),
    ("post_attention_layernorm", "ffn_norm", "pre_mlp_layernorm"),
    # several matrices as one; the names on the left are ours, for what Hugging Face keeps apart
    ("self_attn.qkv_proj", "attention.w_qkv", "self_attention.linear_qkv"),
    ("mlp.gate_up_proj", "feed_forward.w_gate_hidden", "mlp.linear_fc1"),
)
OUTSIDE = (
    ("model.embed_tokens", "model.tok_embeddings", "embedding.word_embeddings"),
    ("model.norm", "model.norm_out", "decoder.final_layernorm"),
    ("lm_head", "lm_head", "output_layer"),
)
STYLES = ("legacy", "mcore")
LAYERS = {"legacy": "model.layers", "mcore": "decoder.layers"}
EMBEDDING = "embedding_weight"  # the legacy name of the embedding's matrix
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# wrappers that may stand before a name; optimiser states, which begin otherwise, are no weights
_WRAPPERS = r"(?:(?:base_model|model|network|module|decoder)\.)*"
_IN_LAYER = re.compile(rf"{_WRAPPERS}layers\.(\d+)\.(.+)")


class Split(NamedTuple):
    """A name taken apart: the module's path, and what follows it."""

    module: str
    rest: str


_TO_HF = {name: row[0] for row in LAYER for name in row}
_OUTSIDE_TO_HF = {name: row[0] for row in OUTSIDE for name in row}


def split_name(name: str) -> Split | None:
    """Hugging Face's path of the module of a MindFormers or Hugging Face name, and the rest of the name.

    Prefixes before ``layers`` and outside modules are left out. None where the module is unknown.
    """
    found = _IN_LAYER.fullmatch(name)
    if found:
        for theirs, ours in _TO_HF.items():
            if found[2].startswith(theirs + "."):
                return Split(f"model.layers.{found[1]}.{ours}", found[2].removeprefix(theirs + "."))
        return None
    for theirs, ours in _OUTSIDE_TO_HF.items():
        found = re.fullmatch(rf"{_WRAPPERS}{re.escape(theirs)}\.(.+)", name)
        if found:
            return Split(ours, found[1])
    return None


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a weight that MindFormers calls ``name``; other names are returned as they are."""
    found = split_name(name)
    if found is None:
        return name
    return f"{found.module}.{'weight' if found.rest == EMBEDDING else found.rest}"


def mindformers_module(module: str, style: str) -> str | None:
    """MindFormers' path of the module that Hugging Face calls ``module``; None where it has none."""
    column = 1 + STYLES.index(style)
    found = _IN_LAYER.fullmatch(module)
    if found:
        rows = [row[column] for row in LAYER if row[0] == found[2]]
        return f"{LAYERS[style]}.{found[1]}.{rows[0]}" if rows else None
    return next((row[column] for row in OUTSIDE if row[0] == module), None)


def mindformers_name(name: str, style: str = "legacy") -> str | None:
    """MindFormers' name of Hugging Face's weight ``name``; None where it has none."""
    module, _, leaf = name.rpartition(".")
    theirs = mindformers_module(module, style)
    if theirs is None:
        return None
    return f"{theirs}.{EMBEDDING if style == 'legacy' and module == 'model.embed_tokens' else leaf}"
