"""Write variants/<name>/ as PEFT saves each kind of adapter, and variants/<name>.npz with the logits it gives.

The logits are those of the directory loaded again into the untouched model, and have to be those of the model that was
saved. Adapters made from the base weights (pissa, olora) and AdaLoRA are in make_variants_init.py.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import REFERENCE_DIR, load_reference_model, save_adapter, save_npz, text_ids
from live_peft import logits_of
from peft import LoraConfig, PeftModel, get_peft_model

VARIANTS_DIR = REFERENCE_DIR / "variants"
FACTOR_STD = 0.2
# Of magnitudes a share, of biases and whole modules an amount.
MAGNITUDE_SPREAD, MODULE_STD = 0.3, 0.1
INPUT_SHAPE = (2, 10)
CLOSE = 1e-4

Q_V = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "target_modules": [*ATTENTION, "down_proj"],
    # A leaf, the end of a path, a regular expression with layer numbers: the first that fits decides.
    "rank_pattern": {"k_proj": 1, "mlp.down_proj": 2, r"layers\.[1-9]\d*\.self_attn\.(q|v)_proj": 4},
    "alpha_pattern": {r"model\.layers\.0\..*o_proj": 7, "v_proj": 3, "1.mlp.down_proj": 8},
}
HEAD, EMBED = ["lm_head", "q_proj"], ["embed_tokens", "q_proj"]
NORMS = ["norm", "input_layernorm"]
TOKENS = list(range(100, 4, -8))


class Recipe(NamedTuple):
    """An adapter: its model, PEFT's settings beside rank 3 and alpha 5, and whether PEFT can merge it."""

    model: str
    settings: dict[str, Any]
    merges: bool = True


RECIPES = {
    "llama3_rslora": Recipe("llama3", {"use_rslora": True}),
    "qwen2_rslora": Recipe("qwen2", {"use_rslora": True}),
    "qwen3_rslora": Recipe("qwen3", {"use_rslora": True}),
    "llama3_dora": Recipe("llama3", {"use_dora": True, "target_modules": [*Q_V, "down_proj"]}),
    "qwen2_dora": Recipe("qwen2", {"use_dora": True, "target_modules": [*Q_V, "down_proj"]}),
    "qwen3_dora": Recipe("qwen3", {"use_dora": True, "target_modules": [*Q_V, "down_proj"]}),
    "qwen2_dora_rslora": Recipe("qwen2", {"use_dora": True, "use_rslora": True}),
    "llama3_rank_alpha_pattern": Recipe("llama3", PATTERNS),
    "qwen2_rank_alpha_pattern": Recipe("qwen2", PATTERNS),
    "qwen3_rank_alpha_pattern": Recipe("qwen3", PATTERNS | {"use_rslora": True}),
    "llama3_layers_to_transform": Recipe("llama3", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "qwen2_layers_to_transform": Recipe("qwen2", {"layers_to_transform": 0}),
    "llama3_exclude_modules": Recipe(
        "llama3", {"target_modules": ATTENTION, "exclude_modules": ["k_proj", "layers.1.self_attn.o_proj"]}
    ),
    "qwen2_exclude_modules": Recipe(
        "qwen2", {"target_modules": "all-linear", "exclude_modules": r".*\.(mlp\..*|layers\.0\..*v_proj)"}
    ),
    "qwen2_regex_target": Recipe("qwen2", {"target_modules": r".*\.layers\.1\.(self_attn\.[qv]|mlp\.up)_proj"}),
    "qwen3_mlp": Recipe("qwen3", {"target_modules": MLP}),
    "llama3_all_linear": Recipe("llama3", {"target_modules": "all-linear"}),
    "qwen2_all_linear": Recipe("qwen2", {"target_modules": "all-linear"}),
    "qwen3_all_linear": Recipe("qwen3", {"target_modules": "all-linear"}),
    "llama2_lm_head": Recipe("llama2", {"target_modules": HEAD}),
    "qwen2_lm_head": Recipe("qwen2", {"target_modules": HEAD}, merges=False),
    "qwen2_lm_head_tying": Recipe("qwen2", {"target_modules": HEAD, "ensure_weight_tying": True}, merges=False),
    "qwen3_lm_head": Recipe("qwen3", {"target_modules": HEAD}),
    "qwen3_lm_head_dora": Recipe("qwen3", {"target_modules": HEAD, "use_dora": True}),
    "llama3_embed": Recipe("llama3", {"target_modules": EMBED}, merges=False),
    "qwen2_embed": Recipe("qwen2", {"target_modules": EMBED}, merges=False),
    "qwen3_embed": Recipe("qwen3", {"target_modules": EMBED}),
    "qwen3_embed_dora": Recipe("qwen3", {"target_modules": EMBED, "use_dora": True}),
    "llama2_modules_to_save_head": Recipe("llama2", {"modules_to_save": ["lm_head"]}),
    "qwen2_modules_to_save_head": Recipe("qwen2", {"modules_to_save": ["lm_head"]}),
    "qwen3_modules_to_save_head": Recipe("qwen3", {"modules_to_save": ["lm_head"]}),
    "llama3_modules_to_save_embed": Recipe("llama3", {"modules_to_save": ["embed_tokens"]}),
    "qwen2_modules_to_save_embed": Recipe("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "qwen2_modules_to_save_tying": Recipe("qwen2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "qwen3_modules_to_save_embed": Recipe("qwen3", {"modules_to_save": ["embed_tokens"]}),
    "llama3_modules_to_save_norms": Recipe("llama3", {"modules_to_save": NORMS}),
    "qwen2_modules_to_save_norms": Recipe("qwen2", {"modules_to_save": NORMS}),
    "qwen3_modules_to_save_norms": Recipe("qwen3", {"modules_to_save": NORMS}),
    "llama3_lora_bias": Recipe("llama3", {"lora_bias": True}, merges=False),
    "qwen2_lora_bias": Recipe("qwen2", {"lora_bias": True}),
    "qwen2_bias_all": Recipe("qwen2", {"bias": "all"}),
    "qwen2_bias_lora_only": Recipe("qwen2", {"bias": "lora_only"}),
    "qwen2_gaussian": Recipe("qwen2", {"init_lora_weights": "gaussian"}),
    "qwen2_trainable_tokens": Recipe("qwen2", {"trainable_token_indices": TOKENS}),
    "qwen3_trainable_tokens_head": Recipe(
        "qwen3", {"trainable_token_indices": {"embed_tokens": TOKENS[:5], "lm_head": TOKENS[2:]}}
    ),
    "qwen2_orthogonal": Recipe("qwen2", {"init_lora_weights": "orthogonal", "r": 4}),
}


@torch.no_grad()
def perturb(model: torch.nn.Module, rng: np.random.Generator, factor_std: float = FACTOR_STD) -> None:
    """Random factors everywhere; magnitudes, biases and whole modules moved away from where PEFT starts them."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + MAGNITUDE_SPREAD * noise.clamp(-2, 2))
        elif "lora_" in name and not name.endswith(".bias"):
            parameter.copy_(factor_std * noise)
        else:
            parameter.add_(MODULE_STD * noise)


@torch.no_grad()
def forward(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits [rows, width, vocabulary] of ids [rows, width] without padding."""
    return model(input_ids=torch.from_numpy(ids)).logits[:, -ids.shape[1] :].numpy()


def check(name: str, arrays: dict, live: np.ndarray, merges: bool) -> None:
    """Stop where the arrays would be a poor reference; `live`: logits of the model that was saved."""
    moved = abs(arrays["logits"] - arrays["base_logits"]).mean()
    if moved < 0.05:
        raise SystemExit(f"{name}: the adapter moves logits by {moved:.1e} on average only")
    reload_gap = abs(arrays["logits"] - live).max()
    if reload_gap > CLOSE:
        raise SystemExit(f"{name}: loaded again, the adapter gives logits off by {reload_gap:.1e}")
    if merges != ("merged_logits" in arrays):
        raise SystemExit(f"{name}: PEFT was expected to merge it: {merges}")
    gap = abs(arrays["merged_logits"] - arrays["logits"]).max() if merges else 0.0
    if gap > CLOSE:
        raise SystemExit(f"{name}: merged logits differ by {gap:.1e}")
    merged = f"merged differ by {gap:.1e}" if merges else "not merged"
    print(f"{name}: logits moved by {moved:.2f} on average, {merged}, loaded again by {reload_gap:.1e}")


def write(
    name: str, model_name: str, model: PeftModel, ids: np.ndarray, merges: bool = True, extra: dict | None = None
) -> None:
    """Save the adapter, load it again and keep the logits of that, with `extra` arrays beside them."""
    save_adapter(model, VARIANTS_DIR / name)
    keep(name, model_name, ids, forward(model, ids), merges, extra)


def keep(
    name: str,
    model_name: str,
    ids: np.ndarray,
    live: np.ndarray,
    merges: bool = True,
    extra: dict | None = None,
) -> None:
    """`write` for a directory that stands already."""
    arrays = logits_of(Path("models") / model_name, VARIANTS_DIR / name, ids)
    check(name, arrays, live, merges)
    save_npz(VARIANTS_DIR / f"{name}.npz", arrays | (extra or {}))


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    """Rank 3, alpha 5 on q and v unless the settings say otherwise."""
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": Q_V, "task_type": "CAUSAL_LM"} | settings)


def main() -> None:
    VARIANTS_DIR.mkdir(exist_ok=True)
    for name, recipe in RECIPES.items():
        seed = zlib.crc32(name.encode())
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        model = get_peft_model(load_reference_model(recipe.model), lora_config(recipe.settings)).eval()
        perturb(model, rng)
        write(name, recipe.model, model, text_ids(rng, INPUT_SHAPE), recipe.merges)


if __name__ == "__main__":
    main()
