"""What a training loop asks of the adapter that stands in a model, whatever the method."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mindspore import Parameter, nn

from lora_ms.adapters.methods.base_cells import AdapterCell
from lora_ms.nn.dropout import DropoutKernel


class InputDropout(NamedTuple):
    """Dropout on the input of a parameter."""

    path: str  # of the parameter
    parameter: Parameter  # [.., in]
    dropout: DropoutKernel


def adapter_cells(model: nn.Cell) -> dict[str, AdapterCell]:
    """Every adapter cell by dotted path."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, AdapterCell)}


def dropouts(model: nn.Cell) -> Iterator[InputDropout]:
    """The dropout cells of all adapters, in the order of the model; those that drop nothing are left out."""
    for name, cell in adapter_cells(model).items():
        parameters = dict(cell.parameters_and_names(expand=False))
        for leaf, dropout in cell.dropouts().items():
            yield InputDropout(f"{name}.{leaf}", parameters[leaf], dropout)


def rate_factors(model: nn.Cell, params: Sequence[Parameter], ratio: float, embedding: float) -> list[float]:
    """What LoRA+ (Hayou et al., 2024) multiplies the learning rate of each of ``params`` by; groups as in PEFT.

    Args:
        ratio: for B and all that has one dimension.
        embedding: for A and B on an embedding.
    """
    found = {id(p): ratio if p.ndim == 1 else 1.0 for p in params}
    for cell in adapter_cells(model).values():
        found |= {id(p): cell.rate_factor(p, ratio, embedding) for p in cell.tensors().values()}
    return [found[id(p)] for p in params]
