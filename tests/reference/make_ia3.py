"""Write variants/<model>_ia3…/ with their logits, and trace_ia3_<model>.npz: IA3 as PEFT has it.

As make_variants.py and make_variant_traces.py, whose checks hold here, too.
"""

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from common import REFERENCE_DIR, load_reference_model, save_npz, text_ids
from make_trace import WEIGHT_DECAY, make_rows, print_rounding
from make_variant_traces import BETAS, STEPS, backward, trained_parameters
from make_variant_traces import Recipe as TraceRecipe
from make_variants import INPUT_SHAPE, write
from peft import IA3Config, PeftModel, get_peft_model

SCALE_STD = 0.3  # of the vectors around one, and of whole modules around the model's
SOME = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


class Recipe(NamedTuple):
    """An adapter: its model and PEFT's settings."""

    model: str
    settings: dict[str, Any]


VARIANTS = {
    "llama3_ia3": Recipe("llama3", SOME),
    "qwen2_ia3": Recipe("qwen2", SOME),
    "qwen3_ia3": Recipe("qwen3", SOME),
    "qwen2_ia3_regex": Recipe(
        "qwen2", {"target_modules": r".*\.(q|o|up)_proj", "feedforward_modules": r".*layers\.1\..*o_proj"}
    ),
    "qwen3_ia3_lm_head": Recipe(
        "qwen3",
        {"target_modules": ["v_proj", "lm_head"], "feedforward_modules": [], "modules_to_save": ["model.norm"]},
    ),
}
TRACES = {
    "ia3_qwen2": TraceRecipe("qwen2", SOME, 0.9),
    "ia3_llama3": TraceRecipe("llama3", SOME, 0.9),
}


@torch.no_grad()
def move(model: torch.nn.Module, rng: np.random.Generator, std: float) -> None:
    """Random numbers of this spread added to everything that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = std * rng.standard_normal(tuple(parameter.shape))
            parameter.add_(torch.from_numpy(noise.astype(np.float32)))


def adapted(name: str, settings: dict[str, Any]) -> PeftModel:
    return get_peft_model(load_reference_model(name), IA3Config(task_type="CAUSAL_LM", **settings))


def trace(name: str, recipe: TraceRecipe, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """Train and return the arrays of the npz; the vectors start around one."""
    seed = zlib.crc32(name.encode())
    arrays = make_rows(np.random.default_rng(seed), STEPS)
    model = adapted(recipe.model, recipe.settings)
    move(model, np.random.default_rng(seed + 1), 0.05)
    model = model.to(dtype).train()
    trained = trained_parameters(model)
    arrays |= {f"initial/{key}": p.detach().numpy().copy() for key, p in trained.items()}
    settings = {"max_grad_norm": recipe.max_grad_norm, "weight_decay": WEIGHT_DECAY, "eps": recipe.eps}
    arrays |= {key: np.array(value) for key, value in settings.items()}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=recipe.learning_rate, betas=BETAS, eps=recipe.eps, weight_decay=WEIGHT_DECAY
    )
    per_step: dict[str, list] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        row = backward(model, recipe, arrays, step)
        if step == 0:
            arrays |= {f"first_grad/{key}": p.grad.numpy().copy() for key, p in trained.items()}
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.max_grad_norm).item()
        row["learning_rate"] = recipe.learning_rate
        optimizer.step()
        for key, value in row.items():
            per_step.setdefault(key, []).append(value)
    arrays |= {key: np.array(values) for key, values in per_step.items()}
    return arrays | {f"final/{key}": p.detach().numpy().copy() for key, p in trained.items()}


def main() -> None:
    for name, recipe in VARIANTS.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        model = adapted(recipe.model, recipe.settings).eval()
        move(model, rng, SCALE_STD)
        write(name, recipe.model, model, text_ids(rng, INPUT_SHAPE))
    for name, recipe in TRACES.items():
        arrays = trace(name, recipe)
        print_rounding(name, arrays, trace(name, recipe, torch.float64))
        clipped = int((arrays["grad_norm"] > recipe.max_grad_norm).sum())
        if clipped in (0, STEPS):
            raise SystemExit(f"{name}: clipped at {clipped} of {STEPS} steps: choose another norm")
        print(f"{name}: clipped at {clipped} of {STEPS} steps")
        save_npz(REFERENCE_DIR / f"trace_{name}.npz", arrays)


if __name__ == "__main__":
    main()
