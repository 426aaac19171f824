"""The exchange of two axes by rows, held against NumPy's own."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.ops.portable import SwapAxes


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 6, 2, 4)])
def test_two_axes_change_places_and_the_gradient_comes_back(graph_mode, shape):
    batch, rows, columns, d = shape
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, np.float32) for _ in range(2))
    swapped = weight.transpose((0, 2, 1, 3)).reshape(-1, d)
    swap = SwapAxes()

    def weighted(flat):
        out = swap(flat, batch, rows, columns)
        return (out * Tensor(swapped)).sum(), out

    (_, out), gradient = ms.value_and_grad(weighted, 0, has_aux=True)(Tensor(x.reshape(-1, d)))
    np.testing.assert_array_equal(out.asnumpy(), x.transpose((0, 2, 1, 3)).reshape(-1, d))
    np.testing.assert_array_equal(gradient.asnumpy(), weight.reshape(-1, d))
