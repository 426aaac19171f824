"""Folds adapters into the weights they stand on."""

import numpy as np
from mindspore import nn

from lora_ms.adapters.inject import adapter_cells, install
from lora_ms.errors import LoraMsError


def merged_cells(model: nn.Cell, safe_merge: bool = False) -> dict[str, nn.Cell]:
    """The plain layers that compute what the adapter in ``model`` computes, by path, not yet in ``model``.

    Raises:
        LoraMsError: with ``safe_merge``, a merged weight that is not finite.
    """
    cells = {}
    for name, cell in adapter_cells(model).items():
        plain = cells[name] = cell.merge()
        for parameter in plain.get_parameters() if safe_merge else ():
            if not np.isfinite(parameter.asnumpy()).all():
                kind = parameter.name.rsplit(".", 1)[-1]
                raise LoraMsError(f"the merged {kind} of {name} holds NaN or infinity; nothing was merged")
    return cells


def merge(model: nn.Cell, safe_merge: bool = False) -> nn.Cell:
    """Replaces every adapter cell of ``model`` by the plain layer of the merged weight, in place."""
    install(model, merged_cells(model, safe_merge))
    return model
