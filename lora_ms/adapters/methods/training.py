"""What a training loop asks of the adapter in a model, whatever the method."""

from mindspore import nn

from lora_ms.adapters.methods.base_cells import AdapterCell


def rate_factors(model: nn.Cell, ratio: float, embedding: float) -> dict[str, float]:
    """By path, what LoRA+ (Hayou et al., 2024) multiplies a parameter's learning rate by; groups as in PEFT.

    Args:
        ratio: for B and all that has one dimension.
        embedding: for A and B on an embedding.
    """
    adapters = [cell for _, cell in model.cells_and_names() if isinstance(cell, AdapterCell)]
    found = {id(p): cell.rate_factor(p, ratio, embedding) for cell in adapters for p in cell.tensors().values()}
    return {name: found.get(id(p), ratio if p.ndim == 1 else 1.0) for name, p in model.parameters_and_names()}
