"""Prompt tuning on the embedding."""

from typing import TYPE_CHECKING

import numpy as np
from mindspore import Parameter, Tensor

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.base_cells import AdapterCell
from lora_ms.adapters.methods.virtual import TENSOR, PromptSpec
from lora_ms.adapters.methods.virtual_cells import VirtualEmbedding
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding

if TYPE_CHECKING:
    from lora_ms.adapters.methods.prompt import PromptTuningConfig


class PromptEmbedding(VirtualEmbedding):
    """A ``VirtualEmbedding`` whose vectors are ``prompt_embeddings`` [virtual tokens, h].

    Args:
        base: the embedding.
        start: what they start from.
    """

    TITLE = "prompt tuning"

    def __init__(self, base: Embedding, start: np.ndarray):
        super().__init__(base, len(start))
        self.prompt_embeddings = Parameter(Tensor(start.astype(np.float32)), TENSOR)

    @property
    def spec(self) -> PromptSpec:
        return PromptSpec(self.virtual_tokens)

    def tensors(self) -> dict[str, Parameter]:
        return {TENSOR: self.prompt_embeddings}

    def vectors(self) -> Tensor:
        return self.prompt_embeddings


def build(config: "PromptTuningConfig", target: Target, spec: PromptSpec) -> AdapterCell:
    """See ``AdapterConfig.build``."""
    vocab_size, hidden_size = target.layer.weight.shape
    rng = np.random.default_rng(np.random.randint(2**31))  # NumPy's stream, which mindspore.set_seed sets
    if config.prompt_tuning_init == "RANDOM":
        return PromptEmbedding(target.layer, rng.standard_normal((spec.num_virtual_tokens, hidden_size)))
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = rng.integers(0, vocab_size, spec.num_virtual_tokens)
    else:
        ids = np.resize(np.asarray(config.init_token_ids), spec.num_virtual_tokens)
    wrong = [int(token) for token in ids if not 0 <= token < vocab_size]
    if wrong:
        raise LoraMsError(f"init_token_ids: {wrong[0]} is not in the model's vocabulary of {vocab_size}")
    return PromptEmbedding(target.layer, target.layer.weight.asnumpy()[ids])
