"""Write adapters/<name>/ as PEFT saves them, and adapter_logits_<name>.npz with the logits they give."""

from typing import NamedTuple

import numpy as np
import torch
from common import REFERENCE_DIR, load_reference_model, save_adapter, save_npz, text_ids
from peft import LoraConfig, PeftModel, get_peft_model

# Large enough that a wrong scaling or a transposed factor moves the logits far beyond any tolerance.
FACTOR_STD = 0.2


class Recipe(NamedTuple):
    """An adapter: the reference model under it, PEFT's settings, and the seed of its weights and input."""

    model: str
    rank: int
    alpha: int
    target_modules: str | list[str]
    seed: int


SOME = ["q_proj", "v_proj", "down_proj"]
RECIPES = {
    "llama3": Recipe("llama3", 4, 8, SOME, 31),
    "qwen2": Recipe("qwen2", 4, 8, SOME, 32),
    "qwen3": Recipe("qwen3", 4, 8, SOME, 33),
    "qwen2_all_linear": Recipe("qwen2", 3, 5, "all-linear", 34),
}


def random_adapter(recipe: Recipe, rng: np.random.Generator) -> PeftModel:
    """The model with an adapter whose two factors are both random, in eval mode."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.target_modules,
        use_rslora=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_reference_model(recipe.model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = FACTOR_STD * rng.standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.eval()


@torch.no_grad()
def main() -> None:
    (REFERENCE_DIR / "adapters").mkdir(exist_ok=True)
    for name, recipe in RECIPES.items():
        rng = np.random.default_rng(recipe.seed)
        model = random_adapter(recipe, rng)
        save_adapter(model, REFERENCE_DIR / "adapters" / name)
        ids = text_ids(rng, (2, 10))
        input_ids = torch.from_numpy(ids)
        logits = model(input_ids=input_ids).logits.numpy()
        with model.disable_adapter():
            base_logits = model(input_ids=input_ids).logits.numpy()
        merged_logits = model.merge_and_unload()(input_ids=input_ids).logits.numpy()
        moved, merge_error = abs(logits - base_logits).mean(), abs(merged_logits - logits).max()
        if moved < 0.1 or merge_error > 1e-4:
            raise SystemExit(f"{name}: adapter moves logits by {moved:.1e}, merging by {merge_error:.1e}: other seed")
        print(f"{name}: logits moved by {moved:.2f} on average, merged differ by {merge_error:.1e}")
        arrays = {"input_ids": ids, "base_logits": base_logits, "logits": logits, "merged_logits": merged_logits}
        save_npz(REFERENCE_DIR / f"adapter_logits_{name}.npz", arrays)


if __name__ == "__main__":
    main()
