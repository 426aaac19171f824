"""QLoRA step for step as bitsandbytes, transformers and PEFT do it, and runs of a model in NF4."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapted_layers, inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.data.collate import collate
from lora_ms.data.example import TokenRow
from lora_ms.models.hub import load_directory
from lora_ms.quant.settings import Quantisation
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss

pytestmark = pytest.mark.usefixtures("graph_mode")
PREFIX = "base_model.model."
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
# the native operators first read a family; what the portable ones do in all of them is little else
RUNS = [
    *((name, kind, "native") for name in ("llama3", "qwen2", "qwen3") for kind in ("nf4", "nf4_double")),
    ("qwen2", "nf4_double", "portable"),
]


def torch_name(name: str) -> str:
    return PREFIX + name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def trace(request, reference, golden, native):
    """(reference values, our losses, norms, first logits, final weights), names as torch has them."""
    from lora_ms.ops import PORTABLE

    name, kind, which = request.param
    operators = native if which == "native" else PORTABLE
    z = golden(f"trace_{kind}_{name}")
    quantisation = Quantisation(double=kind == "nf4_double")
    model = load_directory(reference / "models" / name, operators=operators, quantisation=quantisation)
    inject(model, LoraConfig(4, 8.0, 0.0, TARGETS))
    for path, layer in adapted_layers(model).items():
        layer.lora_a.set_data(Tensor(z[f"initial/{PREFIX}{path}.lora_A.weight"]))
    ids, lengths = z["input_ids"][0, 0], z["lengths"][0, 0]
    mask = (np.arange(16) < lengths[:, None]).astype(np.int32)
    logits = model.set_train(False)(Tensor(ids), Tensor(mask)).asnumpy() * mask[:, :, None]
    model.set_train()
    params = {torch_name(name): p for name, p in model.parameters_and_names() if p.requires_grad}
    optimizer = FlatAdamW(
        list(params.values()), weight_decay=0.1, max_grad_norm=float(z["max_grad_norm"]), operators=operators
    )
    micro_step = MicroStep(SummedLoss(model, 128), optimizer, which == "portable")  # recomputed there
    losses, norms = [], []
    for step in range(len(z["loss"])):
        label_tokens, total = int(z["label_tokens"][step].sum()), 0.0
        for ids, labels, lengths in zip(z["input_ids"][step], z["labels"][step], z["lengths"][step], strict=True):
            rows = [TokenRow("", ids[i, :n], labels[i, :n]) for i, n in enumerate(lengths)]
            b = collate([[row] for row in rows], 3, 16, 48, 0)
            total += float(micro_step(*map(Tensor, b[:4])).asnumpy())
        norm, finite = optimizer(Tensor(5e-3, ms.float32), Tensor(label_tokens, ms.float32))
        assert bool(finite.asnumpy())
        losses.append(total / label_tokens)
        norms.append(float(norm.asnumpy()))
    return z, losses, norms, logits, {name: p.asnumpy() for name, p in params.items()}


def test_logits(trace):
    z, _, _, logits, _ = trace
    np.testing.assert_allclose(logits, z["first_logits"], rtol=0, atol=2e-4)


def test_losses_and_norms(trace):
    z, losses, norms, *_ = trace
    np.testing.assert_allclose(losses, z["loss"], rtol=1e-4, atol=0)
    np.testing.assert_allclose(norms, z["grad_norm"], rtol=2e-3, atol=0)


def test_final_factors(trace):
    z, *_, final = trace
    wanted = {key.removeprefix("final/"): value for key, value in z.items() if key.startswith("final/")}
    assert sorted(final) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(final[name], value, rtol=0, atol=2e-4, err_msg=name)
