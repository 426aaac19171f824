"""What transformers and PEFT make of a model and an adapter directory: `live_peft.py MODEL_DIR ADAPTER_DIR OUT.npz`.

Run by a Python with torch, transformers and PEFT. Float32, eager attention, no padding.
OUT.npz: input_ids int32 [2, 10]; base_logits, logits (adapter on) and merged_logits float32 [2, 10, vocab].
merged_logits is left out where PEFT cannot merge. It refuses a bias of LoRA on a layer that has none; LoRA on one of
two tied modules it adds to their common weight, so that the merged model says something else.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from common import load_model, save_npz
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

SHAPE = (2, 10)


def load_adapter(base: PreTrainedModel, adapter_dir: Path | str) -> PeftModel:
    """The model with any adapter PEFT can load, in eval mode; a tensor that the directory lacks is an error.

    Seeded: PEFT computes the residual weight of "pissa_niter_N" again, from random numbers.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(base, adapter_dir).eval()


def targets_tied_module(model: PeftModel) -> bool:
    """Whether LoRA itself, not a saved copy, sits on the embedding or the head of a model that ties them."""
    leaves = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
    return model.config.tie_word_embeddings and bool(leaves & {"embed_tokens", "lm_head"})


def merged_model(model: PeftModel) -> PreTrainedModel | None:
    """The model with the adapter merged into its weights, or None where PEFT cannot do that."""
    if model.peft_config["default"].is_prompt_learning or targets_tied_module(model):
        return None
    try:
        return model.merge_and_unload()
    except RuntimeError as refusal:
        if "Impossible to merge" not in str(refusal):
            raise
        return None


def real(model: PeftModel, input_ids: torch.Tensor) -> np.ndarray:
    """Logits of `input_ids`; PEFT gives those of virtual tokens before them."""
    return model(input_ids=input_ids).logits[:, -input_ids.shape[1] :].detach().numpy()


@torch.no_grad()
def logits_of(model_dir: Path | str, adapter_dir: Path | str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of the npz for `ids` [rows, width]; base_logits come from the model before it is wrapped."""
    input_ids, base = torch.from_numpy(ids), load_model(model_dir)
    base_logits = base(input_ids=input_ids).logits.numpy()
    model = load_adapter(base, adapter_dir)
    arrays = {"input_ids": ids, "base_logits": base_logits, "logits": real(model, input_ids)}
    merged = merged_model(model)
    if merged is not None:
        arrays["merged_logits"] = merged(input_ids=input_ids).logits.numpy()
    return arrays


def live_logits(model_dir: str, adapter_dir: str) -> dict[str, np.ndarray]:
    """`logits_of` fixed ids [2, 10], the same for every model."""
    # Below 128, so that ids of a small vocabulary stay valid and those of a large one are common tokens.
    limit = min(128, AutoConfig.from_pretrained(model_dir).vocab_size)
    return logits_of(model_dir, adapter_dir, (np.arange(np.prod(SHAPE)).reshape(SHAPE) * 37 + 11) % limit)


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit("usage: live_peft.py MODEL_DIR ADAPTER_DIR OUT.npz")
    save_npz(Path(sys.argv[3]), live_logits(sys.argv[1], sys.argv[2]))


if __name__ == "__main__":
    main()
