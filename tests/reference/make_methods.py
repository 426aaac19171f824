"""Write variants/<model>_<method>…/ with their logits, and trace_<method>_<model>.npz: methods as PEFT has them.

As make_variants.py and make_variant_traces.py, whose checks hold here, too. `make_methods.py WORD…` makes those whose
names hold a word.
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from common import PAD_ID, REFERENCE_DIR, asked, load_reference_model, save_npz, text_ids
from make_trace import WEIGHT_DECAY, make_rows, print_rounding
from make_variant_traces import BETAS, STEPS, backward, trained_parameters
from make_variant_traces import Recipe as TraceRecipe
from make_variants import INPUT_SHAPE, write
from peft import (
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

SOME = ["q_proj", "v_proj", "down_proj"]
HEAD = ["v_proj", "lm_head"]
NEW = 6  # tokens that are generated after virtual ones


class Recipe(NamedTuple):
    """An adapter: its model, PEFT's settings, and how far what trains moves from where it starts."""

    model: str
    settings: PeftConfig
    std: float = 0.3


def vera(targets: list[str] = SOME, **settings) -> VeraConfig:
    return VeraConfig(**{"r": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})


def miss(targets: list[str] = SOME, **settings) -> MissConfig:
    return MissConfig(**{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})


def lora(targets: list[str] = SOME, **settings) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})


def prompt(**settings) -> PromptTuningConfig:
    return PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **settings)


def ptuning(kind: str) -> PromptEncoderConfig:
    return PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type=kind, encoder_hidden_size=8, task_type="CAUSAL_LM"
    )


def prefix(**settings) -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **settings)


VARIANTS = {
    "llama3_prefix": Recipe("llama3", prefix()),
    "qwen2_prefix": Recipe("qwen2", prefix()),
    "qwen3_prefix": Recipe("qwen3", prefix()),
    "qwen2_prefix_projection": Recipe("qwen2", prefix(prefix_projection=True, encoder_hidden_size=8), 0.5),
    "llama3_prompt": Recipe("llama3", prompt()),
    "qwen2_prompt": Recipe("qwen2", prompt()),
    "qwen3_prompt": Recipe("qwen3", prompt()),
    "qwen2_ptuning": Recipe("qwen2", ptuning("MLP"), 0.5),
    "qwen3_ptuning_lstm": Recipe("qwen3", ptuning("LSTM"), 0.5),
    "llama3_vera": Recipe("llama3", vera(projection_prng_key=7)),
    "qwen2_vera": Recipe("qwen2", vera()),
    "qwen3_vera": Recipe("qwen3", vera()),
    "qwen2_vera_drawn": Recipe("qwen2", vera(projection_prng_key=3, save_projection=False)),
    "qwen3_vera_lm_head": Recipe("qwen3", vera(HEAD, modules_to_save=["model.norm"])),
    "llama3_miss": Recipe("llama3", miss()),
    "qwen2_miss": Recipe("qwen2", miss()),
    "qwen3_miss": Recipe("qwen3", miss()),
    "qwen2_miss_uneven": Recipe("qwen2", miss(r=5), 0.1),
    "qwen2_miss_mini": Recipe("qwen2", miss(init_weights="mini", mini_r=4)),
    "qwen3_miss_bat": Recipe("qwen3", miss(init_weights="bat")),
    "qwen3_miss_lm_head": Recipe("qwen3", miss(HEAD)),
}


class Trace(NamedTuple):
    """A run: settings, the norm to clip at, and a part of the names of what does not train."""

    settings: PeftConfig
    recipe: TraceRecipe
    frozen: str = ""


def run(model: str, max_grad_norm: float, eps: float = 1e-6, rate: float = 5e-3) -> TraceRecipe:
    return TraceRecipe(model, {}, max_grad_norm, rate, eps)


TRACES = {
    "prefix_qwen2": Trace(prefix(), run("qwen2", 0.29)),
    "prefix_projection_llama3": Trace(
        prefix(prefix_projection=True, encoder_hidden_size=8), run("llama3", 0.57, 1e-4, 1e-3)
    ),
    "prompt_qwen2": Trace(prompt(), run("qwen2", 0.57)),
    "ptuning_lstm_llama3": Trace(ptuning("LSTM"), run("llama3", 2.7, 1e-4, 1e-3)),
    "lorafa_qwen2": Trace(lora(), run("qwen2", 0.85), "lora_A"),
    "vera_qwen2": Trace(vera(d_initial=0.5), run("qwen2", 0.46)),
    "miss_qwen2": Trace(miss(), run("qwen2", 3.8)),
    "miss_bat_qwen3": Trace(miss(init_weights="bat"), run("qwen3", 3.8)),
}


@torch.no_grad()
def move(model: torch.nn.Module, rng: np.random.Generator, std: float) -> None:
    """Random numbers of this spread added to everything that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = std * rng.standard_normal(tuple(parameter.shape))
            parameter.add_(torch.from_numpy(noise.astype(np.float32)))


def is_plain_prefix(settings: PeftConfig) -> bool:
    return settings.peft_type == "PREFIX_TUNING" and not settings.prefix_projection


def numbers(kind: str, tensors: dict[str, torch.Tensor], settings: PeftConfig) -> dict[str, np.ndarray]:
    """By the names of the npz; a prefix layer by layer."""
    found = {}
    for key, tensor in tensors.items():
        value = tensor.detach().numpy().copy()
        if is_plain_prefix(settings):
            parts = np.split(value, settings.num_layers, 1)
            base = key.removesuffix("prompt_embeddings")
            found |= {f"{kind}/{base}layer_{number}": part for number, part in enumerate(parts)}
        else:
            found[f"{kind}/{key}"] = value
    return found


def named(key: str, settings: PeftConfig) -> str:
    """The name of a tensor under which it is kept here; of virtual tokens, as if it were one of the embedding."""
    if not settings.is_prompt_learning:
        return key
    if settings.peft_type == "PROMPT_TUNING" or is_plain_prefix(settings):
        key = "prompt_embeddings"
    return f"base_model.model.model.embed_tokens.{key}"


def adapted(name: str, settings: PeftConfig) -> PeftModel:
    return get_peft_model(load_reference_model(name), settings)


def greedy(model: PeftModel, ids: np.ndarray) -> np.ndarray:
    """The likeliest tokens after ids [rows, width], as far as an end token or NEW of them."""
    inputs = torch.from_numpy(ids)
    tokens = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD_ID,
    )
    return tokens[:, ids.shape[1] :].numpy()


def trace(name: str, made: Trace, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """Train and return the arrays of the npz; what trains starts a little away from where PEFT starts it."""
    seed, recipe = zlib.crc32(name.encode()), made.recipe
    arrays = make_rows(np.random.default_rng(seed), STEPS)
    torch.manual_seed(seed)
    model = adapted(recipe.model, made.settings)
    move(model, np.random.default_rng(seed + 1), 0.05)
    model = model.to(dtype).train()
    every = {named(key, made.settings): p for key, p in trained_parameters(model).items()}
    arrays |= numbers("initial", every, made.settings)
    for key, parameter in every.items():
        if made.frozen and made.frozen in key:
            parameter.requires_grad_(False)
    trained = {named(key, made.settings): p for key, p in trained_parameters(model).items()}
    settings = {"max_grad_norm": recipe.max_grad_norm, "weight_decay": WEIGHT_DECAY, "eps": recipe.eps}
    arrays |= {key: np.array(value) for key, value in settings.items()}
    groups = [
        {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, eps=recipe.eps)
    per_step: dict[str, list] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        row = backward(model, recipe, arrays, step)
        if step == 0:
            arrays |= numbers("first_grad", {key: p.grad for key, p in trained.items()}, made.settings)
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.max_grad_norm).item()
        row["learning_rate"] = recipe.learning_rate
        optimizer.step()
        for key, value in row.items():
            per_step.setdefault(key, []).append(value)
    arrays |= {key: np.array(values) for key, values in per_step.items()}
    return arrays | numbers("final", trained, made.settings)


def main() -> None:
    for name, recipe in VARIANTS.items():
        if asked(name):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            model = adapted(recipe.model, recipe.settings).eval()
            move(model, rng, recipe.std)
            ids, merges = text_ids(rng, INPUT_SHAPE), not recipe.settings.is_prompt_learning
            extra = {} if merges else {"generated": greedy(model, ids)}
            write(name, recipe.model, model, ids, merges, extra)
    for name, made in TRACES.items():
        if not asked(name):
            continue
        arrays = trace(name, made)
        print_rounding(name, arrays, trace(name, made, torch.float64))
        clipped = int((arrays["grad_norm"] > made.recipe.max_grad_norm).sum())
        print(f"{name}: clipped at {clipped} of {STEPS} steps; norms {np.round(arrays['grad_norm'], 3)}")
        if clipped in (0, STEPS):
            raise SystemExit(f"{name}: choose another norm")
        save_npz(REFERENCE_DIR / f"trace_{name}.npz", arrays)


if __name__ == "__main__":
    main()
