"""LoRA and DoRA on an embedding, where ids look up a column of A: ``y = W[i] + scaling A^T[i] B^T``."""

from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import Normal, initializer
from numpy.typing import NDArray

from lora_ms.adapters.methods import lowrank
from lora_ms.adapters.methods.base import Pair, Target
from lora_ms.adapters.methods.base_cells import AdapterCell, State, freeze
from lora_ms.adapters.methods.dora_cells import dora_scale
from lora_ms.adapters.methods.lora import LoraSpec
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding
from lora_ms.ops import PORTABLE, Operators

if TYPE_CHECKING:
    from lora_ms.adapters.methods.lora import LoraConfig


class LoRAEmbedding(AdapterCell):
    """A frozen ``Embedding`` with ``lora_a`` [rank, vocabulary], zero at the start, and ``lora_b`` [h, rank].

    No dropout acts on it, as in PEFT.
    """

    TITLE = "LoRA"
    base: Embedding

    def __init__(
        self,
        base: Embedding,
        lora_rank: int,
        lora_alpha: float,
        use_rslora: bool = False,
        operators: Operators = PORTABLE,
    ):
        super().__init__()
        self.base = base
        freeze(base)
        vocab_size, hidden_size = base.weight.shape
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.operators = operators
        self.lora_a = Parameter(initializer("zeros", (lora_rank, vocab_size), ms.float32), name="lora_a")
        self.lora_b = Parameter(initializer(Normal(1.0), (hidden_size, lora_rank), ms.float32), name="lora_b")
        scaling = Tensor(lowrank.scaling_of(lora_rank, lora_alpha, use_rslora), ms.float32)
        self.scaling = Parameter(scaling, name="scaling", requires_grad=False)
        self.product_t = ops.MatMul(transpose_b=True)

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(self.lora_rank, self.lora_alpha)

    def tensors(self) -> dict[str, Parameter]:
        return {"lora_embedding_A": self.lora_a, "lora_embedding_B": self.lora_b}

    def pair(self) -> Pair | None:
        scaling = float(self.scaling.asnumpy())
        return Pair(self.lora_a.asnumpy().copy(), self.lora_b.asnumpy().copy(), scaling)

    def settings(self) -> dict[str, Parameter]:
        return {"scaling": self.scaling}

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.lora_alpha = state.spec.lora_alpha

    def rate_factor(self, parameter: Parameter, ratio: float, embedding: float) -> float:
        if parameter is self.lora_a or parameter is self.lora_b:
            return embedding
        return super().rate_factor(parameter, ratio, embedding)

    def merged_weight(self, magnitude: NDArray | None = None) -> NDArray[np.float32]:
        """The weight [vocabulary, h] that the layer amounts to."""
        a, b, scaling = self.lora_a.asnumpy(), self.lora_b.asnumpy(), float(self.scaling.asnumpy())
        return lowrank.merged_weight(self.base.weight.asnumpy().T, a, b, scaling, magnitude).T

    def merge(self) -> Embedding:
        weight = Tensor(np.ascontiguousarray(self.merged_weight()), self.base.weight.dtype)
        return Embedding(Parameter(weight, name="weight"), self.base.operators)

    def adapted(self, input_ids: Tensor) -> Tensor:
        """ids [t] -> [t, h]."""
        low = ops.gather(ops.transpose(self.lora_a, (1, 0)), input_ids, 0) * self.scaling  # [t, rank]
        x = self.base(input_ids)
        return x + self.product_t(low, self.lora_b).astype(x.dtype)

    def construct(self, input_ids: Tensor) -> Tensor:
        return self.adapted(input_ids)


class DoRAEmbedding(LoRAEmbedding):
    """``LoRAEmbedding`` whose columns are brought to the lengths ``lora_magnitude`` [h]."""

    TITLE = "DoRA"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        norms = lowrank.row_norms(self.base.weight.asnumpy().astype(np.float32).T)
        self.base_norms = Tensor(np.square(norms))  # [h]
        self.lora_magnitude = Parameter(Tensor(norms), name="lora_magnitude")
        self.product = ops.MatMul()
        self.column_scale = self.operators.column_scale()

    def tensors(self) -> dict[str, Parameter]:
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude}

    def merged_weight(self, magnitude: NDArray | None = None) -> NDArray[np.float32]:
        return super().merged_weight(self.lora_magnitude.asnumpy())

    def adapted(self, input_ids: Tensor) -> Tensor:
        low_weight = self.product(self.lora_a, self.base.weight.astype(ms.float32))  # A W, [rank, h]
        scale = dora_scale(
            self.lora_magnitude, self.base_norms, low_weight, a=self.lora_a, b=self.lora_b, scaling=self.scaling
        )
        y = super().adapted(input_ids)
        return self.column_scale(y, scale.astype(y.dtype))


def build(config: "LoraConfig", target: Target, spec: LoraSpec) -> LoRAEmbedding:
    """See ``AdapterConfig.build``."""
    if config.lora_bias or not isinstance(config.init_lora_weights, bool):
        raise LoraMsError("on the embedding LoRA, rsLoRA and DoRA are supported, without bias or init_lora_weights")
    kind = DoRAEmbedding if config.use_dora else LoRAEmbedding
    return kind(target.layer, spec.lora_rank, spec.lora_alpha, use_rslora=config.use_rslora, operators=target.operators)
