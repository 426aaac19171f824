"""Gradients of a cell, compiled as a static graph; every test by our own operators for the CPU, and by MindSpore's."""

from collections.abc import Callable, Iterator

import pytest

from lora_ms import cpu
from lora_ms.nn import cpu as operators


@pytest.fixture(autouse=True, params=["own operators", "MindSpore's"])
def own(request) -> Iterator[bool]:
    """Whether cells made in the test have our own operators; fails where they cannot be compiled."""
    library, why = cpu.build()
    assert library is not None, why
    before = operators.there()
    operators.use(str(library) if request.param == "own operators" else "")
    yield operators.there()
    operators.use(str(library) if before else "")


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
