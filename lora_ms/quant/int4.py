"""Weights of four bits with a scale and a zero for each group of inputs, in NumPy: GPTQ (Frantar et al., 2023) and AWQ
(Lin et al., 2024).

``W[o, i] = scale[o, g] * (q[o, i] - zero[o, g])`` for the group g of input i. Folders pack the numbers in two ways,
which are brought into one: bytes of two inputs, the first in the upper half, by outputs. Where the groups are not of
consecutive inputs (``desc_act``), the inputs are brought into the order of their groups.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each four bits of a word hold, from the lowest
# the two numbers of a byte, [256, 2]
PAIRS = np.stack((np.repeat(np.arange(16), 16), np.tile(np.arange(16), 16)), 1).astype(np.float32)


class Int4(NamedTuple):
    """A weight [out, in] in groups."""

    packed: NDArray[np.uint8]  # [out, in / 2]
    scales: NDArray[np.float16]  # [out, groups]
    zeros: NDArray[np.uint8]  # [out, groups]
    order: NDArray[np.int32] | None = None  # [in], the input that each packed column belongs to; None: its own

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), 2 * self.packed.shape[1]


def nibbles(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Words [n, m] of eight numbers -> [n, m, 8], from the lowest four bits on."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return ((words.view(np.uint32)[:, :, None] >> shifts) & 15).astype(np.uint8)


def packed(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[out, in] of 0 to 15 -> [out, in / 2]."""
    return np.bitwise_or(numbers[:, 0::2] << 4, numbers[:, 1::2], dtype=np.uint8)


def from_gptq(
    qweight: NDArray[np.int32],
    qzeros: NDArray[np.int32],
    scales: NDArray[np.float16],
    groups: NDArray[np.int32] | None,
    zero_offset: int,
) -> Int4:
    """A weight of GPTQ.

    Args:
        qweight: [in / 8, out], words of eight consecutive inputs.
        qzeros: [groups, out / 8], words of eight consecutive outputs.
        scales: [groups, out].
        groups: [in], the group of each input; None: consecutive inputs.
        zero_offset: what is added to the stored zeros: 1, or 0 in the second version.

    Raises:
        ValueError: groups of different sizes.
    """
    outputs = qweight.shape[1]
    numbers = np.ascontiguousarray(nibbles(qweight).transpose(1, 0, 2).reshape(outputs, -1))
    # four bits again after the addition: a stored 15 means 0 in the first version
    zeros = (nibbles(qzeros).reshape(len(qzeros), -1).T + np.uint8(zero_offset)) & np.uint8(15)
    order = None
    if groups is not None:
        size = numbers.shape[1] // len(scales)
        if not np.array_equal(np.sort(groups), np.repeat(np.arange(len(scales)), size)):
            raise ValueError(f"g_idx does not name {len(scales)} groups of {size} inputs each")
        sorted_inputs = np.argsort(groups, kind="stable").astype(np.int32)
        if not np.array_equal(sorted_inputs, np.arange(len(groups))):
            order = sorted_inputs
            numbers = numbers[:, order]
    return Int4(packed(numbers), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros), order)


def from_awq(qweight: NDArray[np.int32], qzeros: NDArray[np.int32], scales: NDArray[np.float16]) -> Int4:
    """A weight of AWQ in its layout ``gemm``: qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    numbers = _awq_outputs(qweight).T
    return Int4(packed(numbers), np.ascontiguousarray(scales.T), np.ascontiguousarray(_awq_outputs(qzeros).T))


def _awq_outputs(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    # [n, out / 8] -> [n, out]
    found = nibbles(words)
    ordered = np.empty_like(found)
    ordered[:, :, AWQ_ORDER] = found
    return ordered.reshape(len(words), -1)


def dequantise(weight: Int4) -> NDArray[np.float32]:
    """The numbers [out, in] in float32."""
    outputs, inputs = weight.shape
    numbers = PAIRS[weight.packed].reshape(outputs, weight.scales.shape[1], -1)
    numbers -= weight.zeros.astype(np.float32)[:, :, None]
    numbers *= weight.scales.astype(np.float32)[:, :, None]
    numbers = numbers.reshape(outputs, inputs)
    if weight.order is None:
        return numbers
    found = np.empty_like(numbers)
    found[:, weight.order] = numbers
    return found


def part(weight: Int4, rows: slice, columns: slice) -> Int4:
    """Some rows and columns of a weight.

    Raises:
        ValueError: a cut amid a group, or inputs that are not in their own order.
    """
    inputs = weight.shape[1]
    first, last, _ = columns.indices(inputs)
    size = inputs // weight.scales.shape[1]
    if (first, last) != (0, inputs) and (first % size or last % size or weight.order is not None):
        raise ValueError(f"columns {first} to {last} of {inputs} do not begin and end with a group of {size}")
    groups = slice(first // size, last // size)
    return Int4(
        np.ascontiguousarray(weight.packed[rows, first // 2 : last // 2]),
        np.ascontiguousarray(weight.scales[rows, groups]),
        np.ascontiguousarray(weight.zeros[rows, groups]),
        weight.order,
    )
