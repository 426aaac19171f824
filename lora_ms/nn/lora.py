"""The low-rank adapter of a dense layer (Hu et al., 2021): ``y = x W^T + b + (alpha / rank) x A^T B^T``."""

import math

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer

from lora_ms.nn.kernels import DropoutKernel, LowRankKernel


class LoRADense(nn.Dense):
    """A frozen ``nn.Dense`` with a trainable update of low rank beside its weight.

    The constructor takes MindPet's arguments. ``lora_a`` [rank, in] and ``lora_b`` [out, rank] are kept in
    ``param_init_type``, whatever the weight's type, and multiplied in the type of the input.

    Args:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        lora_rank: rows of A, at least 1.
        lora_alpha: above 0; the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: probability, in [0, 1), with which an input of A is zeroed in training.
        lora_a_init: an initializer or [rank, in] tensor; Kaiming uniform with slope sqrt(5) by default, as in PEFT.
        lora_b_init: an initializer or [out, rank] tensor; zeros by default, so that a fresh adapter changes nothing.
        param_init_type: type of A and B.
        compute_dtype: type in which to compute; None for the input's own. The output has the input's type.
        kwargs: those of ``nn.Dense``.

    Raises:
        ValueError: rank, alpha or dropout out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        lora_a_init=None,
        lora_b_init="zeros",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type | None = None,
        **kwargs,
    ):
        super().__init__(in_channels, out_channels, **kwargs)
        if lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
        if lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {lora_alpha}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        a_init = HeUniform(negative_slope=math.sqrt(5)) if lora_a_init is None else lora_a_init
        self.lora_rank, self.lora_alpha, self.scaling = lora_rank, lora_alpha, lora_alpha / lora_rank
        self.lora_a = Parameter(initializer(a_init, (lora_rank, in_channels), param_init_type), name="lora_a")
        self.lora_b = Parameter(initializer(lora_b_init, (out_channels, lora_rank), param_init_type), name="lora_b")
        self.lora_dropout = DropoutKernel(lora_dropout)
        self.low_rank = LowRankKernel(self.scaling)
        self.compute_dtype = compute_dtype
        self._freeze_base()

    def _freeze_base(self) -> None:
        self.weight.requires_grad = False
        if self.has_bias:
            self.bias.requires_grad = False

    @classmethod
    def from_dense(
        cls, dense: nn.Dense, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0, **kwargs
    ) -> "LoRADense":
        """An adapter on ``dense``, whose weight and bias it shares and freezes."""
        layer = cls(
            dense.in_channels,
            dense.out_channels,
            lora_rank,
            lora_alpha,
            lora_dropout,
            weight_init=dense.weight,
            bias_init=dense.bias,
            has_bias=dense.has_bias,
            activation=dense.activation,
            dtype=dense.weight.dtype,
            **kwargs,
        )
        layer.weight = dense.weight
        if dense.has_bias:
            layer.bias = dense.bias
        layer._freeze_base()
        return layer

    def merge(self) -> nn.Dense:
        """A plain ``nn.Dense`` of weight ``W + (alpha / rank) B A``, formed in float32."""
        update = self.lora_b.asnumpy().astype("float32") @ self.lora_a.asnumpy().astype("float32")
        weight = self.weight.asnumpy().astype("float32") + self.scaling * update
        return nn.Dense(
            self.in_channels,
            self.out_channels,
            Tensor(weight, self.weight.dtype),
            self.bias,
            self.has_bias,
            self.activation,
            self.weight.dtype,
        )

    def construct(self, x: Tensor) -> Tensor:
        in_shape, in_dtype = x.shape, x.dtype
        dtype = in_dtype if self.compute_dtype is None else self.compute_dtype
        x = x.reshape((-1, in_shape[-1])).astype(dtype)  # [t, in]
        y = self.matmul(x, self.weight.astype(dtype))
        if self.has_bias:
            y = self.bias_add(y, self.bias.astype(dtype))
        update, _ = self.low_rank(self.lora_dropout(x), self.lora_a.astype(dtype), self.lora_b.astype(dtype))
        y = y + update
        if self.activation_flag:
            y = self.activation(y)
        return ops.reshape(y, in_shape[:-1] + (-1,)).astype(in_dtype)
