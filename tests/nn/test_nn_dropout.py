"""Dropout whose zeros depend on the seed alone, and look like independent draws."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.nn.dropout import DropoutKernel

P, SHAPE = 0.1, (512, 256)


def draws(seed: int, steps: int) -> np.ndarray:
    """[steps, t, h], True where a number was dropped."""
    ms.set_seed(seed)
    cell = DropoutKernel(P, 64).set_train(True)
    ones = Tensor(np.ones(SHAPE, np.float32))
    outs = np.stack([cell(ones).asnumpy() for _ in range(steps)])
    assert np.unique(outs).tolist() == pytest.approx([0.0, 1 / (1 - P)])
    return outs == 0


def test_the_draws(graph_mode):
    first, again, other = draws(1, 12), draws(1, 12), draws(2, 1)
    np.testing.assert_array_equal(first, again)  # beyond the steps after which MindSpore's own would differ
    assert (first[0] != first[1]).mean() == pytest.approx(2 * P * (1 - P), rel=0.05)
    assert (first[0] != other[0]).mean() == pytest.approx(2 * P * (1 - P), rel=0.05)
    assert first.mean() == pytest.approx(P, rel=0.02)
    # rates of single rows and columns spread as those of independent draws do
    for axis, count in ((1, SHAPE[0]), (2, SHAPE[1])):
        spread = first.mean(axis).std() / np.sqrt(P * (1 - P) / count)
        assert 0.9 < spread < 1.1
    # and no two rows or columns go together
    for matrix in (first[0], first[0].T):
        together = np.corrcoef(matrix.astype(float))
        away = together[~np.eye(len(together), dtype=bool)]
        assert abs(away.mean()) < 0.005
        assert away.std() * np.sqrt(matrix.shape[1]) == pytest.approx(1.0, abs=0.1)


def test_nothing_is_dropped_outside_training(graph_mode):
    ones = Tensor(np.ones(SHAPE, np.float32))
    np.testing.assert_array_equal(DropoutKernel(P, 64).set_train(False)(ones).asnumpy(), 1)
    np.testing.assert_array_equal(DropoutKernel(0.0, 64).set_train(True)(ones).asnumpy(), 1)
