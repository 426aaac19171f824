"""Learning rates of an adapter's own."""

from collections.abc import Sequence

from mindspore import Parameter, nn

from lora_ms.adapters.inject import adapter_cells


def rate_factors(model: nn.Cell, params: Sequence[Parameter], ratio: float, embedding: float) -> list[float]:
    """What LoRA+ (Hayou et al., 2024) multiplies the learning rate of each of ``params`` by.

    Args:
        ratio: for B and all that has one dimension.
        embedding: for A and B on an embedding.
    """
    found = {id(p): 1.0 if p.ndim != 1 else ratio for p in params}
    for cell in adapter_cells(model).values():
        found |= {id(p): cell.rate_factor(p, ratio, embedding) for p in cell.tensors().values()}
    return [found[id(p)] for p in params]
