"""The 256 numbers that eight bits stand for in an optimiser's state (Dettmers and others, 2022, "8-bit optimizers").

Seven decades below 1, each with twice as many numbers as the one below, so that small numbers keep their order and
large ones three digits. A block of ``BLOCK`` neighbours shares the largest magnitude among them as a factor.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # numbers with a common factor, as in bitsandbytes
DECADES = 7

Array = NDArray[Any]
Numbers = NDArray[np.float32]


@cache
def dynamic_map(signed: bool) -> Numbers:
    """[256], rising to 1.0; from -0.99 with a sign, from 0 without. As in bitsandbytes, there is no -1."""
    decades = []
    for decade in range(DECADES):
        edges = np.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1, dtype=np.float32)
        decades.append(10.0 ** (decade - DECADES + 1) * ((edges[1:] + edges[:-1]) / 2.0))
    positive = np.concatenate(decades)
    values = np.concatenate([-positive, positive] if signed else [positive])
    return np.sort(np.concatenate([values, [0.0, 1.0]])).astype(np.float32)


@cache
def thresholds(signed: bool) -> Numbers:
    """[255]: a number's code, that of the nearest, is how many of these are below it."""
    values = dynamic_map(signed)
    return (values[1:] + values[:-1]) / 2
