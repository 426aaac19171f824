"""Write starts_qwen2.npz: where LoRA starts by CorDA and by LoRA-GA, from PEFT: A and B of every module.

The rows are those of eva_qwen2.npz. CorDA sees what each module takes at the label tokens of that file, all as one
sample; LoRA-GA the gradient of the mean loss of all label tokens. PEFT finds LoRA-GA's directions in a random subspace,
and misses some by a tenth; here it is given an exact decomposition instead.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import REFERENCE_DIR, load_reference_model, save_npz
from make_eva import ROWS, TARGETS, batch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

RANK, ALPHA = 4, 6


def moments() -> dict[str, torch.Tensor]:
    """What PEFT makes of one sample, of the label tokens alone."""
    model, rows, found = load_reference_model("qwen2"), batch(), {}
    labelled = rows.pop("labels") != -100

    def look(name: str):
        def hook(module, inputs, output):
            taken = inputs[0][labelled].float()
            taken = taken / torch.max(taken).abs()
            found[name] = taken.t().matmul(taken)

        return hook

    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            module.register_forward_hook(look(name))
    with torch.no_grad():
        model(**rows)
    return found


def config(init: str, **settings) -> LoraConfig:
    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=init, task_type="CAUSAL_LM", **settings
    )


def factors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A and B by module."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            found[f"{name}/A"] = module.lora_A["default"].weight.detach().numpy()
            found[f"{name}/B"] = module.lora_B["default"].weight.detach().numpy()
    return found


def by_corda(method: str, folder: str) -> dict[str, np.ndarray]:
    file = f"{folder}/moments.pt"
    torch.save(moments(), file)
    settings = config("corda", corda_config=CordaConfig(corda_method=method, covariance_file=file))
    model = load_reference_model("qwen2")
    preprocess_corda(model, settings)
    return factors(get_peft_model(model, settings))


def exact(matrix: torch.Tensor, q: int, niter: int) -> tuple[torch.Tensor, ...]:
    """In the place of torch.svd_lowrank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], v[:q].T


def by_gradient() -> dict[str, np.ndarray]:
    settings = config("lora_ga", lora_ga_config=LoraGAConfig())
    model, rows = load_reference_model("qwen2"), batch()
    z = np.load(REFERENCE_DIR / "trace_qwen2.npz")
    rows["labels"] = torch.from_numpy(z["labels"].reshape(-1, 16)[:ROWS].astype(np.int64))  # the last ones, too
    torch.svd_lowrank = exact
    preprocess_loraga(model, settings, lambda: model(**rows).loss.backward())
    return factors(get_peft_model(model, settings))


def main() -> None:
    arrays = {}
    with TemporaryDirectory() as folder:
        for method in ("ipm", "kpm"):
            arrays |= {f"{method}/{key}": value for key, value in by_corda(method, folder).items()}
    arrays |= {f"lora_ga/{key}": value for key, value in by_gradient().items()}
    print({key: value.shape for key, value in arrays.items() if "layers.0" in key})
    save_npz(Path(REFERENCE_DIR) / "starts_qwen2.npz", arrays)


if __name__ == "__main__":
    main()
