"""Write combined/: three adapters on one model, what PEFT makes of them together, and one batch with all of them.

combined/<model>/{a,b,c}/ are the adapters, combined/qwen2/d/ a fourth of another rank. combined/<model>.npz has the
logits of each and of the mixed batch, combined/qwen2_<method>.npz the adapter that add_weighted_adapter gives.
"""

import shutil
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from common import REFERENCE_DIR, load_reference_model, save_adapter, save_npz, text_ids
from make_variants import forward, lora_config, perturb
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

COMBINED_DIR = REFERENCE_DIR / "combined"
SHAPE = (4, 6)
ROW_ADAPTERS = ["a", "b", "c", "__base__"]
CLOSE = 1e-5

# The same modules and rank, with different alphas; d has another rank and one module more.
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 4, "lora_alpha": 4},
    "c": {"r": 4, "lora_alpha": 6, "use_rslora": True},
}
SMALLER = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "up_proj"]}
WEIGHTS = [0.7, 0.4, -0.2]


class Combination(NamedTuple):
    """One call of add_weighted_adapter."""

    adapters: list[str]
    weights: list[float]
    method: str
    options: dict[str, Any] = {}


COMBINATIONS = {
    "linear": Combination(["a", "b", "c"], WEIGHTS, "linear"),
    "cat": Combination(["a", "b", "d"], WEIGHTS, "cat"),
    "svd": Combination(["a", "b", "d"], WEIGHTS, "svd"),
    "svd_rank_3": Combination(["a", "b", "c"], WEIGHTS, "svd", {"svd_rank": 3}),
    "ties": Combination(["a", "b", "c"], WEIGHTS, "ties", {"density": 0.5}),
    "ties_frequency": Combination(
        ["a", "b", "c"], WEIGHTS, "ties", {"density": 0.5, "majority_sign_method": "frequency"}
    ),
    "ties_svd": Combination(["a", "b", "d"], WEIGHTS, "ties_svd", {"density": 0.5}),
    "dare_linear": Combination(["a", "b", "c"], WEIGHTS, "dare_linear", {"density": 1.0}),
    "magnitude_prune": Combination(["a", "b", "c"], WEIGHTS, "magnitude_prune", {"density": 0.5}),
}


def write_adapters(model_name: str, adapters: dict[str, dict[str, Any]]) -> PeftModel:
    """Save random adapters, and return the model with all of them loaded."""
    for name, settings in adapters.items():
        model = get_peft_model(load_reference_model(model_name), lora_config(settings))
        perturb(model, np.random.default_rng(zlib.crc32(f"{model_name} {name}".encode())))
        save_adapter(model, COMBINED_DIR / model_name / name)
    folder = COMBINED_DIR / model_name
    model = PeftModel.from_pretrained(load_reference_model(model_name), folder / "a", adapter_name="a")
    for name in list(adapters)[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


def single_logits(model: PeftModel, adapters: list[str], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Logits [rows, width, vocabulary] of every adapter alone, and of the base model."""
    arrays = {"input_ids": ids}
    for name in adapters:
        model.set_adapter(name)
        arrays[f"logits/{name}"] = forward(model, ids)
    with model.disable_adapter():
        arrays["logits/__base__"] = forward(model, ids)
    return arrays


@torch.no_grad()
def mixed_logits(model: PeftModel, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """One forward with another adapter in every row, held against the rows of the single runs."""
    logits = model(input_ids=torch.from_numpy(arrays["input_ids"]), adapter_names=ROW_ADAPTERS).logits.numpy()
    for row, name in enumerate(ROW_ADAPTERS):
        gap = abs(logits[row] - arrays[f"logits/{name}"][row]).max()
        if gap > CLOSE:
            raise SystemExit(f"row {row} of the mixed batch differs from {name} alone by {gap:.1e}")
    return logits


def write_combination(model: PeftModel, name: str, combination: Combination, base: np.ndarray, ids: np.ndarray) -> None:
    """The combined adapter's tensors, its rank and its logits; `base` are the base model's."""
    model.add_weighted_adapter(
        combination.adapters, combination.weights, name, combination_type=combination.method, **combination.options
    )
    model.set_adapter(name)
    logits = forward(model, ids)
    moved = abs(logits - base).mean()
    if moved < 0.05:
        raise SystemExit(f"{name}: moves logits by {moved:.1e} on average only")
    config = model.peft_config[name]
    print(f"{name}: rank {config.r}, alpha {config.lora_alpha}, rslora {config.use_rslora}, moved by {moved:.2f}")
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    arrays = {"input_ids": ids, "logits": logits, "weights": combination.weights}
    arrays |= {"lora_rank": config.r, "lora_alpha": config.lora_alpha, "use_rslora": int(config.use_rslora)}
    arrays |= {f"tensor/{key}": value.numpy() for key, value in tensors.items()}
    save_npz(COMBINED_DIR / f"qwen2_{name}.npz", {key: np.array(value) for key, value in arrays.items()})


def check_refusals(model: PeftModel, ids: np.ndarray) -> None:
    """What README says PEFT does not do: equal ranks are wanted for "linear", and no DoRA in a mixed batch."""
    attempts = {"linear of ranks 4 and 2": lambda: model.add_weighted_adapter(["a", "d"], [1, 1], "no", "linear")}
    dora = get_peft_model(load_reference_model("qwen2"), lora_config({"use_dora": True})).eval()
    attempts["a mixed batch with DoRA"] = lambda: dora(
        input_ids=torch.from_numpy(ids), adapter_names=["default"] + ["__base__"] * 3
    )
    for what, attempt in attempts.items():
        try:
            attempt()
        except ValueError as refusal:
            print(f"{what}: {refusal}")
        else:
            raise SystemExit(f"{what}: PEFT does it after all")


def main() -> None:
    # add_weighted_adapter multiplies random factors by zero: the signs of its zeros depend on them.
    torch.manual_seed(0)
    shutil.rmtree(COMBINED_DIR, ignore_errors=True)
    for model_name in ("llama3", "qwen2", "qwen3"):
        adapters = ADAPTERS | ({"d": SMALLER} if model_name == "qwen2" else {})
        (COMBINED_DIR / model_name).mkdir(parents=True)
        model = write_adapters(model_name, adapters)
        ids = text_ids(np.random.default_rng(zlib.crc32(model_name.encode())), SHAPE)
        arrays = single_logits(model, list(adapters), ids)
        arrays["mixed_logits"] = mixed_logits(model, arrays)
        save_npz(COMBINED_DIR / f"{model_name}.npz", arrays)
        if model_name == "qwen2":
            check_refusals(model, ids)
            for name, combination in COMBINATIONS.items():
                write_combination(model, name, combination, arrays["logits/__base__"][:2], ids[:2])


if __name__ == "__main__":
    main()
