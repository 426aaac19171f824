"""The embedding and the head with rows that train; all other rows are the model's."""

from collections.abc import Hashable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.adapters.methods.base_cells import AdapterCell, freeze
from lora_ms.adapters.methods.trained_tokens import (
    OPTION,
    PARAMETER,
    TENSOR,
    TokenIndices,
    Tokens,
    check_vocabulary,
    modules,
)
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding, Head


class TokenRows(AdapterCell):
    """A frozen layer of weight [v, h] with ``trained_tokens`` [tokens, h] in the place of some rows.

    Args:
        base: the layer.
        tokens: which rows.
        trained: what stands there; None for the layer's rows, as a start.
    """

    def __init__(self, base: Any, tokens: Tokens, trained: Parameter | None = None):
        super().__init__()
        self.base = base
        freeze(base)
        self.tokens = tokens
        self.stores = trained is None
        if trained is None:
            rows = base.weight.asnumpy()[list(tokens)].astype(np.float32)
            trained = Parameter(Tensor(rows), PARAMETER)
        self.trained_tokens = trained

    def tensors(self) -> dict[str, Parameter]:
        return {TENSOR: self.trained_tokens} if self.stores else {}

    def shape_key(self) -> Hashable:
        return (super().shape_key(), self.tokens)

    def merged(self) -> Parameter:
        """The weight that the layer amounts to."""
        weight = self.base.weight.asnumpy().copy()
        weight[list(self.tokens)] = self.trained_tokens.asnumpy().astype(weight.dtype)
        return Parameter(Tensor(weight, self.base.weight.dtype), name="weight")


class EmbeddingTokenRows(TokenRows):
    """An ``Embedding`` some of whose rows train."""

    base: Embedding

    def __init__(self, base: Embedding, tokens: Tokens):
        super().__init__(base, tokens)
        vocab_size, self.hidden_size = base.weight.shape
        places = np.zeros(vocab_size, np.int32)
        places[list(tokens)] = np.arange(1, len(tokens) + 1)
        self.places = Tensor(places)  # of each id, 1 + its index among ``tokens``, or 0
        self.outer = ops.MatMul()

    def merge(self) -> Embedding:
        return Embedding(self.merged(), self.base.operators)

    def construct(self, input_ids: Tensor) -> Tensor:
        """ids [t] -> [t, h]."""
        x = self.base(input_ids)
        place = ops.gather(self.places, input_ids, 0)
        here = (place > 0).astype(ms.int32)
        rows = ops.gather(self.trained_tokens, (place - 1) * here, 0).astype(x.dtype)
        spread = self.outer(here.astype(x.dtype).reshape((-1, 1)), ops.ones((1, self.hidden_size), x.dtype))
        return x * (1 - spread) + rows * spread


class HeadTokenRows(TokenRows):
    """A ``Head`` some of whose rows train; a tied one shares them with the embedding."""

    base: Head

    def __init__(self, base: Head, tokens: Tokens, trained: Parameter | None = None):
        super().__init__(base, tokens, trained)
        self.ids = Tensor(np.array(tokens, np.int32).reshape(-1, 1))
        self.replace = ops.TensorScatterUpdate()

    def merge(self) -> Head:
        return Head(self.merged(), None, self.base.operators)

    def whole_weight(self) -> Tensor:
        """[v, h] float32 in the graph: the loss forms the product in chunks."""
        return self.replace(self.base.whole_weight().astype(ms.float32), self.ids, self.trained_tokens)


def build(indices: TokenIndices, cells: Mapping[str, nn.Cell], taken: Mapping[str, nn.Cell]) -> dict[str, nn.Cell]:
    """The cells of a model whose rows train by path, and that of a head tied to one.

    Args:
        cells: of the model, by path.
        taken: those that the adapter replaces otherwise.

    Raises:
        LoraMsError: a token beyond the vocabulary, a module that trains otherwise, too, or that is split.
    """
    wanted = modules(indices, cells)
    ends = {name: cell for name, cell in cells.items() if type(cell) in (Embedding, Head)}
    built: dict[str, nn.Cell] = {}
    for name, tokens in wanted.items():
        if name not in ends:
            raise LoraMsError(f"{OPTION}: {name} is no embedding or head that can train")
        check_vocabulary(tokens, ends[name].weight.shape[0])
    embedding = next((name for name in wanted if isinstance(ends[name], Embedding)), None)
    if embedding is not None:
        rows = built[embedding] = EmbeddingTokenRows(ends[embedding], wanted[embedding])
        for name, head in ends.items():
            tied = isinstance(head, Head) and head.weight is ends[embedding].weight
            if tied and wanted.get(name, wanted[embedding]) == wanted[embedding]:
                built[name] = HeadTokenRows(head, rows.tokens, rows.trained_tokens)
    for name, tokens in wanted.items():
        if name not in built:
            built[name] = HeadTokenRows(ends[name], tokens)
    both = sorted(built.keys() & taken.keys())
    if both:
        raise LoraMsError(f"{OPTION} and target_modules or modules_to_save both train {both[0]}: leave one of them out")
    return built
