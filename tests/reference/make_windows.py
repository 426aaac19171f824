"""Write windows_<name>.npz: logits, a gradient and greedy tokens of models with sliding windows, in float32.

The reference models' config.json is changed in memory: Llama 2's weights as Mistral's, Qwen2 with a window in the upper
layer, Qwen3 with one in the lower.
"""

import numpy as np
import torch
import transformers
from common import REFERENCE_DIR, save_npz, text_ids

WINDOW = 8  # tokens, the query's own included
LENGTH = 32
PROMPTS = (5, 12)  # lengths: the answer crosses the window, or the prompt does
NEW_TOKENS = 16
SMALLEST_MARGIN = 1e-3
SEEDS = {"mistral": 0, "qwen2": 0, "qwen3": 1}
QWEN = {"use_sliding_window": True, "sliding_window": WINDOW}
# name -> the reference model whose weights it has, and the keys that change in its config.json
WINDOWS = {
    "mistral": (
        "llama2",
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW},
    ),
    "qwen2": ("qwen2", {**QWEN, "max_window_layers": 1, "layer_types": None}),
    "qwen3": ("qwen3", {**QWEN, "layer_types": ["sliding_attention", "full_attention"]}),
}


def model_with(base: str, changes: dict) -> transformers.PreTrainedModel:
    path = REFERENCE_DIR / "models" / base
    settings = transformers.AutoConfig.from_pretrained(path).to_dict() | changes
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None  # every row runs to its end
    return model


def greedy(model: transformers.PreTrainedModel, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """The new tokens, and the smallest margin between the two best scores."""
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


def main() -> None:
    for name, (base, changes) in WINDOWS.items():
        ids = text_ids(np.random.default_rng(SEEDS[name]), (1, LENGTH))
        model, plain = model_with(base, changes), model_with(base, {})
        logits = model(torch.from_numpy(ids)).logits
        apart = (logits - plain(torch.from_numpy(ids)).logits).abs().max()
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.from_numpy(ids[0, 1:]), reduction="sum")
        loss.backward()
        arrays = {"input_ids": ids, "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
        for layer in (0, 1):
            weight = model.model.layers[layer].self_attn.k_proj.weight
            arrays[f"gradient/model.layers.{layer}.self_attn.k_proj.weight"] = weight.grad.numpy()
        for length in PROMPTS:
            tokens, margin = greedy(model, ids[:, :length])
            if margin < SMALLEST_MARGIN or tokens.shape[1] != NEW_TOKENS:
                raise SystemExit(f"{name} {length}: margin {margin:.1e}, {tokens.shape[1]} tokens: other seed")
            arrays[f"greedy/{length}"] = tokens[0]
        save_npz(REFERENCE_DIR / f"windows_{name}.npz", arrays)
        print(f"{name}: the window changes the logits by up to {apart:.2f}")


if __name__ == "__main__":
    main()
