"""Gradients of a cell, compiled as a static graph."""

from collections.abc import Callable

import pytest


@pytest.fixture
def gradients() -> Callable:
    """``gradients(cell, places, *inputs)``: the cell's output, a number, and its gradients in the inputs ``places``."""
    from mindspore import Tensor, nn, ops

    class Gradient(nn.Cell):
        def __init__(self, cell: nn.Cell, places: tuple[int, ...]):
            super().__init__()
            self.grad = ops.value_and_grad(cell, places)

        def construct(self, *inputs):
            return self.grad(*inputs)

    def run(cell, places, *inputs):
        value, grads = Gradient(cell, places)(*(Tensor(x) for x in inputs))
        grads = grads if isinstance(grads, tuple) else (grads,)  # MindSpore returns a single one bare
        return value.asnumpy(), [g.asnumpy() for g in grads]

    return run


@pytest.fixture
def squares() -> Callable:
    """``squares(cell)``: a cell that gives the sum of the squares of what ``cell`` gives."""
    from mindspore import nn

    class Squares(nn.Cell):
        def __init__(self, cell: nn.Cell):
            super().__init__()
            self.cell = cell

        def construct(self, x):
            y = self.cell(x)
            return (y * y).sum()

    return Squares
