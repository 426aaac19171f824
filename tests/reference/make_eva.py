"""Write eva_qwen2.npz: where LoRA starts by EVA, from PEFT: A of every module, its rank and its alpha.

The rows are those of trace_qwen2.npz, in one batch. The last label of each row is left out: what predicts nothing more
is not computed here. Ranks are equal (rho 1), or go to where a direction explains most (rho 2).
"""

import numpy as np
import torch
from common import REFERENCE_DIR, load_reference_model, ragged_mask, save_npz
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
RANK, ALPHA, ROWS = 4, 6, 24


def batch() -> dict[str, torch.Tensor]:
    z = np.load(REFERENCE_DIR / "trace_qwen2.npz")
    ids, labels = (z[key].reshape(-1, 16)[:ROWS].astype(np.int64) for key in ("input_ids", "labels"))
    lengths = z["lengths"].ravel()[:ROWS]
    labels[np.arange(ROWS), lengths - 1] = -100
    arrays = {"input_ids": ids, "attention_mask": ragged_mask(lengths, 16, "right"), "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def main() -> None:
    arrays = {}
    for rho in (1, 2):
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=TARGETS,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=float(rho)),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(load_reference_model("qwen2"), config, low_cpu_mem_usage=True)
        initialize_lora_eva_weights(model, [batch()], show_progress_bar=False)
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                weight = module.lora_A["default"].weight.detach().numpy()
                scaling = module.scaling["default"]
                arrays[f"{rho}/{name}"] = weight
                arrays[f"{rho}/scaling/{name}"] = np.array(scaling)
                print(rho, name, weight.shape, scaling)
    save_npz(REFERENCE_DIR / "eva_qwen2.npz", arrays)


if __name__ == "__main__":
    main()
