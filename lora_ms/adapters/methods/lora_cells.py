"""LoRA on a dense layer."""

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer
from numpy.typing import NDArray

from lora_ms.adapters.methods import lowrank
from lora_ms.adapters.methods.base import Pair, Target
from lora_ms.adapters.methods.base_cells import AdapterCell, State, dense_of, freeze, trained_copy
from lora_ms.adapters.methods.lora import LoraSpec
from lora_ms.errors import LoraMsError
from lora_ms.nn.dropout import DropoutKernel
from lora_ms.nn.layers import Embedding, Head
from lora_ms.nn.linear import Operands
from lora_ms.nn.parallel import split_axis
from lora_ms.nn.projection import Projection, projection_of
from lora_ms.ops import PORTABLE, Operators

if TYPE_CHECKING:
    from lora_ms.adapters.methods.lora import LoraConfig


def default_a() -> HeUniform:
    """How A starts: Kaiming uniform with slope sqrt(5), as in PEFT."""
    return HeUniform(negative_slope=math.sqrt(5))


class LoRADense(AdapterCell):
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
        compute_dtype: type in which to compute; None: the input's type, which the output always has.
        use_rslora: scale by ``lora_alpha / sqrt(lora_rank)``.
        lora_bias: train a bias [out] beside B, scaled as the update is.
        operators: the operators that it computes with.
        base: the layer to adapt, of these sizes, with operators of its own; None: a new ``nn.Dense``.
        kwargs: arguments of ``nn.Dense``, for a new one.

    Raises:
        ValueError: rank, alpha or dropout out of range.
    """

    TITLE = "LoRA"
    base: Projection

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
        base: Projection | None = None,
        **kwargs,
    ):
        super().__init__()
        if lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
        if lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {lora_alpha}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        self.was_dense = base is None  # then merge gives a nn.Dense back
        self.base = projection_of(nn.Dense(in_channels, out_channels, **kwargs), operators) if base is None else base
        freeze(self.base)
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        a_init = default_a() if lora_a_init is None else lora_a_init
        self.lora_a = Parameter(initializer(a_init, (lora_rank, in_channels), param_init_type), name="lora_a")
        self.lora_b = Parameter(initializer(lora_b_init, (out_channels, lora_rank), param_init_type), name="lora_b")
        self.has_lora_bias = lora_bias
        if lora_bias:
            self.lora_bias = Parameter(initializer("zeros", (out_channels,), param_init_type), name="lora_bias")
        # a parameter and no constant: adapters that differ in it alone share one compiled graph
        scaling = Tensor(lowrank.scaling_of(lora_rank, lora_alpha, use_rslora), ms.float32)
        self.scaling = Parameter(scaling, name="scaling", requires_grad=False)
        self.lora_dropout = DropoutKernel(lora_dropout, in_channels)
        self.adapted_product = self.base.adapted_product(lora_dropout)
        self.low_rank_update = self.base.operators.low_rank_update()
        self.add_bias = ops.BiasAdd()
        self.compute_dtype = compute_dtype
        self.trains_bias = False
        self.initial: list[NDArray] | None = None  # A and B of the update that was subtracted from the weight

    @classmethod
    def from_base(
        cls,
        base: Projection,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        train_bias: bool = False,
        **kwargs,
    ) -> "LoRADense":
        """An adapter on ``base``, which it freezes.

        Args:
            init_lora_weights: True for the constructor's defaults, or a name known to ``lowrank.initial_factors``. What
                PiSSA and OLoRA subtract from the weight they subtract from a copy.
            train_bias: train a copy of the bias, too.
            kwargs: further ones of the constructor.
        """
        cell = cls(
            base.in_channels,
            base.out_channels,
            lora_rank,
            lora_alpha,
            lora_dropout=lora_dropout,
            base=base,
            **kwargs,
        )
        if isinstance(init_lora_weights, str):
            cell._initialise(init_lora_weights)
        if train_bias and base.has_bias:
            cell.base = cell.base.with_bias(trained_copy(base.bias, "bias"))
            cell.trains_bias = True
        cell.on_weight_changed()
        return cell

    @classmethod
    def from_dense(
        cls, dense: nn.Cell, lora_rank: int, lora_alpha: float, *args, operators: Operators = PORTABLE, **kwargs
    ) -> "LoRADense":
        """``from_base`` on a ``nn.Dense``, or a cell like it, whose weight and bias it shares.

        operators: what it computes with; a projection has its own.
        """
        cell = cls.from_base(projection_of(dense, operators), lora_rank, lora_alpha, *args, **kwargs)
        cell.was_dense = not isinstance(dense, Projection)
        return cell

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(self.lora_rank, self.lora_alpha)

    def scaling_value(self) -> float:
        """The number that multiplies B A."""
        return float(self.scaling.asnumpy())

    # a weight from which PiSSA and OLoRA have subtracted the initial update

    def _initialise(self, init: str) -> None:
        if init == "loftq":
            self._begin_with(*lowrank.error_factors(quantisation_error(self.base), self.lora_rank))
            return
        rng = np.random.default_rng(np.random.randint(2**31))  # NumPy's stream, which mindspore.set_seed sets
        a, b = lowrank.initial_factors(init, self.base.numbers(), self.lora_rank, self.scaling_value(), rng)
        self._begin_with(a, b)
        if lowrank.changes_weight(init):
            self.subtract_initial_update(a, b)

    def _begin_with(self, a: NDArray, b: NDArray) -> None:
        self.lora_a.set_data(Tensor(a, self.lora_a.dtype))
        self.lora_b.set_data(Tensor(b, self.lora_b.dtype))

    def begin_with(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Of a start that has B, too, the update is subtracted from the weight: the layer computes the same as before.

        Raises:
            LoraMsError: the weight is quantised, and cannot change.
        """
        super().begin_with(values)
        if "lora_B.weight" in values:
            self.subtract_initial_update(values["lora_A.weight"], values["lora_B.weight"])

    def subtract_initial_update(self, a: NDArray, b: NDArray) -> None:
        """Makes the weight, in a copy of its own, what is left without ``scaling b a``."""
        self._add_to_weight(a, b, -self.scaling_value())
        self.initial = [a, b]

    def reset_initial_update(self, a: NDArray, b: NDArray) -> None:
        """Subtracts the update of ``a`` and ``b`` in place of the one that was subtracted before."""
        if self.initial is not None and all(map(np.array_equal, self.initial, (a, b))):
            return
        if self.initial is not None:
            self._add_to_weight(self.initial[0], self.initial[1], self.scaling_value())
        self.subtract_initial_update(a, b)

    def _add_to_weight(self, a: NDArray, b: NDArray, scaling: float) -> None:
        self.base = self.base.with_weight(lowrank.merged_weight(self.base.numbers(), a, b, scaling))
        freeze(self.base)
        if self.trains_bias:
            self.base.bias.requires_grad = True
        self.on_weight_changed()

    def on_weight_changed(self) -> None:
        """Computes again what depends on the frozen weight."""

    # files

    def tensors(self) -> dict[str, Parameter]:
        found = {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b}
        if self.has_lora_bias:
            found["lora_B.bias"] = self.lora_bias
        if self.trains_bias:
            found["base_layer.bias"] = self.base.bias
        return found

    def export(self) -> dict[str, NDArray[np.float32]]:
        """The tensors to store; after ``subtract_initial_update``, A and B of twice the rank, for the old weight."""
        values = super().export()
        if self.initial is None:
            return values
        a, b = lowrank.difference(values["lora_A.weight"], values["lora_B.weight"], *self.initial)
        return {**values, "lora_A.weight": a, "lora_B.weight": b}

    def accept(self, values: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """The tensors to load: of a pair of twice the rank (see ``export``), the first half; the second is subtracted
        from the weight, as it was before training."""
        rank, a, b = self.lora_rank, values.get("lora_A.weight"), values.get("lora_B.weight")
        if self.initial is None or a is None or b is None or len(a) != 2 * rank or b.shape[1] != 2 * rank:
            return values
        self.reset_initial_update(a[rank:], -b[:, rank:])
        return {**values, "lora_A.weight": a[:rank], "lora_B.weight": b[:, :rank]}

    def pair(self) -> Pair | None:
        values = self.export()
        return Pair(values["lora_A.weight"].copy(), values["lora_B.weight"].copy(), self.scaling_value())

    @property
    def joins_batches(self) -> bool:
        return not (self.has_lora_bias or self.trains_bias)

    def settings(self) -> dict[str, Parameter]:
        return {"scaling": self.scaling}

    def shape_key(self) -> Hashable:
        # a weight from which an update was subtracted is of no use to another adapter
        own_weight = id(self) if self.initial is not None else 0
        return (super().shape_key(), self.lora_dropout.probability, own_weight)

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.lora_alpha = state.spec.lora_alpha

    def factor_values(self) -> tuple[NDArray, NDArray]:
        """``factors`` on the host."""
        return self.lora_a.asnumpy(), self.lora_b.asnumpy()

    def merged_weight(self) -> NDArray[np.float32]:
        """The weight [out, in] that the layer amounts to."""
        a, b = self.factor_values()
        return lowrank.merged_weight(self.base.numbers(), a, b, self.scaling_value())

    def merge(self) -> nn.Cell:
        """The layer with the merged weight, formed in float32: of the kind that the adapter stands on."""
        bias = self.base.bias.asnumpy().astype(np.float32) if self.base.has_bias else None
        if self.has_lora_bias:
            bias = (0 if bias is None else bias) + self.scaling_value() * self.lora_bias.asnumpy()
        merged = self.base.replaced(self.merged_weight(), bias)
        return dense_of(merged) if self.was_dense else merged

    # training

    def rate_factor(self, parameter: Parameter, ratio: float, embedding: float) -> float:
        return ratio if parameter is self.lora_b else super().rate_factor(parameter, ratio, embedding)

    # the graph

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] as they are multiplied."""
        return self.lora_a, self.lora_b

    def adapted(self, x: Tensor) -> Tensor:
        """x [t, in] -> [t, out], without the layer's bias."""
        a, b = self.factors()
        a = a.astype(x.dtype)
        b = b.astype(x.dtype)
        scaling = self.scaling.astype(x.dtype)
        if self.has_lora_bias:
            update = self.low_rank_update(self.lora_dropout(x), a, b, scaling)
            update = self.add_bias(update, self.lora_bias.astype(x.dtype) * scaling)
            return self.base.multiply(x) + update
        draws = (None, None)
        if self.training and self.lora_dropout.probability > 0:
            draws = self.lora_dropout.draws.numbers(x)
        return self.base.multiply_adapted(self.adapted_product, x, a, b, scaling, draws)

    def operands(self) -> Operands | None:
        found = self.base.operands()
        if found is None or type(self) is not LoRADense or self.has_lora_bias or self.compute_dtype is not None:
            return None
        return found.updated("low rank", self.lora_a, self.lora_b, self.scaling, dropout=self.lora_dropout)

    def whole_weight(self) -> Tensor:
        """``W + scaling B A`` [out, in] float32 in the graph: for the head, whose product the loss forms in chunks."""
        a, b = self.factors()
        return self.base.whole_weight().astype(ms.float32) + ops.matmul(b, a) * self.scaling

    def construct(self, x: Tensor) -> Tensor:
        in_shape, in_dtype = x.shape, x.dtype
        dtype = in_dtype if self.compute_dtype is None else self.compute_dtype
        y = self.adapted(x.reshape((-1, in_shape[-1])).astype(dtype))  # [t, out]
        return self.base.finish(y).reshape(in_shape[:-1] + (-1,)).astype(in_dtype)


def quantisation_error(base: Projection) -> NDArray[np.float32]:
    """What quantisation took from the weight [out, in]. Raises LoraMsError where the weight before is not at hand."""
    original = base.original()
    if original is None:
        raise LoraMsError(
            "init_lora_weights loftq needs the weights before they were quantised: give the original model with "
            "quantization_config, not a quantised folder"
        )
    return original - base.numbers()


def initial_a(target: Target, lora_rank: int) -> Tensor | None:
    """This process's columns of the A that one process would have drawn; None where A is not split."""
    shard, name = target.shard, f"{target.name}.lora_a"
    if shard.count == 1 or split_axis(name) is None:
        return None
    whole = initializer(default_a(), (lora_rank, target.layer.in_channels * shard.count), ms.float32).init_data()
    return Tensor(np.ascontiguousarray(shard.part(name, whole.asnumpy())))


def build(config: "LoraConfig", target: Target, spec: LoraSpec) -> AdapterCell:
    """See ``AdapterConfig.build``."""
    from lora_ms.adapters.methods import dora_cells, embedding_cells

    if type(target.layer) is Embedding and config.use_lorafa:
        raise LoraMsError("use_lorafa does not support an adapter on the embedding: leave one of them out")
    if type(target.layer) is Embedding:
        return embedding_cells.build(config, target, spec)
    if type(target.layer) is Head and config.lora_bias:
        raise LoraMsError("lora_bias does not support an adapter on the head: leave one of them out")
    if config.wants_bits(target.name) and not projection_of(target.layer, target.operators).quantised:
        raise LoraMsError(
            f"layer_groups: {target.name} should have four bits, but the model is already loaded: load it with "
            "quantization_config, and name the other layers in llm_int8_skip_modules"
        )
    kind = dora_cells.DoRADense if config.use_dora else LoRADense
    init = config.init_lora_weights
    if config.sees_rows:
        raise LoraMsError(f"init_lora_weights {init} starts from rows, which lora-ms finetune has: set it there")
    if lowrank.changes_weight(str(init)) and projection_of(target.layer, target.operators).quantised:
        raise LoraMsError(
            f"init_lora_weights {init} changes the weights, and these are quantised: choose loftq, or True"
        )
    if init == "loftq" and not projection_of(target.layer, target.operators).quantised:
        if not config.quantises_some:
            raise LoraMsError(
                f"init_lora_weights loftq: {target.name} is not quantised; give quantization_config (--quantize nf4)"
            )
        init = True  # of layers that stay whole, nothing was taken away
    cell = kind.from_dense(
        target.layer,
        spec.lora_rank,
        spec.lora_alpha,
        lora_dropout=config.lora_dropout,
        init_lora_weights=True if config.begun else init,  # its tensors come from elsewhere
        train_bias=config.bias != "none",
        use_rslora=config.use_rslora,
        lora_bias=config.lora_bias,
        lora_a_init=initial_a(target, spec.lora_rank),
        compute_dtype=target.compute_dtype,
        operators=target.operators,
    )
    cell.lora_a.requires_grad = not config.use_lorafa
    return cell
