"""Training step for step as torch, transformers and PEFT do it."""

from itertools import product

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapted_layers, inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.data.collate import collate
from lora_ms.data.example import TokenRow
from lora_ms.models.hub import load_directory
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss

KINDS = [("qwen2", False), ("llama3", False), ("full_qwen2", False), ("full_qwen2", True)]  # the trace, and recomputed
pytestmark = [
    pytest.mark.usefixtures("graph_mode"),
    pytest.mark.parametrize(
        ("operators", "trace"),
        [*product(("native", "portable"), KINDS), ("native", ("smollm3", False))],
        indirect=True,
        ids=lambda value: value if isinstance(value, str) else f"{value[0]}-{'recomputed' if value[1] else 'kept'}",
    ),
]
PREFIX = "base_model.model."
# torch, which the traces come from, differs from its own float64 by up to 1e-6 here
RELATIVE = 2e-5


def torch_name(name: str, full: bool) -> str:
    return name if full else PREFIX + name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")


def gradients(optimizer: FlatAdamW, label_tokens: int) -> list[np.ndarray]:
    """The mean of what has been summed so far, in the order of the parameters."""
    parts = np.split(optimizer.grad.asnumpy() / label_tokens, np.cumsum(optimizer.sizes)[:-1])
    return [part.reshape(p.shape) for part, p in zip(parts, optimizer.params, strict=True)]


@pytest.fixture(scope="module")
def trace(request, reference, golden, operators):
    """(reference values, our losses, norms, first gradients, final weights), names as torch has them."""
    kind, recompute = request.param
    full = kind.startswith("full_")
    z = golden(f"trace_{kind}")
    model = load_directory(reference / "models" / kind.removeprefix("full_"), operators=operators)
    if not full:
        inject(model, LoraConfig(4, 8.0, 0.0, "all-linear"))
        for name, layer in adapted_layers(model).items():
            layer.lora_a.set_data(Tensor(z[f"initial/{PREFIX}{name}.lora_A.weight"]))
    model.set_train()
    params = {torch_name(name, full): p for name, p in model.parameters_and_names() if p.requires_grad}
    optimizer = FlatAdamW(
        list(params.values()), weight_decay=0.1, max_grad_norm=float(z["max_grad_norm"]), operators=operators
    )
    micro_step = MicroStep(SummedLoss(model, 128), optimizer, recompute)
    losses, norms, first = [], [], {}
    for step in range(len(z["loss"])):
        label_tokens, total = int(z["label_tokens"][step].sum()), 0.0
        for ids, labels, lengths in zip(z["input_ids"][step], z["labels"][step], z["lengths"][step], strict=True):
            rows = [TokenRow("", ids[i, :n], labels[i, :n]) for i, n in enumerate(lengths)]
            b = collate([[row] for row in rows], 3, 16, 48, 0)
            total += float(micro_step(*map(Tensor, b[:4])).asnumpy())
        if step == 0:
            first = dict(zip(params, gradients(optimizer, label_tokens), strict=True))
        rate = Tensor(float(z["learning_rate"][step]), ms.float32)
        norm, finite = optimizer(rate, Tensor(label_tokens, ms.float32))
        assert bool(finite.asnumpy())
        losses.append(total / label_tokens)
        norms.append(float(norm.asnumpy()))
    final = {name: p.asnumpy() for name, p in params.items()}
    return z, losses, norms, first, final


def named(z: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{kind}/"): value for key, value in z.items() if key.startswith(f"{kind}/")}


def test_losses(trace):
    z, losses, *_ = trace
    np.testing.assert_allclose(losses, z["loss"], rtol=RELATIVE, atol=0)


def test_gradient_norms(trace):
    z, _, norms, *_ = trace
    np.testing.assert_allclose(norms, z["grad_norm"], rtol=RELATIVE, atol=0)


def test_first_gradients(trace):
    z, _, _, first, _ = trace
    wanted = named(z, "first_grad")
    assert sorted(first) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(first[name], value, rtol=1e-5, atol=5e-6, err_msg=name)
        if "lora_A" in name:
            np.testing.assert_array_equal(first[name], 0)


def test_final_weights(trace):
    z, _, _, _, final = trace
    wanted = named(z, "final")
    assert sorted(final) == sorted(wanted)
    for name, value in wanted.items():
        # a bias of k hardly moves the softmax: its gradient is mostly rounding, which Adam divides by itself
        atol = 1e-3 if name.endswith("k_proj.bias") else 5e-5
        np.testing.assert_allclose(final[name], value, rtol=0, atol=atol, err_msg=name)
