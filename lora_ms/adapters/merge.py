"""Folds adapters into the weights they stand on."""

from mindspore import nn

from lora_ms.adapters.inject import lora_layers, name_parameters, replace_cell


def merge(model: nn.Cell) -> nn.Cell:
    """Replaces every ``LoRADense`` of ``model`` by the plain dense layer of the merged weight, in place."""
    for name, layer in lora_layers(model).items():
        replace_cell(model, name, layer.merge())
    name_parameters(model)
    return model
