"""P-tuning on the embedding."""

import math
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.base_cells import AdapterCell
from lora_ms.adapters.methods.ptuning import ENCODER, LAYERS, MLP_NAMES
from lora_ms.adapters.methods.virtual import TENSOR, PromptSpec
from lora_ms.adapters.methods.virtual_cells import VirtualEmbedding
from lora_ms.nn.layers import Embedding

if TYPE_CHECKING:
    from lora_ms.adapters.methods.ptuning import PTuningConfig

Array = NDArray[np.float32]


class Linear(nn.Cell):
    """``x W^T + b`` for x [n, in]."""

    def __init__(self, weight: Parameter, bias: Parameter):
        super().__init__(auto_prefix=False)
        self.weight, self.bias = weight, bias
        self.product = ops.MatMul(transpose_b=True)
        self.add = ops.BiasAdd()

    def construct(self, x: Tensor) -> Tensor:
        return self.add(self.product(x, self.weight), self.bias)


class LSTM(nn.Cell):
    """One direction of one layer: x [n, in] -> [n, hidden], torch's gates in its order: input, forget, cell, output."""

    def __init__(self, inner: Linear, outer: Linear, backwards: bool):
        super().__init__(auto_prefix=False)
        self.inner, self.outer = inner, outer
        self.hidden = outer.weight.shape[1]
        self.backwards = backwards

    def construct(self, x: Tensor) -> Tensor:
        gates = self.inner(x)  # [n, 4 * hidden]
        count, width = x.shape[0], self.hidden
        h = ops.zeros((1, width), ms.float32)
        cell = ops.zeros((1, width), ms.float32)
        outputs: tuple[Tensor, ...] = ()
        for i in range(count):
            t = count - 1 - i if self.backwards else i
            here = gates[t : t + 1] + self.outer(h)
            kept = ops.sigmoid(here[:, width : 2 * width]) * cell
            cell = kept + ops.sigmoid(here[:, :width]) * ops.tanh(here[:, 2 * width : 3 * width])
            h = ops.sigmoid(here[:, 3 * width :]) * ops.tanh(cell)
            outputs = (h,) + outputs if self.backwards else outputs + (h,)
        return ops.concat(outputs, 0)


class Encoder(nn.Cell):
    """The network: embedding [n, h] -> vectors [n, h].

    parameters: by PEFT's names, without what they all begin with.
    """

    def __init__(self, kind: str, parameters: dict[str, Parameter]):
        super().__init__(auto_prefix=False)

        def linear(weight: str, bias: str) -> Linear:
            return Linear(parameters[weight], parameters[bias])

        self.embedding = parameters["embedding.weight"]
        both = []
        for layer in range(LAYERS if kind == "LSTM" else 0):
            for suffix, backwards in ((f"l{layer}", False), (f"l{layer}_reverse", True)):
                inner, outer = (
                    linear(f"lstm_head.weight_{part}_{suffix}", f"lstm_head.bias_{part}_{suffix}")
                    for part in ("ih", "hh")
                )
                both.append(LSTM(inner, outer, backwards))
        self.lstm = nn.CellList(both, auto_prefix=False)
        dense = [linear(f"mlp_head.{place}.weight", f"mlp_head.{place}.bias") for place in MLP_NAMES[kind]]
        self.dense = nn.CellList(dense, auto_prefix=False)
        self.count = len(dense)

    def construct(self) -> Tensor:
        x = self.embedding
        for i in range(len(self.lstm) // 2):
            x = ops.concat((self.lstm[2 * i](x), self.lstm[2 * i + 1](x)), 1)
        for i in range(self.count):
            x = self.dense[i](x)
            if i < self.count - 1:
                x = ops.relu(x)
        return x


class PTuningEmbedding(VirtualEmbedding):
    """A ``VirtualEmbedding`` whose vectors a network gives; or, of a file that has lost it, vectors alone."""

    TITLE = "P-tuning"

    def __init__(self, base: Embedding, kind: str, start: dict[str, Array]):
        super().__init__(base, len(start[f"{ENCODER}embedding.weight"]))
        self.alone = False  # whether the vectors themselves train
        self.vectors_alone = Parameter(
            Tensor(np.zeros((self.virtual_tokens, self.hidden_size), np.float32)), "vectors_alone", requires_grad=False
        )
        parameters = {name: Parameter(Tensor(value), name.replace(".", "_")) for name, value in start.items()}
        self._network = parameters
        self.encoder = Encoder(kind, {name.removeprefix(ENCODER): p for name, p in parameters.items()})

    @property
    def spec(self) -> PromptSpec:
        return PromptSpec(self.virtual_tokens)

    def tensors(self) -> dict[str, Parameter]:
        return {TENSOR: self.vectors_alone} if self.alone else dict(self._network)

    def export(self) -> dict[str, Array]:
        values = super().export()
        return values if self.alone else {TENSOR: self.encoder().asnumpy(), **values}

    def accept(self, values: dict[str, Array]) -> dict[str, Array]:
        if not any(name in values for name in self._network):
            self.alone = True
            self.vectors_alone.requires_grad = True
            for parameter in self._network.values():
                parameter.requires_grad = False
            return values
        return {name: value for name, value in values.items() if name != TENSOR}

    def vectors(self) -> Tensor:
        return self.vectors_alone if self.alone else self.encoder()


def build(config: "PTuningConfig", target: Target, spec: PromptSpec) -> AdapterCell:
    """See ``AdapterConfig.build``. The network starts as torch's layers do."""
    rng = np.random.default_rng(np.random.randint(2**31))  # NumPy's stream, which mindspore.set_seed sets
    shapes = config.network(target.layer.weight.shape[1])
    start = {}
    for name, shape in shapes.items():
        if name.endswith("embedding.weight"):
            value = rng.standard_normal(shape)
        else:
            inputs = config.encoder_hidden_size
            if "mlp_head" in name:
                inputs = shapes[f"{name.rpartition('.')[0]}.weight"][1]
            value = rng.uniform(-1, 1, shape) / math.sqrt(inputs)
        start[name] = value.astype(np.float32)
    return PTuningEmbedding(target.layer, config.encoder_reparameterization_type, start)
