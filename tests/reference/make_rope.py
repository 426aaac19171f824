"""Write rope_<name>.npz: logits and greedy tokens under every rotary scaling, past the original length, in float32.

The reference models' config.json is changed in memory: what is scaled is a model of 32 positions, on rows of 96.
"""

import numpy as np
import torch
import transformers
from common import REFERENCE_DIR, save_npz, text_ids

NAMES = ("llama2", "qwen2", "qwen3")
ORIGINAL = 32  # positions
LENGTH = 96
# positions whose logits are kept: on both sides of the original length, and the last
KEPT = np.array([0, 15, 31, 32, 47, 63, 95])
PROMPTS = {"crossing": 24, "beyond": 40}  # lengths: generation crosses the original length, or begins past it
NEW_TOKENS = 16
SMALLEST_MARGIN = 1e-3
SEEDS = {"llama2": 1, "qwen2": 0, "qwen3": 0}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": YARN,
    # several pairs are blended, between fractions of an index
    "yarn_betas": {**YARN, "beta_fast": 4, "beta_slow": 0.05, "truncate": False},
    "yarn_attention": {**YARN, "attention_factor": 1.3, "beta_fast": 4, "beta_slow": 0.25},
    "yarn_mscale": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.7},
}


def model_with(name: str, scaling: dict) -> transformers.PreTrainedModel:
    """The reference model under another scaling; a fresh one, since dynamic NTK remembers the longest row."""
    path = REFERENCE_DIR / "models" / name
    config = transformers.AutoConfig.from_pretrained(path)
    config.max_position_embeddings = ORIGINAL if scaling["rope_type"] == "dynamic" else 4 * ORIGINAL
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **scaling}
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def greedy(model: transformers.PreTrainedModel, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """The new tokens, and the smallest margin between the two best scores."""
    model.generation_config.eos_token_id = None  # every row runs to its end
    output = model.generate(
        torch.from_numpy(ids),
        generation_config=transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    best = torch.stack(output.scores, dim=1).topk(2, dim=-1).values
    return output.sequences.numpy()[:, ids.shape[1] :], float((best[..., 0] - best[..., 1]).min())


@torch.no_grad()
def main() -> None:
    for name in NAMES:
        ids = text_ids(np.random.default_rng(SEEDS[name]), (1, LENGTH))
        arrays = {"input_ids": ids, "positions": KEPT}
        for kind, scaling in ROPES.items():
            logits = model_with(name, scaling)(torch.from_numpy(ids)).logits.numpy()
            arrays[f"{kind}/logits"] = logits[0, KEPT]
            for where, length in PROMPTS.items():
                tokens, margin = greedy(model_with(name, scaling), ids[:, :length])
                if margin < SMALLEST_MARGIN or tokens.shape[1] != NEW_TOKENS:
                    raise SystemExit(
                        f"{name} {kind} {where}: margin {margin:.1e}, {tokens.shape[1]} tokens: other seed"
                    )
                arrays[f"{kind}/{where}"] = tokens[0]
        kinds = [arrays[f"{kind}/logits"][-1] for kind in ROPES]
        apart = min(np.abs(a - b).max() for i, a in enumerate(kinds) for b in kinds[:i])
        save_npz(REFERENCE_DIR / f"rope_{name}.npz", arrays)
        print(f"{name}: kinds differ by {apart:.2e} at least")


if __name__ == "__main__":
    main()
