"""NF4 (Dettmers et al., 2023) as bitsandbytes computes and stores it, in NumPy.

A weight [out, in] is flattened by rows and cut into blocks of 64 numbers. Each number is divided by the largest
absolute value of its block (``absmax``) and becomes the nearest of 16 ``CODES``; two codes are a byte, the first in the
upper half. Double quantisation stores the absmax, less their mean, as bytes in blocks of 256 by another code.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # numbers that share an absmax
NESTED_BLOCK = 256  # absmax that share a nested absmax
PIECE = 1 << 16  # numbers that are quantised at a time: they fit into a processor's cache
SMALLEST = np.float32(1e-38)  # absmax that is divided by, at least: a block of zeros stays one

CODES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
MIDPOINTS = (CODES[1:] + CODES[:-1]) / np.float32(2)
# the two numbers of a byte, [256, 2]
PAIRS = np.stack((np.repeat(CODES, 16), np.tile(CODES, 16)), 1)


def dynamic_map() -> NDArray[np.float32]:
    """The code of bytes, sorted: 127 negative numbers, zero and 128 positive ones up to 1, denser near zero.

    torch's own depend in the last bit on the processor: a folder holds those that it was made with.
    """
    positive: list[NDArray[np.float32]] = []
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2**i + 1).astype(np.float32)
        positive.append((edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6)))
    values = np.concatenate(positive)
    return np.sort(np.concatenate((-values, np.array((0, 1), np.float32), values)))


NESTED_CODES = dynamic_map()


class Nested(NamedTuple):
    """How absmax are stored as bytes: ``codes[byte] * absmax of its 256 + offset``."""

    absmax: NDArray[np.float32]  # [blocks / 256, rounded up]
    codes: NDArray[np.float32]  # [256]
    offset: np.float32


class NF4(NamedTuple):
    """A quantised weight. ``nested`` is None where ``absmax`` are float32, else they are bytes."""

    shape: tuple[int, int]  # [out, in]
    packed: NDArray[np.uint8]  # [numbers / 2, rounded up]
    absmax: NDArray  # [numbers / 64, rounded up]
    nested: Nested | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        nested = 0 if self.nested is None else self.nested.absmax.nbytes + self.nested.codes.nbytes + 4
        return self.packed.nbytes + self.absmax.nbytes + nested


def blocks_of(numbers: int, block: int = BLOCK) -> int:
    """How many blocks hold so many numbers."""
    return -(-numbers // block)


def quantise(weight: NDArray[np.float32], double: bool = False) -> NF4:
    """The weight [out, in] in NF4; of NaN and infinity among its numbers an absmax is NaN or infinity.

    double: with double quantisation.

    Besides the weight and the result, some pieces of ``PIECE`` numbers are in memory.
    """
    flat = np.ascontiguousarray(weight, np.float32).reshape(-1)
    packed = np.empty(blocks_of(flat.size, 2), np.uint8)
    absmax = np.empty(blocks_of(flat.size), np.float32)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        own = absmax[start // BLOCK : blocks_of(start + piece.size)]
        codes = nearest(scaled(piece, own, BLOCK), MIDPOINTS)
        if codes.size % 2:
            codes = np.append(codes, np.uint8(7))  # zero, as padding
        pairs = codes.reshape(-1, 2)
        np.bitwise_or(pairs[:, 0] << 4, pairs[:, 1], out=packed[start // 2 : start // 2 + len(pairs)])
    out_channels, in_channels = weight.shape
    shape = (out_channels, in_channels)
    return nest(NF4(shape, packed, absmax)) if double else NF4(shape, packed, absmax)


def scaled(values: NDArray[np.float32], absmax: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """``values`` [n] in units of the largest of their block, in [-1, 1]; that is put into ``absmax``.

    A last block that is not full is divided by its absmax, the others are multiplied by the reciprocal: as in
    bitsandbytes, whose codes depend on it in the last bit.
    """
    full = values.size // block
    whole = values[: full * block].reshape(full, block)
    np.maximum(whole.max(1, initial=0), -whole.min(1, initial=0), out=absmax[:full])
    result = np.empty(values.size, np.float32)
    reciprocal = np.float32(1) / np.maximum(absmax[:full], SMALLEST)
    np.multiply(whole, reciprocal[:, None], out=result[: full * block].reshape(full, block))
    rest = values[full * block :]
    if rest.size:
        absmax[full] = max(np.abs(rest).max(), SMALLEST)
        np.divide(rest, absmax[full], out=result[full * block :])
    return np.clip(result, -1, 1, out=result)


def nearest(values: NDArray[np.float32], midpoints: NDArray[np.float32]) -> NDArray[np.uint8]:
    """How many of the sorted ``midpoints`` are below each of ``values`` [n]: the code of the nearest number."""
    if len(midpoints) > len(MIDPOINTS):
        return np.searchsorted(midpoints, values).astype(np.uint8)
    codes = np.zeros(values.size, np.uint8)
    above = np.empty(values.size, bool)
    for midpoint in midpoints:
        np.greater(values, midpoint, out=above)
        codes += above.view(np.uint8)
    return codes


def nest(weight: NF4) -> NF4:
    """``weight`` with its absmax quantised in turn."""
    offset = np.float32(weight.absmax.mean(dtype=np.float64))
    centred = weight.absmax - offset
    absmax = np.empty(blocks_of(centred.size, NESTED_BLOCK), np.float32)
    midpoints = (NESTED_CODES[1:] + NESTED_CODES[:-1]) / np.float32(2)
    codes = nearest(scaled(centred, absmax, NESTED_BLOCK), midpoints)
    return weight._replace(absmax=codes, nested=Nested(absmax, NESTED_CODES, offset))


def plain_absmax(weight: NF4) -> NDArray[np.float32]:
    """The absmax of each block, decoded where they are bytes."""
    if weight.nested is None:
        return weight.absmax
    spread = np.repeat(weight.nested.absmax, NESTED_BLOCK)[: weight.absmax.size]
    return weight.nested.codes[weight.absmax] * spread + weight.nested.offset


def dequantise(weight: NF4) -> NDArray[np.float32]:
    """The numbers [out, in] in float32: ``CODES[code] * absmax``."""
    size = weight.shape[0] * weight.shape[1]
    result = np.empty(size, np.float32)
    absmax = plain_absmax(weight)
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        piece = PAIRS[weight.packed[start // 2 : blocks_of(stop, 2)]].reshape(-1)[: stop - start]
        spread = np.repeat(absmax[start // BLOCK : blocks_of(stop)], BLOCK)[: stop - start]
        np.multiply(piece, spread, out=result[start:stop])
    return result.reshape(weight.shape)


def part(weight: NF4, rows: slice, columns: slice) -> NF4:
    """Some rows and columns of a weight, whose absmax are decoded: nested ones are shared across the cut.

    Raises:
        ValueError: a cut amid a block.
    """
    out_channels, in_channels = weight.shape
    first, last, _ = columns.indices(in_channels)
    if in_channels % BLOCK or first % BLOCK or last % BLOCK:
        raise ValueError(f"columns {first} to {last} of {in_channels} do not begin and end with a block of {BLOCK}")
    packed = weight.packed.reshape(out_channels, -1)[rows, first // 2 : last // 2]
    absmax = plain_absmax(weight).reshape(out_channels, -1)[rows, first // BLOCK : last // BLOCK]
    return NF4((len(packed), last - first), packed.reshape(-1), absmax.reshape(-1))
