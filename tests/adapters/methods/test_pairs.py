"""VeRA and MiSS as products of two matrices: beside each other in one batch."""

import numpy as np
import pytest
from mindspore import Tensor

import lora_ms

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_vera_miss_and_none_in_one_batch(reference, golden):
    variants = reference / "variants"
    model = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
    peft = lora_ms.PeftModel.from_pretrained(model, variants / "qwen2_vera", "vera")
    peft.load_adapter(variants / "qwen2_miss", "miss")
    for order in (["vera", "miss"], ["__base__", "vera"]):
        values = {name: golden(f"variants/qwen2_{name}") for name in ("vera", "miss")}
        first = values[order[1] if order[0] == "__base__" else order[0]]
        rows = [first if name == "__base__" else values[name] for name in order]
        ids = np.stack([row["input_ids"][i] for i, row in enumerate(rows)])
        kinds = ["base_logits" if name == "__base__" else "logits" for name in order]
        wanted = np.stack([row[kind][i] for i, (row, kind) in enumerate(zip(rows, kinds, strict=True))])
        np.testing.assert_allclose(peft(Tensor(ids), adapter_names=order).asnumpy(), wanted, rtol=0, atol=1e-4)
