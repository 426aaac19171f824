"""Whole modules that train beside an adapter (``modules_to_save``), and biases that do (``bias: all``).

PEFT stores the trained ``weight`` and ``bias`` under the module's own path; they replace the model's.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lora_ms import storage
from lora_ms.adapters.methods.base import Array, Shape, Update
from lora_ms.storage import Entry

TENSORS = ("weight", "bias")


def shapes(found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
    """Names and shapes of the tensors that a module must have in the file, given those that it has."""
    wanted = {"weight": weight} if "weight" in found else {}
    return wanted | ({"bias": weight[:1]} if has_bias else {})


class WholeUpdate(Update):
    """The weight, the bias or both of a module, replaced."""

    def __init__(self, tensors: Mapping[str, Entry]):
        super().__init__(tensors)
        self.changes_weight = "weight" in tensors

    def blocks(self, shape: Shape, read: Callable[[slice], Array]) -> Iterator[Array]:
        yield from storage.read_blocks(self.tensors["weight"])

    def keeps_tie(self, other: Update) -> bool:
        if "weight" not in self.tensors or "weight" not in other.tensors:
            return False
        return np.array_equal(self.tensor("weight"), other.tensor("weight"))
