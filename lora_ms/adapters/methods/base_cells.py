"""What all adapter cells have in common. An adapter cell replaces the layer that it adapts, and holds it."""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Pair
from lora_ms.nn.linear import LinearLayer

Array = NDArray[np.float32]


class State(NamedTuple):
    """What an adapter cell holds that another adapter of the same shape could put there."""

    tensors: dict[str, Array]
    settings: dict[str, Array]
    spec: Any  # the method's AdapterSpec


class AdapterCell(nn.Cell, LinearLayer):
    """An adapter on a layer ``base``, which it holds and freezes; or a trained copy of the layer.

    A subclass has a classmethod that makes it from a layer, ``tensors`` and ``merge``; it sets ``base``.
    """

    TITLE = ""  # the method's name in lines for the user; "" of a trained copy
    base: nn.Cell

    def __init__(self):
        super().__init__(auto_prefix=False)  # the layer's parameters keep their names
        self.virtual_tokens = self.unrotated = 0  # of one on the embedding: see ``nn.layers.Embedding``

    def cells_and_names(self, cells: Any = None, name_prefix: str = "") -> Iterator[tuple[str, nn.Cell]]:
        """As ``nn.Cell``'s, but ``base`` comes first, under the name of this cell.

        So the layer's parameters have the names and the order that they have without an adapter, in checkpoints and
        everywhere else, and a dict of the cells by name holds this one.
        """
        seen = cells if cells else set()
        if self in seen:
            return
        seen.add(self)
        yield from self.base.cells_and_names(seen, name_prefix)
        yield name_prefix, self
        for name, cell in self.name_cells().items():
            if cell is not self.base:
                yield from cell.cells_and_names(seen, f"{name_prefix}.{name}" if name_prefix else name)

    def tensors(self) -> dict[str, Parameter]:
        """What is trained, by the tensor's name in PEFT's file; of LoRA-FA also the A that is not."""
        raise NotImplementedError

    def begin_with(self, values: Mapping[str, Array]) -> None:
        """Sets some of ``tensors``, as training begins."""
        found = self.tensors()
        for name, value in values.items():
            found[name].set_data(Tensor(value))

    def merge(self) -> nn.Cell:
        """The plain layer that computes the same."""
        raise NotImplementedError

    @property
    def spec(self) -> Any:
        """The method's ``AdapterSpec`` of this module; None of a trained copy."""
        return None

    # files

    def export(self) -> dict[str, Array]:
        """The numbers that the file gets, by tensor, for the layer as it was before the adapter came."""
        return {name: parameter.asnumpy() for name, parameter in self.tensors().items()}

    def accept(self, values: dict[str, Array]) -> dict[str, Array]:
        """The reverse: of a file's numbers those of ``tensors``; the cell may adjust its layer by the rest."""
        return values

    def pair(self) -> Pair | None:
        """A copy of A, B and scaling, where ``scaling B A`` is all that is added to the layer's untouched weight."""
        return None

    @property
    def joins_batches(self) -> bool:
        """Whether ``pair`` is all that is added to the output, so that rows of a batch may use other adapters."""
        return False

    # several adapters in one set of cells

    def settings(self) -> dict[str, Parameter]:
        """Frozen parameters that hold numbers of the adapter's own, such as its scaling. Adapters that differ in these
        and in ``tensors`` alone share cells and compiled graphs."""
        return {}

    def shape_key(self) -> Hashable:
        """Equal for cells that could hold each other's ``State``."""
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in self.tensors().items())
        return (type(self).__name__, shapes)

    def state(self) -> State:
        return State(_copies(self.tensors()), _copies(self.settings()), self.spec)

    def load_state(self, state: State) -> None:
        """Takes the ``state`` of a cell of equal ``shape_key``."""
        for parameters, values in ((self.tensors(), state.tensors), (self.settings(), state.settings)):
            for name, parameter in parameters.items():
                parameter.set_data(Tensor(values[name]))

    # training

    def rate_factor(self, parameter: Parameter, ratio: float, embedding: float) -> float:
        """What LoRA+ (Hayou et al., 2024) multiplies the learning rate of ``parameter`` by; groups as in PEFT.

        Args:
            ratio: for B and all that has one dimension.
            embedding: for A and B on an embedding.
        """
        return ratio if parameter.ndim == 1 else 1.0


def _copies(parameters: Mapping[str, Parameter]) -> dict[str, Array]:
    return {name: parameter.asnumpy().copy() for name, parameter in parameters.items()}


def freeze(cell: nn.Cell) -> None:
    """Stops the training of all parameters of ``cell``."""
    for parameter in cell.get_parameters():
        parameter.requires_grad = False


def trained_copy(parameter: Parameter, name: str) -> Parameter:
    """A trainable copy in float32."""
    return Parameter(Tensor(parameter.asnumpy().astype(np.float32)), name=name)


def dense_of(projection: Any) -> nn.Dense:
    """A ``nn.Dense`` with the projection's numbers: for layers that were one before an adapter came."""
    return nn.Dense(
        projection.in_channels,
        projection.out_channels,
        weight_init=Tensor(projection.weight.asnumpy(), projection.weight.dtype),
        bias_init=Tensor(projection.bias.asnumpy(), projection.bias.dtype) if projection.has_bias else None,
        has_bias=projection.has_bias,
        activation=projection.activation,
        dtype=projection.weight.dtype,
    )
