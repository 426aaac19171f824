"""Folds adapters into the weights they stand on."""

import numpy as np
from mindspore import nn

from lora_ms.adapters.inject import adapter_cells, install
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding, Head


def merged_cells(model: nn.Cell, safe_merge: bool = False) -> dict[str, nn.Cell]:
    """The plain layers that compute what the adapter in ``model`` computes, by path, not yet in ``model``.

    Raises:
        LoraMsError: with ``safe_merge``, a merged weight that is not finite.
    """
    adapters, cells = adapter_cells(model), dict[str, nn.Cell]()
    for name, cell in adapters.items():
        plain = cells[name] = cell.merge()
        for parameter in plain.get_parameters() if safe_merge else ():
            if not np.isfinite(parameter.asnumpy()).all():
                kind = parameter.name.rsplit(".", 1)[-1]
                raise LoraMsError(f"the merged {kind} of {name} holds NaN or infinity; nothing was merged")
    ends = [(cell.base, cells[name]) for name, cell in adapters.items() if isinstance(cell.base, Embedding | Head)]
    for base, plain in ends:
        for other, shared in ends:
            tied = isinstance(base, Head) and isinstance(other, Embedding) and base.weight is other.weight
            if tied and np.array_equal(plain.weight.asnumpy(), shared.weight.asnumpy()):
                plain.weight = shared.weight  # a head tied before stays so
    return cells


def merge(model: nn.Cell, safe_merge: bool = False) -> nn.Cell:
    """Replaces every adapter cell of ``model`` by the plain layer of the merged weight, in place."""
    install(model, merged_cells(model, safe_merge))
    return model
