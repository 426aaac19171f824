"""Whole layers trained beside an adapter: copies in float32 that compute what the layer did, and turn back into it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from lora_ms.adapters.methods.modules_to_save_cells import TrainedDense, TrainedEmbedding, TrainedNorm
from lora_ms.nn.layers import Embedding, Head, RMSNorm
from lora_ms.ops import PORTABLE

pytestmark = pytest.mark.usefixtures("graph_mode")
RNG = np.random.default_rng(7)
IN, OUT = 4, 3
WEIGHT, BIAS, GAIN = (RNG.standard_normal(shape).astype(np.float16) for shape in ((OUT, IN), OUT, IN))
X, IDS = Tensor(RNG.standard_normal((5, IN)).astype(np.float16)), Tensor(np.array([2, 0, 2], np.int32))


def bases() -> dict[str, nn.Cell]:
    """Layers in float16."""
    embedding, norm = Embedding.zeros(OUT, IN, ms.float16), RMSNorm(IN, 1e-3, ms.float16)
    embedding.weight.set_data(Tensor(WEIGHT))
    norm.weight.set_data(Tensor(GAIN))
    return {
        "dense": nn.Dense(IN, OUT, Tensor(WEIGHT), Tensor(BIAS), dtype=ms.float16),
        "dense without bias": nn.Dense(IN, OUT, Tensor(WEIGHT), has_bias=False, dtype=ms.float16),
        "bias": nn.Dense(IN, OUT, Tensor(WEIGHT), Tensor(BIAS), dtype=ms.float16),
        "head": Head(Parameter(Tensor(WEIGHT)), None, PORTABLE),
        "embedding": embedding,
        "norm": norm,
    }


def trained_copy(kind: str, base: nn.Cell) -> nn.Cell:
    if kind == "bias":
        return TrainedDense(base, weight=False)
    return {"embedding": TrainedEmbedding, "norm": TrainedNorm}.get(kind, TrainedDense)(base)


class Projected(nn.Cell):
    """A head's product as the model and the loss form it."""

    def __init__(self, head: Head):
        super().__init__()
        self.head, self.matmul = head, ms.ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.head.whole_weight().astype(x.dtype))


def output(kind: str, layer: nn.Cell) -> Tensor:
    if kind == "head":
        return Projected(layer)(X)
    return layer(IDS if kind == "embedding" else X)


TRAINED = {
    "dense": {"weight": WEIGHT, "bias": BIAS},
    "dense without bias": {"weight": WEIGHT},
    "bias": {"bias": BIAS},
    "head": {"weight": WEIGHT},
    "embedding": {"weight": WEIGHT},
    "norm": {"weight": GAIN},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_copy_computes_the_same_and_merges_back(kind):
    base = bases()[kind]
    layer = trained_copy(kind, base)
    tensors = layer.tensors()
    assert tensors.keys() == TRAINED[kind].keys()
    for name, parameter in tensors.items():
        assert parameter.dtype == ms.float32 and parameter.requires_grad
        assert parameter is not base.parameters_dict().get(name)
        np.testing.assert_array_equal(parameter.asnumpy(), TRAINED[kind][name])
    y = output(kind, layer)
    assert y.dtype == ms.float16
    np.testing.assert_allclose(y.asnumpy(), output(kind, base).asnumpy(), rtol=0, atol=1e-3 * (kind == "norm"))
    for parameter in tensors.values():
        parameter.set_data(Tensor(parameter.asnumpy() + 0.5))
    plain = layer.merge()
    assert type(plain) is type(base) and plain.weight.dtype == ms.float16
    assert np.abs(output(kind, plain).asnumpy() - output(kind, base).asnumpy()).max() > 0.3
    np.testing.assert_allclose(output(kind, plain).asnumpy(), output(kind, layer).asnumpy(), rtol=0, atol=5e-3)
    for name, parameter in base.parameters_and_names():  # the base keeps its own
        np.testing.assert_array_equal(parameter.asnumpy(), {"bias": BIAS}.get(name, GAIN if kind == "norm" else WEIGHT))


def test_a_bias_alone_leaves_the_weight_shared():
    base = bases()["bias"]
    layer = TrainedDense(base, weight=False)
    assert layer.base.weight is base.weight and layer.base.bias is not base.bias


def test_a_heads_copy_knows_its_sizes():
    layer = TrainedDense(bases()["head"])
    np.testing.assert_array_equal(layer.whole_weight().asnumpy(), WEIGHT)
    assert (layer.base.in_channels, layer.base.out_channels) == (IN, OUT)
