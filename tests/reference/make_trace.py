"""Write trace_<name>.npz: short training runs step by step, from torch, transformers and PEFT in float32.

A step is two micro-batches of three ragged rows, padded on the right. Its loss is the summed cross-entropy of its
label tokens over their number in both micro-batches. Gradients are clipped by their global norm, then AdamW steps.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import FIRST_TEXT_ID, PAD_ID, REFERENCE_DIR, VOCAB_SIZE, asked, load_reference_model, ragged_mask, save_npz
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

MICRO_BATCHES, ROWS, SHORTEST, LONGEST = 2, 3, 5, 16
IGNORED = -100
RANK, ALPHA = 4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
WEIGHT_DECAY = 0.1


class Recipe(NamedTuple):
    """A run. `a_std` is the spread of LoRA's first factor at the start; None trains all parameters instead."""

    model: str
    steps: int
    learning_rate: float
    warmup_steps: int | None
    max_grad_norm: float
    a_std: float | None
    seed: int


# Each run is clipped at some of its steps and not at others: Adam hides a scale common to all.
# warmup_steps None: constant rate. Otherwise linear from 0 over that many steps, then cosine to 0 at the last + 1.
RECIPES = {
    "qwen2": Recipe("qwen2", 12, 5e-3, None, 0.5, 0.01, 41),
    "llama3": Recipe("llama3", 12, 5e-3, 3, 0.5, 0.01, 42),
    "smollm3": Recipe("smollm3", 12, 5e-3, None, 0.5, 0.01, 44),
    "full_qwen2": Recipe("qwen2", 6, 1e-3, None, 8.0, None, 43),
}


def make_rows(rng: np.random.Generator, steps: int) -> dict[str, np.ndarray]:
    """Rows [steps, micro, rows, longest]: a random prompt, then a learnable answer, each id fixed by the one before.

    Labels stand at their own token's place, as transformers takes them: the shift to the next token is the model's.
    """
    shape = (steps, MICRO_BATCHES, ROWS)
    lengths = rng.integers(SHORTEST, LONGEST + 1, size=shape)
    input_ids = np.full((*shape, LONGEST), PAD_ID)
    labels = np.full((*shape, LONGEST), IGNORED)
    for place in np.ndindex(shape):
        length = lengths[place]
        prompt_length = rng.integers(1, length - 1)
        row = list(rng.integers(FIRST_TEXT_ID, VOCAB_SIZE, size=prompt_length))
        while len(row) < length:
            row.append((row[-1] * 5 + 3) % (VOCAB_SIZE - FIRST_TEXT_ID) + FIRST_TEXT_ID)
        input_ids[place][:length] = row
        labels[place][prompt_length:length] = row[prompt_length:]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "lengths": lengths,
        "label_tokens": (labels != IGNORED).sum((2, 3)),
    }


def trainable_model(recipe: Recipe, dtype: torch.dtype) -> torch.nn.Module:
    """The whole model, or the model with an adapter: first factor fixed by the seed, second factor zero."""
    model = load_reference_model(recipe.model)
    if recipe.a_std is not None:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        rng = np.random.default_rng(recipe.seed + 100)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    values = recipe.a_std * rng.standard_normal(tuple(parameter.shape))
                    parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.to(dtype).train()


def parameter_groups(recipe: Recipe, model: torch.nn.Module) -> list[dict]:
    """Every factor of an adapter decays; of a whole model, matrices decay, norm weights and biases do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.a_std is not None:
        return [{"params": trained, "weight_decay": WEIGHT_DECAY}]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def summed_loss(model: torch.nn.Module, ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """Summed cross-entropy of one micro-batch's label tokens; ids and labels [rows, longest]."""
    logits = model(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(ragged_mask(lengths, ids.shape[1], "right")),
    ).logits[:, -ids.shape[1] :]  # without those of virtual tokens
    targets = torch.from_numpy(labels)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def named_weights(recipe: Recipe, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Trained tensors by the name they are saved under: PEFT's for an adapter, the model's otherwise."""
    state = dict(model.named_parameters()) if recipe.a_std is None else get_peft_model_state_dict(model)
    return {name: tensor.detach().numpy().copy() for name, tensor in state.items()}


def named_gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients as they stand, by the names of `named_weights`."""
    return {
        name.replace(".default.", "."): parameter.grad.numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def run(recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """Train and return the arrays of the npz."""
    arrays = make_rows(np.random.default_rng(recipe.seed), recipe.steps)
    model = trainable_model(recipe, dtype)
    if recipe.a_std is not None:
        arrays |= {f"initial/{name}": value for name, value in named_weights(recipe, model).items()}
    optimizer = torch.optim.AdamW(parameter_groups(recipe, model), lr=recipe.learning_rate, **ADAM)
    if recipe.warmup_steps is None:
        scheduler = get_constant_schedule(optimizer)
    else:
        scheduler = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    per_step = {"loss": [], "grad_norm": [], "learning_rate": []}
    for step in range(recipe.steps):
        optimizer.zero_grad()
        count, loss = arrays["label_tokens"][step].sum(), 0.0
        for micro in range(MICRO_BATCHES):
            part = summed_loss(model, *(arrays[key][step, micro] for key in ("input_ids", "labels", "lengths"))) / count
            part.backward()
            loss += part.item()
        if step == 0:
            arrays |= {f"first_grad/{name}": value for name, value in named_gradients(model).items()}
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm).item()
        for key, value in (("loss", loss), ("grad_norm", norm), ("learning_rate", scheduler.get_last_lr()[0])):
            per_step[key].append(value)
        optimizer.step()
        scheduler.step()
    arrays |= {key: np.array(values) for key, values in per_step.items()}
    arrays["max_grad_norm"] = np.array(recipe.max_grad_norm)
    return arrays | {f"final/{name}": value for name, value in named_weights(recipe, model).items()}


def print_rounding(name: str, arrays: dict[str, np.ndarray], double: dict[str, np.ndarray]) -> None:
    """How far float32 stands from float64 in the same code: about what another implementation may differ by."""
    for key in ("loss", "grad_norm"):
        print(f"{name} {key}: {np.round(arrays[key], 3)}, relative to float64", end=" ")
        print(f"{abs(arrays[key] / double[key] - 1).max():.1e}")
    for prefix in ("first_grad/", "final/"):
        gaps = {key: abs(arrays[key] - double[key]).max() for key in arrays if key.startswith(prefix)}
        for worst in sorted(gaps, key=gaps.get, reverse=True)[:3]:
            print(f"{name} {worst}: differs from float64 by {gaps[worst]:.1e}")


def main() -> None:
    for name in filter(asked, RECIPES):
        recipe = RECIPES[name]
        arrays = run(recipe)
        print_rounding(name, arrays, run(recipe, torch.float64))
        clipped = int((arrays["grad_norm"] > recipe.max_grad_norm).sum())
        if clipped in (0, recipe.steps):
            raise SystemExit(f"{name}: clipped at {clipped} of {recipe.steps} steps: choose another a_std or norm")
        print(f"{name}: clipped at {clipped} of {recipe.steps} steps, label tokens {arrays['label_tokens'].tolist()}")
        save_npz(REFERENCE_DIR / f"trace_{name}.npz", arrays)


if __name__ == "__main__":
    main()
