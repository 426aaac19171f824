"""Low-rank adapters of a dense layer: LoRA (Hu et al., 2021), DoRA (Liu et al., 2024), AdaLoRA (Zhang et al., 2023).

An adapter cell stands where the layer stood. All of them have ``tensors()``, the trained parameters under PEFT's
names, and ``merge()``, the plain layer that computes the same.
"""

import math
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Normal, initializer
from numpy.typing import NDArray

from lora_ms.adapters import lowrank
from lora_ms.nn.dropout import DropoutKernel
from lora_ms.nn.projection import DenseProjection, Projection
from lora_ms.ops import PORTABLE, Operators


def default_a() -> HeUniform:
    """How A starts: Kaiming uniform with slope sqrt(5), as in PEFT."""
    return HeUniform(negative_slope=math.sqrt(5))


class LoRADense(nn.Dense):
    """``y = x W^T + b + scaling x A^T B^T`` with W and b frozen.

    The constructor takes MindPet's arguments, then ours. ``lora_a`` [rank, in] and ``lora_b`` [out, rank] are kept in
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
        use_rslora: scale by ``lora_alpha / sqrt(lora_rank)``.
        lora_bias: train a bias [out] beside B, scaled as the update is.
        operators: what it computes with.
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
        use_rslora: bool = False,
        lora_bias: bool = False,
        operators: Operators = PORTABLE,
        **kwargs,
    ):
        super().__init__(in_channels, out_channels, **kwargs)
        if lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
        if lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {lora_alpha}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        a_init = default_a() if lora_a_init is None else lora_a_init
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.lora_a = Parameter(initializer(a_init, (lora_rank, in_channels), param_init_type), name="lora_a")
        self.lora_b = Parameter(initializer(lora_b_init, (out_channels, lora_rank), param_init_type), name="lora_b")
        self.has_lora_bias = lora_bias
        if lora_bias:
            self.lora_bias = Parameter(initializer("zeros", (out_channels,), param_init_type), name="lora_bias")
        # a parameter and no constant: adapters that differ in it alone share one compiled graph
        scaling = Tensor(lowrank.scaling_of(lora_rank, lora_alpha, use_rslora), ms.float32)
        self.scaling = Parameter(scaling, name="scaling", requires_grad=False)
        self.lora_dropout = DropoutKernel(lora_dropout, in_channels)
        self.operators = operators
        self.adapted_product = operators.adapted_product(lora_dropout)
        self.low_rank = operators.low_rank_update()
        self.weight_product = operators.product()
        self.add_bias = ops.BiasAdd()
        self.compute_dtype = compute_dtype
        self.base_class: Any = nn.Dense
        self.trains_bias = False
        self.start: tuple[NDArray, NDArray] | None = None  # A and B taken out of the weight at the start
        self._freeze_base()

    def _freeze_base(self) -> None:
        self.weight.requires_grad = False
        if self.has_bias:
            self.bias.requires_grad = False

    @classmethod
    def from_dense(
        cls,
        dense: nn.Dense,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        train_bias: bool = False,
        **kwargs,
    ) -> "LoRADense":
        """An adapter on ``dense``, whose weight, bias and operators it shares; it freezes weight and bias.

        init_lora_weights: True for the constructor's defaults, or a name known to ``lowrank.starting_factors``; what
            PiSSA and OLoRA take out of the weight is taken out of a copy.
        train_bias: train a copy of the bias, too.
        """
        if isinstance(dense, Projection):
            kwargs["operators"] = dense.operators
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
        layer.base_class, layer.weight = type(dense), dense.weight
        if dense.has_bias:
            layer.bias = dense.bias
        layer._freeze_base()
        if isinstance(init_lora_weights, str):
            layer._start_from(init_lora_weights)
        if train_bias and dense.has_bias:
            layer.bias = Parameter(Tensor(dense.bias.asnumpy().astype(np.float32)), name="bias")
        layer.trains_bias = train_bias and dense.has_bias
        layer.rebase()
        return layer

    def _start_from(self, init: str) -> None:
        rng = np.random.default_rng(np.random.randint(2**31))  # NumPy's stream, which mindspore.set_seed sets
        weight, scaling = self.weight.asnumpy(), float(self.scaling.asnumpy())
        a, b = lowrank.starting_factors(init, weight, self.lora_rank, scaling, rng)
        self.lora_a.set_data(Tensor(a, self.lora_a.dtype))
        self.lora_b.set_data(Tensor(b, self.lora_b.dtype))
        if lowrank.takes_out(init):
            self.take_out(a, b)

    def take_out(self, a: NDArray, b: NDArray) -> None:
        """Makes the weight, in a copy of its own, what is left without ``scaling b a``."""
        weight = lowrank.merged_weight(self.weight.asnumpy(), a, b, -float(self.scaling.asnumpy()))
        self.weight: Parameter = Parameter(Tensor(weight, self.weight.dtype), name="weight", requires_grad=False)
        self.start = (a, b)
        self.rebase()

    def start_again(self, a: NDArray, b: NDArray) -> None:
        """Takes ``a`` and ``b`` out of the weight in place of what was taken out before."""
        if self.start is None or not all(map(np.array_equal, self.start, (a, b))):
            if self.start is not None:
                self.take_out(self.start[0], -self.start[1])
            self.take_out(a, b)

    def rebase(self) -> None:
        """Computes again what depends on the frozen weight."""

    def tensors(self) -> dict[str, Parameter]:
        """What is trained, by its name in PEFT's files."""
        found = {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b}
        if self.has_lora_bias:
            found["lora_B.bias"] = self.lora_bias
        if self.trains_bias:
            found["base_layer.bias"] = self.bias
        return found

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] as they are multiplied."""
        return self.lora_a, self.lora_b

    def merged_weight(self) -> NDArray[np.float32]:
        """The weight [out, in] that the layer amounts to, in float32."""
        a, b = self.lora_a.asnumpy(), self.lora_b.asnumpy()
        return lowrank.merged_weight(self.weight.asnumpy(), a, b, float(self.scaling.asnumpy()))

    def merge(self) -> nn.Cell:
        """The plain layer, of the class that the adapter stands on, with the merged weight, formed in float32."""
        bias = self.bias.asnumpy().astype(np.float32) if self.has_bias else np.float32(0)
        if self.has_lora_bias:
            bias = bias + float(self.scaling.asnumpy()) * self.lora_bias.asnumpy()
        has_bias, dtype = self.has_bias or self.has_lora_bias, self.weight.dtype
        if issubclass(self.base_class, DenseProjection):
            weight = Parameter(Tensor(self.merged_weight(), dtype), name="weight")
            new_bias = Parameter(Tensor(bias, dtype), name="bias") if has_bias else None
            return self.base_class(weight, new_bias, self.operators, self.activation)
        return self.base_class(
            self.in_channels,
            self.out_channels,
            Tensor(self.merged_weight(), dtype),
            Tensor(bias, dtype) if has_bias else None,
            has_bias,
            self.activation,
            dtype,
        )

    def adapted(self, x: Tensor) -> Tensor:
        """x [t, in] -> [t, out], without the layer's bias."""
        a, b = self.factors()
        scaling = self.scaling.astype(x.dtype)
        a, b = a.astype(x.dtype), b.astype(x.dtype)
        if not self.has_lora_bias:
            rows, columns = None, None
            if self.training and self.lora_dropout.probability > 0:
                rows, columns = self.lora_dropout.draws.numbers(x)
            return self.adapted_product(x, self.weight, a, b, scaling, rows=rows, columns=columns)
        update = self.low_rank(self.lora_dropout(x), a, b, scaling)
        update = self.add_bias(update, self.lora_bias.astype(x.dtype) * scaling)
        return self.weight_product(x, self.weight) + update

    def whole_weight(self) -> Tensor:
        """``W + scaling B A`` [out, in] in the graph: for the head, whose product the loss forms in chunks."""
        a, b = self.factors()
        return self.weight + (ops.matmul(b, a) * self.scaling).astype(self.weight.dtype)

    def construct(self, x: Tensor) -> Tensor:
        in_shape, in_dtype = x.shape, x.dtype
        dtype = in_dtype if self.compute_dtype is None else self.compute_dtype
        y = self.adapted(x.reshape((-1, in_shape[-1])).astype(dtype))  # [t, out]
        if self.has_bias:
            y = self.add_bias(y, self.bias.astype(dtype))
        if self.activation_flag:
            y = self.activation(y)
        return ops.reshape(y, in_shape[:-1] + (-1,)).astype(in_dtype)


def dora_scale(
    magnitude: Tensor, base_norms: Tensor, low_weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor
) -> Tensor:
    """magnitude / |W + scaling B A| [out]; ``base_norms`` [out] are |W|^2, ``low_weight`` [rank, out] is A W^T."""
    b_t = ops.transpose(b, (1, 0))
    cross = (low_weight * b_t).sum(0)
    square = (ops.matmul(ops.matmul(a, ops.transpose(a, (1, 0))), b_t) * b_t).sum(0)
    norm = ops.sqrt(base_norms + scaling * (2.0 * cross + scaling * square))
    return magnitude / ops.stop_gradient(norm)


class DoRADense(LoRADense):
    """``y = magnitude / |W + scaling B A| (x W^T + scaling x A^T B^T) + b``, row by row of the weight.

    ``lora_magnitude`` [out] is trained. The norm is taken as a constant by the gradient, as in the paper, and is found
    without B A: |W|^2 + 2 scaling rowdot(W A^T, B) + scaling^2 rowdot(B (A A^T), B). Dropout acts on the adapter's
    input alone.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ones = initializer("ones", (self.out_channels,), ms.float32)
        self.lora_magnitude = Parameter(ones, name="lora_magnitude")
        self.column_scale = self.operators.column_scale()
        self.product = ops.MatMul()
        self.product_t = ops.MatMul(transpose_b=True)
        self.rebase()

    def rebase(self) -> None:
        norms = lowrank.row_norms(self.weight.asnumpy().astype(np.float32))
        self.base_norms = Tensor(np.square(norms))  # [out]
        self.lora_magnitude.set_data(Tensor(lowrank.row_norms(self.merged_weight(plain=True))))

    def tensors(self) -> dict[str, Parameter]:
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude}

    def merged_weight(self, plain: bool = False) -> NDArray[np.float32]:
        a, b, scaling = self.lora_a.asnumpy(), self.lora_b.asnumpy(), float(self.scaling.asnumpy())
        magnitude = None if plain else self.lora_magnitude.asnumpy()
        return lowrank.merged_weight(self.weight.asnumpy(), a, b, scaling, magnitude)

    def row_scale(self) -> Tensor:
        low_weight = self.product_t(self.lora_a, self.weight.astype(ms.float32))  # A W^T, [rank, out]
        return dora_scale(self.lora_magnitude, self.base_norms, low_weight, self.lora_a, self.lora_b, self.scaling)

    def adapted(self, x: Tensor) -> Tensor:
        return self.column_scale(super().adapted(x), self.row_scale().astype(x.dtype))

    def whole_weight(self) -> Tensor:
        scale = self.row_scale().reshape((-1, 1)).astype(self.weight.dtype)
        return super().whole_weight() * self.product(scale, ops.ones((1, self.in_channels), self.weight.dtype))


class AdaLoRADense(LoRADense):
    """``y = x W^T + b + alpha / rank x (E A)^T B^T`` with a trained diagonal E: the form of a singular value
    decomposition, whose least important values are zeroed as training goes on.

    ``lora_e`` [rank, 1] starts at zero, A and B normal with deviation 0.02.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"lora_a_init": Normal(0.02), "lora_b_init": Normal(0.02), **kwargs})
        self.lora_e = Parameter(initializer("zeros", (self.lora_rank, 1), ms.float32), name="lora_e")
        self.scaling.set_data(Tensor(self.lora_alpha / (self.lora_rank + 1e-5), ms.float32))  # PEFT's own guard
        self.product = ops.MatMul()

    def tensors(self) -> dict[str, Parameter]:
        found = {"lora_A": self.lora_a, "lora_B": self.lora_b, "lora_E": self.lora_e}
        return {**found, "base_layer.bias": self.bias} if self.trains_bias else found

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_a * self.product(self.lora_e, ops.ones((1, self.in_channels), ms.float32)), self.lora_b

    def merged_weight(self) -> NDArray[np.float32]:
        a, b = self.lora_a.asnumpy() * self.lora_e.asnumpy(), self.lora_b.asnumpy()
        return lowrank.merged_weight(self.weight.asnumpy(), a, b, float(self.scaling.asnumpy()))
