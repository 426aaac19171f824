"""An embedding with vectors for virtual tokens."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from lora_ms.adapters.methods.base_cells import AdapterCell, freeze
from lora_ms.adapters.methods.virtual import NOT_MERGED
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding


class VirtualEmbedding(AdapterCell):
    """A frozen ``Embedding`` [v, h] whose ids from v on look up ``vectors()`` [virtual tokens, h]."""

    base: Embedding

    def __init__(self, base: Embedding, virtual_tokens: int):
        super().__init__()
        self.base = base
        freeze(base)
        self.virtual_tokens = virtual_tokens
        self.vocab_size, self.hidden_size = base.weight.shape
        self.outer = ops.MatMul()

    def vectors(self) -> Tensor:
        """[virtual tokens, h] float32, in the graph."""
        raise NotImplementedError

    def merge(self) -> nn.Cell:
        raise LoraMsError(f"{self.TITLE}: {NOT_MERGED}")

    def construct(self, input_ids: Tensor) -> Tensor:
        """ids [t] -> [t, h]."""
        places = input_ids.astype(ms.int32) - self.vocab_size
        virtual = (places >= 0).astype(ms.int32)
        x = self.base(input_ids.astype(ms.int32) * (1 - virtual))
        trained = ops.gather(self.vectors(), places * virtual, 0).astype(x.dtype)
        spread = self.outer(virtual.astype(x.dtype).reshape((-1, 1)), ops.ones((1, self.hidden_size), x.dtype))
        return x * (1 - spread) + trained * spread
