"""The graphs of training: a micro-batch's gradient, and the optimiser's update (``FlatAdamW``)."""

import ctypes
import sys
from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops

from lora_ms.nn.graph import Graph
from lora_ms.nn.loss import summed_cross_entropy
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.train.layerwise import LayerwiseStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.recompute import LayerGradients, recomputed_layers

CHUNK_NUMBERS = 1 << 24  # logits held at once in the loss: 64 MB in float32


class SummedLoss(nn.Cell):
    """Summed cross-entropy of a batch's label tokens; head and logits are computed for these alone.

    input_ids, position_ids [b, s], target_index [c], targets [c] -> [] float32.
    """

    def __init__(self, model: nn.Cell, vocab_size: int, shard: Shard = WHOLE):
        super().__init__()
        self.model = model
        self.cross_entropy = summed_cross_entropy(vocab_size, CHUNK_NUMBERS, model.operators, shard)

    def of_output(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the last layer's output [c, h]; as ``SummedCrossEntropy`` returns it."""
        hidden = self.model.model.norm(x)
        return self.cross_entropy(hidden, self.model.head_weight(), targets)

    def construct(self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden_states(input_ids, position_ids, target_index)  # [c, h]
        return self.cross_entropy(hidden, self.model.head_weight(), targets)[0]


class MicroStep(Graph):
    """Adds the gradient of one micro-batch's summed loss to the optimiser's ``grad``; returns that loss []."""

    def __init__(self, loss: SummedLoss, optimizer: FlatAdamW, again: Sequence[int] = ()):
        """again: layers, from 0, whose activations are computed again instead of kept."""
        super().__init__()
        self.optimizer = optimizer
        self.gradients: nn.Cell
        if again:
            self.gradients = LayerGradients(loss, optimizer.params, optimizer.loss_scale, again)
        else:
            self.gradients = _Gradients(loss, optimizer)
        self.prepared: set[tuple] = set()  # shapes of batches

    def prepare(self, *batch: Tensor) -> None:
        """Compiles for batches of this shape, once, and hands back what the compiler has freed (8 MB a layer) before
        the first step takes memory of its own: glibc keeps it otherwise."""
        shapes = tuple(tuple(part.shape) for part in batch)
        if shapes in self.prepared:
            return
        self.prepared.add(shapes)
        self.compile(*batch)
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every libc
            if trim is not None:
                trim(0)

    def construct(self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor) -> Tensor:
        loss, grad = self.gradients(input_ids, position_ids, target_index, targets)
        ops.assign_add(self.optimizer.grad, grad)
        return loss


class _Gradients(nn.Cell):
    """Loss [] and gradient [n], every activation kept."""

    def __init__(self, loss: SummedLoss, optimizer: FlatAdamW):
        super().__init__()
        self.scaled, self.flatten = _Scaled(loss, optimizer), optimizer.flatten
        self.grad_fn = ops.value_and_grad(self.scaled, None, optimizer.params, has_aux=True)

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        (_, loss), grads = self.grad_fn(input_ids, position_ids, target_index, targets)
        return loss, self.flatten(grads)


class _Scaled(nn.Cell):
    """The loss times the loss scale, to differentiate, and the loss itself."""

    def __init__(self, loss: SummedLoss, optimizer: FlatAdamW):
        super().__init__()
        self.loss, self.optimizer = loss, optimizer

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss = self.loss(input_ids, position_ids, target_index, targets)
        return loss * self.optimizer.loss_scale.astype(ms.float32), loss


def micro_step(
    loss: SummedLoss, optimizer: FlatAdamW, recompute: bool | int | Sequence[int] = False
) -> MicroStep | LayerwiseStep:
    """The graphs for a micro-batch, by how much of it is computed again; as ``recomputed_layers`` takes it."""
    count = len(loss.model.model.layers)
    layers = recomputed_layers(recompute, count)
    return LayerwiseStep(loss, optimizer) if len(layers) == count else MicroStep(loss, optimizer, layers)
