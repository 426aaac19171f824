"""What transformers and PEFT make of a model and an adapter directory: `live_peft.py MODEL_DIR ADAPTER_DIR OUT.npz`.

Run by a Python with torch, transformers and PEFT. Float32, eager attention, no padding.
OUT.npz: input_ids int32 [2, 10]; base_logits, logits (adapter on) and merged_logits float32 [2, 10, vocab].
"""

import sys
from pathlib import Path

import numpy as np
import torch
from common import load_model, save_npz
from peft import PeftModel

SHAPE = (2, 10)


@torch.no_grad()
def live_logits(model_dir: str, adapter_dir: str) -> dict[str, np.ndarray]:
    """Logits of fixed ids without the adapter, with it, and with it merged: [2, 10, vocab] each."""
    base = load_model(model_dir)
    # Below 128, so that ids of a small vocabulary stay valid and those of a large one are common tokens.
    limit = min(128, base.config.vocab_size)
    ids = (np.arange(np.prod(SHAPE)).reshape(SHAPE) * 37 + 11) % limit
    input_ids = torch.from_numpy(ids)
    base_logits = base(input_ids=input_ids).logits.numpy()
    model = PeftModel.from_pretrained(base, adapter_dir).eval()
    logits = model(input_ids=input_ids).logits.numpy()
    merged_logits = model.merge_and_unload()(input_ids=input_ids).logits.numpy()
    return {"input_ids": ids, "base_logits": base_logits, "logits": logits, "merged_logits": merged_logits}


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit("usage: live_peft.py MODEL_DIR ADAPTER_DIR OUT.npz")
    save_npz(Path(sys.argv[3]), live_logits(sys.argv[1], sys.argv[2]))


if __name__ == "__main__":
    main()
