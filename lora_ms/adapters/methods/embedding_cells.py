"""Low-rank adapters of an embedding, where ids look up a column of A: ``y = W[i] + scaling A^T[i] B^T``."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import Normal, initializer
from numpy.typing import NDArray

from lora_ms.adapters import lowrank
from lora_ms.adapters.methods.lora_cells import dora_scale
from lora_ms.nn.layers import Embedding
from lora_ms.ops import PORTABLE


class LoRAEmbedding(Embedding):
    """A frozen ``Embedding`` with ``lora_a`` [rank, vocabulary], zero at the start, and ``lora_b`` [h, rank].

    No dropout acts on it, as in PEFT. Methods as in ``LoRADense``.
    """

    def __init__(self, embedding: Embedding, lora_rank: int, lora_alpha: float, use_rslora: bool = False):
        vocab_size, hidden_size = embedding.weight.shape
        super().__init__(1, 1, embedding.weight.dtype)
        self.weight = embedding.weight
        self.weight.requires_grad = False
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.lora_a = Parameter(initializer("zeros", (lora_rank, vocab_size), ms.float32), name="lora_a")
        self.lora_b = Parameter(initializer(Normal(1.0), (hidden_size, lora_rank), ms.float32), name="lora_b")
        scaling = Tensor(lowrank.scaling_of(lora_rank, lora_alpha, use_rslora), ms.float32)
        self.scaling = Parameter(scaling, name="scaling", requires_grad=False)
        self.product = ops.MatMul()
        self.product_t = ops.MatMul(transpose_b=True)

    def tensors(self) -> dict[str, Parameter]:
        return {"lora_embedding_A": self.lora_a, "lora_embedding_B": self.lora_b}

    def merged_weight(self) -> NDArray[np.float32]:
        """[vocabulary, h], in float32."""
        a, b = self.lora_a.asnumpy(), self.lora_b.asnumpy()
        return lowrank.merged_weight(self.weight.asnumpy().T, a, b, float(self.scaling.asnumpy())).T

    def merge(self) -> Embedding:
        embedding = Embedding(self.weight.shape[0], self.weight.shape[1], self.weight.dtype)
        embedding.weight.set_data(Tensor(np.ascontiguousarray(self.merged_weight()), self.weight.dtype))
        return embedding

    def adapted(self, input_ids: Tensor) -> Tensor:
        low = ops.gather(ops.transpose(self.lora_a, (1, 0)), input_ids, 0) * self.scaling  # [t, rank]
        base = ops.gather(self.weight, input_ids, 0)
        return base + self.product_t(low, self.lora_b).astype(base.dtype)

    def construct(self, input_ids: Tensor) -> Tensor:
        return self.adapted(input_ids)


class DoRAEmbedding(LoRAEmbedding):
    """``LoRAEmbedding`` whose columns are brought to the lengths ``lora_magnitude`` [h]."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        norms = lowrank.row_norms(self.weight.asnumpy().astype(np.float32).T)
        self.base_norms = Tensor(np.square(norms))  # [h]
        self.lora_magnitude = Parameter(Tensor(norms), name="lora_magnitude")
        self.column_scale = PORTABLE.column_scale()

    def tensors(self) -> dict[str, Parameter]:
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude}

    def merged_weight(self) -> NDArray[np.float32]:
        a, b, magnitude = self.lora_a.asnumpy(), self.lora_b.asnumpy(), self.lora_magnitude.asnumpy()
        return lowrank.merged_weight(self.weight.asnumpy().T, a, b, float(self.scaling.asnumpy()), magnitude).T

    def adapted(self, input_ids: Tensor) -> Tensor:
        low_weight = self.product(self.lora_a, self.weight.astype(ms.float32))  # A W, [rank, h]
        scale = dora_scale(self.lora_magnitude, self.base_norms, low_weight, self.lora_a, self.lora_b, self.scaling)
        y = super().adapted(input_ids)
        return self.column_scale(y, scale.astype(y.dtype))
