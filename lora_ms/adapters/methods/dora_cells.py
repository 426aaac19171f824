"""DoRA (Liu et al., 2024) on a dense layer: the length of each row of the weight trains apart from its direction."""

import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import initializer
from numpy.typing import NDArray

from lora_ms.adapters.methods import lowrank
from lora_ms.adapters.methods.lora_cells import LoRADense


def dora_scale(
    magnitude: Tensor, base_norms: Tensor, low_weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor
) -> Tensor:
    """magnitude / |W + scaling B A| [out], without forming B A.

    The squared length of a row is |W|^2 + 2 scaling rowdot(W A^T, B) + scaling^2 rowdot(B (A A^T), B); the gradient
    takes the length as a constant, as the paper has it.

    Args:
        magnitude: [out].
        base_norms: |W|^2 of each row, [out].
        low_weight: A W^T [rank, out].
        a: [rank, in].
        b: [out, rank].
        scaling: [].
    """
    b_t = ops.transpose(b, (1, 0))
    cross = (low_weight * b_t).sum(0)
    square = (ops.matmul(ops.matmul(a, ops.transpose(a, (1, 0))), b_t) * b_t).sum(0)
    norm = ops.sqrt(base_norms + scaling * (2.0 * cross + scaling * square))
    return magnitude / ops.stop_gradient(norm)


class DoRADense(LoRADense):
    """``y = magnitude / |W + scaling B A| (x W^T + scaling x A^T B^T) + b``, row by row of the weight.

    ``lora_magnitude`` [out] is trained and starts as the rows' lengths. Dropout acts on the adapter's input alone.
    """

    TITLE = "DoRA"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ones = initializer("ones", (self.base.out_channels,))
        self.lora_magnitude = Parameter(ones, name="lora_magnitude")
        # |W|^2 of each row: a parameter and no constant, as layers that share a compiled graph each have their own
        zeros = initializer("zeros", (self.base.out_channels,))
        self.base_norms = Parameter(zeros, name="base_norms", requires_grad=False)
        self.column_scale = self.base.operators.column_scale()
        self.on_weight_changed()

    def on_weight_changed(self) -> None:
        self.base_norms.set_data(Tensor(np.square(lowrank.row_norms(self.base.numbers()))))
        self.lora_magnitude.set_data(Tensor(lowrank.row_norms(super().merged_weight())))

    def tensors(self) -> dict[str, Parameter]:
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude}

    @property
    def joins_batches(self) -> bool:
        return False

    def merged_weight(self) -> NDArray[np.float32]:
        a, b = self.factor_values()
        return lowrank.merged_weight(self.base.numbers(), a, b, self.scaling_value(), self.lora_magnitude.asnumpy())

    def row_scale(self) -> Tensor:
        """magnitude / |W + scaling B A| [out]."""
        low_weight = self.base.multiply_rows(self.lora_a)
        return dora_scale(
            self.lora_magnitude, self.base_norms, low_weight, a=self.lora_a, b=self.lora_b, scaling=self.scaling
        )

    def adapted(self, x: Tensor) -> Tensor:
        return self.column_scale(super().adapted(x), self.row_scale().astype(x.dtype))

    def whole_weight(self) -> Tensor:
        weight = super().whole_weight()
        scale = self.row_scale().reshape((-1, 1))
        # the outer product with ones spreads the column over the row without a broadcast, which keeps indices
        return weight * ops.matmul(scale, ops.ones((1, self.base.in_channels), weight.dtype))
