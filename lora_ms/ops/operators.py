"""The operators that cells compute with, chosen once for a run and passed to every cell, as its dtype is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import mindspore as ms
from mindspore import Tensor, nn
from numpy.typing import NDArray

from lora_ms.ops import ascend, native, native_layers, portable, portable_int4, portable_nf4

Visibility = Tensor
"""What each query may see: ``first`` [b, s] int32, the earliest key of its line that it sees; it sees the keys from
there to itself. ``Operators.visibility`` makes of it, once in a forward pass, the form that ``Operators.attention`` of
the same operators reads (``first`` itself, scores to add, or a mask); everybody else only passes it on."""


class TrainedLayers(Protocol):
    """Layers of a decoder in training, which no graph may hold.

    x [t, h]; rope; draws: the table of numbers for dropout; visible: ``attention``'s, of each window.
    """

    def __call__(self, x: Tensor, rope: Sequence[Tensor], draws: Tensor, visible: Sequence[Tensor]) -> Tensor:
        """-> the layers on x [t, h]."""

    def keeping(self, x: Tensor, rope: Sequence[Tensor], draws: Tensor, visible: Sequence[Tensor]) -> Tensor:
        """The same; what ``backward`` needs is kept, once."""

    def backward(
        self, x: Tensor, grad: Tensor, rope: Sequence[Tensor], draws: Tensor, visible: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """With the gradient of the output -> those of x, zero where it has none, and of the factors that train [n]."""


@dataclass(frozen=True)
class Operators:
    """Factories of complete cells, each with its gradient; shape legend in ``lora_ms.ops.portable``.

    "Without a gradient" below: the cell is used inside a hand-written backward or in inference, and is never
    differentiated.

    A cell takes them as ``operators`` and makes in its constructor what it computes with. Which device or library is
    behind them, nobody outside ``lora_ms.ops`` asks.
    """

    name: str
    stream_dtype: Callable[[ms.Type], ms.Type]
    """The type of what flows between layers, from that of the weights."""
    reads_bfloat16: bool
    """Whether weights may be bfloat16."""
    embedding: Callable[[], nn.Cell]
    """(ids [t], W [v, h]) -> the rows of W [t, h]; in float32 where the type of W has no arithmetic."""
    product: Callable[[], nn.Cell]
    """(x [t, in], W [out, in]) -> x W^T [t, out], in the type of x."""
    product_back: Callable[[], nn.Cell]
    """(dy [t, out], W [out, in]) -> dy W [t, in], in the type of dy; without a gradient."""
    adapted_product: Callable[[float], nn.Cell]
    """dropout -> cell: (x [t, in], W [out, in], A [rank, in], B [out, rank], scaling [], rows [t, 1], columns [1, in])
    -> x W^T + scaling dropout(x) A^T B^T [t, out]. rows, columns: random numbers in [0, 1), see ``portable.Dropout``;
    both None: no dropout. ``scaling`` has no gradient."""
    nf4_absmax: Callable[[], nn.Cell]
    """(absmax [n] uint8, codes [256], nested absmax [n / 256, rounded up], offset [1]) -> absmax [n] float32 of
    weights in NF4; without a gradient."""
    nf4_product: Callable[[], nn.Cell]
    """(x [t, in], codes [out, in / 2] uint8, absmax [out * in / 64] float32) -> x W^T [t, out], in the type of x, for W
    in NF4, of which codes hold two numbers a byte, by rows; ``codes`` may have another shape where in is odd. W has no
    gradient."""
    nf4_product_back: Callable[[], nn.Cell]
    """(dy [t, out], codes, absmax) -> dy W [t, in], in the type of dy; without a gradient."""
    nf4_adapted_product: Callable[[float], nn.Cell]
    """As ``adapted_product``, with codes and absmax in the place of W."""
    int4_product: Callable[[], nn.Cell]
    """(x [t, in], codes [out, in / 2] uint8, scales [out, groups] float16, zeros [out, groups] uint8) -> x W^T
    [t, out], in the type of x, for ``W = scale (code - zero)``, of which codes hold two numbers a byte. W has no
    gradient."""
    int4_product_back: Callable[[], nn.Cell]
    """(dy [t, out], codes, scales, zeros) -> dy W [t, in], in the type of dy; without a gradient."""
    int4_adapted_product: Callable[[float], nn.Cell]
    """As ``adapted_product``, with codes, scales and zeros in the place of W."""
    column_order: Callable[[], nn.Cell]
    """(x [t, n], order [n], inverse [n]) -> x[:, order], for a permutation and its inverse, int32."""
    low_rank_update: Callable[[], nn.Cell]
    """(x [t, in], A [rank, in], B [out, rank], scaling []) -> scaling x A^T B^T [t, out]."""
    row_updates: Callable[[], nn.Cell]
    """(y [t, out], x [t, in], A [places, rank, in] float32, B [places, rank, out] float32, choice [lines] int32) -> y
    + x A^T B with the A and B of each token's line, of t / lines tokens; without a gradient."""
    column_scale: Callable[[], nn.Cell]
    """(x [t, n], scale [n]) -> x * scale [t, n]."""
    rms_norm: Callable[[float], nn.Cell]
    """eps -> cell: (x [t, h], weight [h]) -> x / sqrt(mean(x^2) + eps) * weight [t, h]."""
    gated_silu: Callable[[], nn.Cell]
    """(gate, up) -> gate sigmoid(gate) up, elementwise."""
    visibility: Callable[..., nn.Cell]
    """num_heads, num_kv_heads, dtype, flash -> cell: first [b, s] int32 -> what ``attention`` reads."""
    attention: Callable[..., nn.Cell]
    """num_heads, num_kv_heads, head_dim, dtype, flash -> cell: (q [t, n_h * d], k [t, n_kv * d], v [t, n_kv * d], not
    rotated, rope, visible) -> [t, n_h * d]. rope: ``nn.rope.RotaryTables``' four. dtype: of q, k and v. flash: by the
    device's fused attention, if it has one for that type. Its ``keeping`` also gives the ``KEPT`` tensors with which
    ``known``, differentiated in another graph, does without a second forward pass."""
    cached_visibility: Callable[..., nn.Cell]
    """num_heads, num_kv_heads, length -> cell: (first [b, new] int32, start [b]) -> what ``cached_attention`` reads,
    for new tokens in the slots from ``start`` on of a cache of ``length`` slots a line."""
    padding_cost: float
    """What a token of padding takes in training, as a share of another token's time."""
    lends_memory: bool
    """Whether a compiled graph computes with what memory its parameters have been given since (``nn/sharing.py``)."""
    reads_used_slots: bool
    """Whether ``cached_attention`` leaves alone the slots that are not in use yet, so that a long cache costs nothing
    before it is filled."""
    cached_attention: Callable[..., nn.Cell]
    """As ``attention``, without a gradient, of new tokens to those in a cache, into which they are written: (q, k, v,
    rope, visible, (keys, values [lines * n_kv * length, d] parameters, rows [b * n_kv * new] int32 that the new take,
    begins [b * n_kv] int32, the rows where their heads begin)), for all lines of the cache in their order, or fewer."""
    cached_layers: Callable[..., Callable[..., Tensor]] | None
    """None, or eps, parts, parameters -> a function that no graph may hold: (x [t, h] of new tokens, rope,
    ``cached_attention``'s rows and begins, its ``visible`` of each window) -> layers of a decoder on x [t, h].

    eps: of all norms. parts: the number of layers; then of each what ``nn.linear.LayerOperands.parts`` has, where
    nothing is dropped out. parameters, of each layer: its own, and the cache's keys and values, which are written."""
    head_logits: Callable[..., Callable[[Tensor, Tensor], NDArray]] | None
    """None, or eps, the last norm's weight [h], the head [v, h] -> a function that no graph may hold: (x [t, h] of the
    last layer, rows [n] int32) -> logits [n, v] float32 of what follows these tokens."""
    trained_layers: Callable[..., TrainedLayers] | None
    """None, or eps, parts, parameters, rates, wanted, factors -> ``TrainedLayers``.

    parts: as above, with dropout. parameters: of each layer, its own. rates: of each linear layer, that of dropout.
    wanted: the first half-layer that has a gradient, and whether x has one. factors: the number of numbers of the
    factors that train, A and B of each layer's linear layers in their order."""
    head_product: Callable[[], nn.Cell]
    """(hidden [c, h], head [v, h]) -> logits [c, v] float32; without a gradient."""
    head_product_back: Callable[[], nn.Cell]
    """(probs [c, v] float32, head [v, h]) -> probs head [c, h]; without a gradient."""
    cross_entropy: Callable[[], nn.Cell]
    """(hidden [c, h], head [v, h], targets [c] int32) -> (summed loss [], d hidden [c, h], right answers []) float32;
    with a method ``head_gradient`` of the same inputs -> d head [v, h]."""
    adamw: Callable[[float, float, float], nn.Cell]
    """beta1, beta2, eps -> cell: one step on vectors [n], see ``portable.AdamW``."""
    adamw_8bit: Callable[[float, float, float], nn.Cell]
    """The same with moments of eight bits, see ``portable.AdamW8bit``."""


def _flash(flash_cell: Callable[..., nn.Cell], plain_cell: Callable[..., nn.Cell]) -> Callable[..., nn.Cell]:
    """Makes the fused cell where ``flash`` asks for it and it supports ``dtype``, else the plain one."""

    def make(dtype: ms.Type, flash: bool, **sizes: int) -> nn.Cell:
        return (flash_cell if flash and dtype in ascend.FLASH_TYPES else plain_cell)(**sizes)

    return make


def _no_flash(cell: Callable[..., nn.Cell]) -> Callable[..., nn.Cell]:
    """A factory for a device that has no fused attention."""
    return _flash(cell, cell)


def _unsized(cell: Callable[..., nn.Cell]) -> Callable[..., nn.Cell]:
    """A factory that takes sizes and does not need them: the operator reads them from its inputs."""

    def make(**sizes: Any) -> nn.Cell:
        return cell()

    return make


PORTABLE = Operators(
    name="portable",
    stream_dtype=portable.stream_dtype,
    reads_bfloat16=False,
    embedding=portable.EmbeddingRows,
    product=portable.Product,
    product_back=portable.MatMul,
    adapted_product=portable.AdaptedProduct,
    nf4_absmax=portable_nf4.NF4Absmax,
    nf4_product=portable_nf4.NF4Product,
    nf4_product_back=portable_nf4.NF4ProductBack,
    nf4_adapted_product=portable_nf4.NF4AdaptedProduct,
    int4_product=portable_int4.Int4Product,
    int4_product_back=portable_int4.Int4ProductBack,
    int4_adapted_product=portable_int4.Int4AdaptedProduct,
    column_order=portable_int4.ColumnOrder,
    low_rank_update=portable.LowRankUpdate,
    row_updates=portable.RowUpdates,
    column_scale=portable.ColumnScale,
    rms_norm=portable.RMSNorm,
    gated_silu=portable.GatedSiLU,
    visibility=_no_flash(portable.ScoreMask),
    attention=_no_flash(portable.Attention),
    cached_visibility=portable.CachedScoreMask,
    padding_cost=1.0,
    lends_memory=True,
    reads_used_slots=False,
    cached_attention=_no_flash(portable.CachedAttention),
    cached_layers=None,
    head_logits=None,
    trained_layers=None,
    head_product=portable.HeadProduct,
    head_product_back=portable.HeadProductBack,
    cross_entropy=portable.CrossEntropy,
    adamw=portable.AdamW,
    adamw_8bit=portable.AdamW8bit,
)

# A card without fused operators in training (310B), or told to do without: portable arithmetic, a card's layouts.
ASCEND_PLAIN = replace(
    PORTABLE,
    name="ascend, not fused",
    lends_memory=False,  # not tried there
    stream_dtype=ascend.stream_dtype,
    reads_bfloat16=True,
    attention=_no_flash(ascend.PlainAttention),
    cached_attention=_no_flash(ascend.PlainCachedAttention),
    head_product=ascend.HeadProduct,
    head_product_back=ascend.HeadProductBack,
    cross_entropy=ascend.CrossEntropy,
)

ASCEND = replace(
    ASCEND_PLAIN,
    name="ascend",
    rms_norm=ascend.RMSNorm,
    visibility=_flash(ascend.FlashMask, portable.ScoreMask),
    attention=_flash(ascend.FlashAttention, ascend.PlainAttention),
    cached_attention=_flash(ascend.FlashCachedAttention, ascend.PlainCachedAttention),
)


def _native(library: str, rounding: str) -> Operators:
    return replace(
        PORTABLE,
        name=f"native{rounding}",
        reads_bfloat16=True,
        embedding=partial(native.EmbeddingRows, library),
        product=partial(native.Product, library, rounding),
        product_back=partial(native.ProductBack, library, rounding),
        adapted_product=partial(native.AdaptedProduct, library, rounding),
        nf4_product=partial(native.FourBitsProduct, library, rounding, "nf4"),
        nf4_product_back=partial(native.FourBitsBack, library, rounding, "nf4"),
        nf4_adapted_product=partial(native.NF4AdaptedProduct, library, rounding),
        int4_product=partial(native.FourBitsProduct, library, rounding, "int4"),
        int4_product_back=partial(native.FourBitsBack, library, rounding, "int4"),
        int4_adapted_product=partial(native.Int4AdaptedProduct, library, rounding),
        row_updates=partial(native.RowUpdates, library),
        rms_norm=partial(native.RMSNorm, library),
        gated_silu=partial(native.GatedSiLU, library),
        visibility=_unsized(native.FirstKeys),
        attention=_unsized(partial(native.Attention, library)),
        cached_visibility=_unsized(native.FirstKeys),
        padding_cost=0.2,  # rows of zeros are left out of products
        reads_used_slots=True,
        cached_attention=_unsized(partial(native.CachedAttention, library)),
        cached_layers=partial(native_layers.CachedLayers, library, rounding),
        head_logits=partial(native_layers.HeadLogits, library, rounding),
        trained_layers=partial(native_layers.TrainedLayers, library, rounding),
        head_product=partial(native.HeadProduct, library, rounding),
        head_product_back=partial(native.HeadProductBack, library, rounding),
        cross_entropy=partial(native.CrossEntropy, library, rounding),
        adamw=partial(native.AdamW, library),
        adamw_8bit=partial(native.AdamW8bit, library),
    )


@cache
def select(device: str, plain: bool = False, library: str = "", bfloat16: bool = False) -> Operators:
    """The operators for ``device``, CPU or Ascend.

    plain: on Ascend, without its fused operators. library: on the CPU, the path of our compiled C++ operators, or ""
    for MindSpore's. bfloat16: with them, round the factors of products with weights to bfloat16; sums are float32.
    """
    if device == "Ascend":
        return ASCEND_PLAIN if plain else ASCEND
    return _native(library, native.ROUNDED if bfloat16 else "") if library else PORTABLE
