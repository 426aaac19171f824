"""Write variants/<model>_{pissa, pissa_niter_4, olora, adalora}*: adapters made from the base weights, and AdaLoRA.

<model>_<init> is what PEFT saves as it stands: loading it computes the residual base weights again.
<model>_<init>_converted is ordinary LoRA of twice the rank for the untouched base weights.
"""

import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from common import load_reference_model, save_adapter, save_npz, text_ids
from live_peft import logits_of
from make_variants import CLOSE, INPUT_SHAPE, Q_V, VARIANTS_DIR, forward, keep, lora_config, perturb, write
from peft import AdaLoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

# PiSSA at rank 2 cuts between singular values of qwen3's first q_proj that differ by 0.3 percent of the largest: which
# to take out is then float32's rounding, and PEFT's residual 9e-6 off that of float64. At rank 3 they differ by 3 to 6.
RANKS = {"llama3": 2, "qwen2": 2, "qwen3": 3}
ALPHA = 3
# How far training is imagined to have gone from the initial factors.
TRAINED_STD = 0.1
RESIDUAL = "model.layers.0.self_attn.v_proj"
INITS = {"llama3": ["pissa", "olora"], "qwen2": ["pissa", "pissa_niter_4", "olora"], "qwen3": ["pissa", "olora"]}

ADALORA_MODELS = ("llama3", "qwen2", "qwen3")
INIT_R = 4
# Which of a module's four triplets remain: uneven, not always the first ones, and one module keeps none.
KEPT = {
    "model.layers.0.self_attn.q_proj": [True, False, True, True],
    "model.layers.0.self_attn.v_proj": [False, False, False, False],
    "model.layers.1.self_attn.q_proj": [False, False, True, False],
    "model.layers.1.self_attn.v_proj": [True, True, True, True],
}


def factors(model: PeftModel, prefix: str) -> dict[str, np.ndarray]:
    """Copies of the adapter's tensors under PEFT's names, after `prefix`."""
    return {prefix + name: tensor.detach().numpy().copy() for name, tensor in get_peft_model_state_dict(model).items()}


def write_init(model_name: str, init: str) -> None:
    """The two directories of one initialisation, with the initial factors and one residual weight [out, in]."""
    name = f"{model_name}_{init}"
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    torch.manual_seed(1)
    settings = {"r": RANKS[model_name], "lora_alpha": ALPHA, "init_lora_weights": init}
    model = get_peft_model(load_reference_model(model_name), lora_config(settings)).eval()
    ids = text_ids(rng, INPUT_SHAPE)
    residual = model.get_base_model().get_submodule(RESIDUAL).base_layer.weight
    extra = factors(model, "initial/") | {f"residual/{RESIDUAL}.weight": residual.detach().numpy().copy()}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        save_adapter(model, start)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                noise = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
                parameter.add_(TRAINED_STD * torch.from_numpy(noise))
        live = forward(model, ids)
        save_adapter(model, VARIANTS_DIR / name)
        save_adapter(model, VARIANTS_DIR / f"{name}_converted", path_initial_model_for_weight_conversion=str(start))
    if "niter" in init:
        keep_unrepeatable(name, model_name, ids, live, extra)
    else:
        keep(name, model_name, ids, live, extra=extra)
    keep(f"{name}_converted", model_name, ids, live)


def keep_unrepeatable(
    name: str, model_name: str, ids: np.ndarray, live: np.ndarray, extra: dict[str, np.ndarray]
) -> None:
    """For a directory that PEFT itself cannot load as it was: the random numbers behind its residual weights are gone.

    `trained_logits` are those of the model that was saved; what loading gives is no reference.
    """
    arrays = logits_of(Path("models") / model_name, VARIANTS_DIR / name, ids)
    gap = abs(arrays["logits"] - live).max()
    if gap < CLOSE:
        raise SystemExit(f"{name}: loads as it was saved after all ({gap:.1e})")
    print(f"{name}: loaded again differs by {gap:.1e}")
    kept = {"input_ids": ids, "base_logits": arrays["base_logits"], "trained_logits": live}
    save_npz(VARIANTS_DIR / f"{name}.npz", kept | extra)


def write_adalora(model_name: str, name: str, kept: dict[str, list[bool]] | None) -> None:
    """AdaLoRA with random P, Lambda and Q; `kept` as the allocator leaves it, with the other entries of Lambda 0."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    config = AdaLoraConfig(
        init_r=INIT_R, target_r=2, total_step=12, lora_alpha=6, target_modules=Q_V, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_reference_model(model_name), config).eval()
    perturb(model, rng, factor_std=0.5)
    if kept is not None:
        config.rank_pattern = {f"{module}.lora_E.default": keeps for module, keeps in kept.items()}
        model.base_model.rankallocator.mask_using_rank_pattern(model.get_base_model(), config.rank_pattern)
    write(name, model_name, model, text_ids(rng, INPUT_SHAPE))


def main() -> None:
    VARIANTS_DIR.mkdir(exist_ok=True)
    for model_name in ADALORA_MODELS:
        write_adalora(model_name, f"{model_name}_adalora", KEPT)
    write_adalora("qwen2", "qwen2_adalora_unallocated", None)
    for model_name, inits in INITS.items():
        for init in inits:
            write_init(model_name, init)


if __name__ == "__main__":
    main()
