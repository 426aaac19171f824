"""``LoRADense`` in MindPet's place: the same arguments, the same numbers."""

import inspect

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from numpy.testing import assert_allclose

from lora_ms.adapters.methods.lora_cells import LoRADense

pytestmark = pytest.mark.mindformers

RNG = np.random.default_rng(2)
WEIGHT, BIAS, A, B, X = (RNG.standard_normal(s).astype(np.float32) for s in ((5, 6), (5,), (3, 6), (5, 3), (2, 4, 6)))
BASE = {"weight_init": Tensor(WEIGHT), "bias_init": Tensor(BIAS), "has_bias": True}
POSITIONAL = (6, 5, 3, 6.0, 0.0, Tensor(A), Tensor(B), ms.float32, ms.float32)
NAMES = (
    "in_channels out_channels lora_rank lora_alpha lora_dropout lora_a_init lora_b_init param_init_type compute_dtype"
).split()
KEYWORDS = dict(zip(NAMES, POSITIONAL, strict=True))
MINDPET_FACTORS = ("mindpet_delta_lora_a", "mindpet_delta_lora_b")
SHAPES = {"output": (2, 4, 5), "d_x": (2, 4, 6), "d_a": (3, 6), "d_b": (5, 3)}


class Weighted(nn.Cell):
    """A sum of the layer's outputs to differentiate, each with a weight of its own, and the outputs."""

    def __init__(self, layer: nn.Cell):
        super().__init__()
        self.layer = layer
        self.weights = Tensor(np.linspace(-1, 1, 40).reshape(2, 4, 5).astype(np.float32))

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.layer(x)
        return (output * self.weights).sum(), output


def test_the_arguments_have_the_same_names_and_order(packages):
    ours, theirs = (list(inspect.signature(c).parameters) for c in (LoRADense, packages.LoRADense))
    assert theirs == [*NAMES, "kwargs"]
    assert ours == [*NAMES, "use_rslora", "lora_bias", "operators", "base", "kwargs"]  # ours come after theirs


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(POSITIONAL, BASE), ((), {**KEYWORDS, **BASE, "activation": "gelu"})],
    ids=["positional", "keywords and an activation"],
)
def test_output_and_gradients(packages, args, kwargs):
    results = []
    for make, a, b in ((LoRADense, "lora_a", "lora_b"), (packages.LoRADense, *MINDPET_FACTORS)):
        layer = make(*args, **kwargs).set_train()
        step = ms.value_and_grad(Weighted(layer), 0, [getattr(layer, a), getattr(layer, b)], has_aux=True)
        (_, output), (d_x, (d_a, d_b)) = step(Tensor(X))
        results.append({"output": output, "d_x": d_x, "d_a": d_a, "d_b": d_b})
    ours, theirs = results
    assert {name: value.shape for name, value in theirs.items()} == SHAPES
    for name in SHAPES:
        assert_allclose(ours[name].asnumpy(), theirs[name].asnumpy(), rtol=0, atol=1e-5, err_msg=name)
