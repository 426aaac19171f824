"""Write trace_<variant>_<model>.npz: the runs of make_trace.py with the other members of the LoRA family.

Rows, loss, clipping and AdamW are make_trace.py's. The rate is constant, tensors of fewer than two dimensions do not
decay. LoRA+ has PEFT's own optimizer instead; AdaLoRA's extra steps are in `Recipe.adalora`.
"""

import zlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from common import REFERENCE_DIR, load_reference_model, save_npz
from make_trace import MICRO_BATCHES, WEIGHT_DECAY, make_rows, print_rounding, summed_loss
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer

STEPS = 12
BETAS = (0.9, 0.999)
RANK, ALPHA = 3, 4
SOME = ["q_proj", "v_proj", "down_proj"]
A_STD = 0.05
# "norm" is a suffix for PEFT: it also names the post-attention, q and k norms.
SAVED = ["lm_head", "embed_tokens", "norm", "input_layernorm"]
Q, HEAD, EMBED = ["q_proj"], ["lm_head"], ["embed_tokens"]
TOKENS = list(range(100, 4, -8))
LORAPLUS_RATIO = 16.0
ADALORA = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": STEPS,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
}


class Recipe(NamedTuple):
    """A run: PEFT's settings beside rank 3 and alpha 4 on q, v and down.

    A larger `eps` where some gradients are mostly rounding, which Adam would divide by itself.
    AdaLoRA adds its orthogonality term once to the loss of a step, and calls update_and_allocate with the number of
    the step, from 0, between the optimizer's step and the next zero_grad: it sees the clipped gradients.
    """

    model: str
    settings: dict[str, Any]
    max_grad_norm: float
    learning_rate: float = 5e-3
    eps: float = 1e-8
    loraplus: bool = False
    adalora: bool = False


RECIPES = {
    "rslora_llama3": Recipe("llama3", {"use_rslora": True}, 1.0),
    "dora_qwen2": Recipe("qwen2", {"use_dora": True}, 0.72),
    "dora_qwen3": Recipe("qwen3", {"use_dora": True}, 0.62),
    "pissa_qwen2": Recipe("qwen2", {"init_lora_weights": "pissa"}, 2.7),
    "olora_llama3": Recipe("llama3", {"init_lora_weights": "olora"}, 3.5),
    "loraplus_llama3": Recipe("llama3", {}, 0.6, learning_rate=5e-4, loraplus=True),
    "modules_to_save_qwen3": Recipe("qwen3", {"target_modules": Q, "modules_to_save": SAVED}, 3.9, eps=1e-6),
    "modules_to_save_head_qwen2": Recipe("qwen2", {"target_modules": Q, "modules_to_save": HEAD}, 1.6, eps=1e-6),
    "modules_to_save_embed_qwen2": Recipe("qwen2", {"target_modules": Q, "modules_to_save": EMBED}, 5.0, eps=1e-4),
    "embed_lora_qwen3": Recipe("qwen3", {"target_modules": Q + EMBED}, 0.5),
    "lora_bias_qwen2": Recipe("qwen2", {"lora_bias": True}, 0.95),
    "bias_all_qwen2": Recipe("qwen2", {"bias": "all"}, 0.76, eps=1e-4),
    "trainable_tokens_qwen2": Recipe("qwen2", {"trainable_token_indices": TOKENS}, 0.9, eps=1e-6),
    "adalora_qwen2": Recipe("qwen2", ADALORA, 0.18, adalora=True),
    "adalora_llama3": Recipe("llama3", ADALORA, 0.18, adalora=True),
}


def trainable_model(recipe: Recipe, seed: int, dtype: torch.dtype) -> PeftModel:
    """The model with PEFT's adapter as it starts, but for the random factor: fixed by the seed, A_STD wide."""
    settings = {"lora_alpha": ALPHA, "target_modules": SOME, "task_type": "CAUSAL_LM"} | recipe.settings
    config = AdaLoraConfig(**settings) if recipe.adalora else LoraConfig(**{"r": RANK} | settings)
    model = get_peft_model(load_reference_model(recipe.model), config)
    rng = np.random.default_rng(seed)
    drawn = ("lora_A", "lora_embedding_B") + (("lora_B",) if recipe.adalora else ())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in drawn) and "init_lora_weights" not in recipe.settings:
                values = A_STD * rng.standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.to(dtype).train()


def saved_name(name: str) -> str:
    """The name under which PEFT saves a trained parameter of this name."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def trained_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Trained parameters by the names PEFT saves them under."""
    return {saved_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(recipe: Recipe, model: PeftModel) -> torch.optim.Optimizer:
    """AdamW in two groups, or in the groups of PEFT's LoRA+."""
    if recipe.loraplus:
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=recipe.learning_rate,
            loraplus_lr_ratio=LORAPLUS_RATIO,
            loraplus_weight_decay=WEIGHT_DECAY,
            betas=BETAS,
            eps=recipe.eps,
        )
    trained = list(trained_parameters(model).values())
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, eps=recipe.eps)


def orthogonality(model: PeftModel) -> torch.Tensor:
    """AdaLoRA's weighted orthogonality term, out of PEFT's own forward with nothing but a zero loss inside."""
    inner = model.base_model
    inner.model.forward = lambda: SimpleNamespace(loss=torch.zeros((), dtype=next(model.parameters()).dtype))
    try:
        return inner.forward().loss
    finally:
        del inner.model.forward


def allocate(model: PeftModel, step: int) -> dict[str, Any]:
    """AdaLoRA's update after a step: its budget, and which triplets of each module it keeps, [init_r] of 0 and 1."""
    allocator, config = model.base_model.rankallocator, model.peft_config["default"]
    model.base_model.update_and_allocate(step)
    pattern = config.rank_pattern or {}
    kept = {"budget": allocator.budget_schedule(step)[0]}
    for name, parameter in trained_parameters(model).items():
        if name.endswith("lora_E"):
            key = f"{name.removeprefix('base_model.model.')}.default"
            kept[f"rank_pattern/{name.removesuffix('.lora_E')}"] = pattern.get(key, [True] * len(parameter))
    return kept


def backward(model: PeftModel, recipe: Recipe, arrays: dict[str, np.ndarray], step: int) -> dict[str, float]:
    """Gradients of one step's loss; the loss, and for AdaLoRA its two parts."""
    count, ce = arrays["label_tokens"][step].sum(), 0.0
    for micro in range(MICRO_BATCHES):
        part = summed_loss(model, *(arrays[key][step, micro] for key in ("input_ids", "labels", "lengths"))) / count
        part.backward()
        ce += part.item()
    if not recipe.adalora:
        return {"loss": ce}
    term = orthogonality(model)
    term.backward()
    return {"loss": ce + term.item(), "ce": ce, "orthogonality": term.item()}


def settings_arrays(recipe: Recipe, optimizer: torch.optim.Optimizer, model: PeftModel) -> dict[str, np.ndarray]:
    """Hyper-parameters; with LoRA+ the rate and the decay of every tensor as well."""
    values = {"max_grad_norm": recipe.max_grad_norm, "weight_decay": WEIGHT_DECAY, "eps": recipe.eps}
    values["lora_alpha"] = ALPHA
    if recipe.adalora:
        values |= recipe.settings
    else:
        values |= {"lora_rank": RANK, "use_rslora": int(recipe.settings.get("use_rslora", False))}
    if recipe.loraplus:
        values["loraplus_lr_ratio"] = LORAPLUS_RATIO
        names = {id(parameter): name for name, parameter in trained_parameters(model).items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values[f"learning_rate/{names[id(parameter)]}"] = group["lr"]
                values[f"decay/{names[id(parameter)]}"] = group["weight_decay"]
    return {key: np.array(value) for key, value in values.items()}


def run(name: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """Train and return the arrays of the npz."""
    seed = zlib.crc32(name.encode())
    arrays = make_rows(np.random.default_rng(seed), STEPS)
    model = trainable_model(recipe, seed + 1, dtype)
    trained = trained_parameters(model)
    if not recipe.adalora and (unsaved := set(trained) - set(get_peft_model_state_dict(model))):
        raise SystemExit(f"{name}: PEFT does not save {sorted(unsaved)}")
    # Whole modules and biases start as the base model has them.
    arrays |= {f"initial/{key}": p.detach().numpy().copy() for key, p in trained.items() if "lora_" in key}
    optimizer = make_optimizer(recipe, model)
    arrays |= settings_arrays(recipe, optimizer, model)
    per_step: dict[str, list] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        row = backward(model, recipe, arrays, step)
        if step == 0:
            arrays |= {f"first_grad/{key}": p.grad.numpy().copy() for key, p in trained.items()}
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.max_grad_norm).item()
        row["learning_rate"] = recipe.learning_rate
        optimizer.step()
        if recipe.adalora:
            row |= allocate(model, step)
        for key, value in row.items():
            per_step.setdefault(key, []).append(value)
    arrays |= {key: np.array(values) for key, values in per_step.items()}
    return arrays | {f"final/{key}": p.detach().numpy().copy() for key, p in trained.items()}


def main() -> None:
    for name, recipe in RECIPES.items():
        arrays, double = run(name, recipe), run(name, recipe, torch.float64)
        print_rounding(name, arrays, double)
        for key in (key for key in arrays if key.startswith("rank_pattern/")):
            if (arrays[key] != double[key]).any():
                raise SystemExit(f"{name}: float64 keeps other triplets of {key}: choose another seed")
            print(f"{name} {key}: {arrays[key].sum(1).tolist()}")
        clipped = int((arrays["grad_norm"] > recipe.max_grad_norm).sum())
        if clipped in (0, STEPS):
            raise SystemExit(f"{name}: clipped at {clipped} of {STEPS} steps: choose another norm")
        print(f"{name}: clipped at {clipped} of {STEPS} steps")
        save_npz(REFERENCE_DIR / f"trace_{name}.npz", arrays)


if __name__ == "__main__":
    main()
