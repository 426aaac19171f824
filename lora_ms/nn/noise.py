"""NEFTune (Jain et al., 2023): noise on the embedding's output while a model is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.dropout import Draws


class NoisyEmbedding(nn.Cell):
    """``embedding(ids) + u`` for ids [t] -> [t, h], u uniform between ``-size`` and ``size`` []."""

    def __init__(self, embedding: nn.Cell):
        super().__init__(auto_prefix=False)
        self.embedding = embedding
        self.unrotated = embedding.unrotated
        self.size = Parameter(Tensor(0.0, ms.float32), name="neftune_size", requires_grad=False)
        self.draws = Draws()

    def construct(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        noise = self.size * (2.0 * self.draws(x) - 1.0)
        return x + ops.stop_gradient(noise).astype(x.dtype)


class EmbeddingNoise:
    """Puts a ``NoisyEmbedding`` into ``decoder`` while a gradient is taken, and only then.

    Args:
        decoder: a cell with ``embed_tokens``.
        alpha: the noise is as large as ``alpha / sqrt(tokens of a line * hidden size)``.
    """

    def __init__(self, decoder: nn.Cell, alpha: float):
        self.decoder = decoder
        self.alpha = alpha
        self.plain = decoder.embed_tokens
        self.width = next(iter(self.plain.get_parameters())).shape[1]  # of its weight, also under an adapter
        self.noisy = self._named(NoisyEmbedding, self.plain)

    def _named(self, act, *args):
        # a cell renames the parameters of one that is put into it
        names = [(parameter, parameter.name) for parameter in self.plain.get_parameters()]
        result = act(*args)
        for parameter, name in names:
            parameter.name = name
        return result

    @contextmanager
    def on(self, line: int) -> Iterator[None]:
        """Inside the block: noise for lines of ``line`` tokens."""
        size = self.alpha / (line * self.width) ** 0.5
        self.noisy.size.set_data(Tensor(size, ms.float32))
        self._named(setattr, self.decoder, "embed_tokens", self.noisy)
        try:
            yield
        finally:
            self._named(setattr, self.decoder, "embed_tokens", self.plain)
