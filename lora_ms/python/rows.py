"""Rows that were prepared for transformers' ``Trainer``: padded, with a mask, perhaps without labels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_ms.errors import LoraMsError

KEPT = ("input_ids", "labels", "prompt_len", "attention_mask")  # transformers leaves other columns out as well
IGNORED = -100


def prepared(dataset: Any) -> Any:
    """``dataset`` as the readers take it: rows with ``input_ids`` without padding and with labels, others as they are.

    Prints a line where labels are made of ``input_ids``.

    Raises:
        LoraMsError: a dictionary of datasets, or rows of tensors.
    """
    if isinstance(dataset, Mapping):
        raise LoraMsError(f"the dataset has parts: give one of {', '.join(map(str, dataset))}")
    first = next(iter(dataset), None) if isinstance(dataset, Iterable) and not isinstance(dataset, str) else None
    if not isinstance(first, Mapping) or "input_ids" not in first:
        return dataset
    if not {"labels", "prompt_len"} & first.keys():
        print("rows without labels: every token is learnt")
    return list(_tokens(dataset))


def _tokens(dataset: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in dataset:
        found = {name: row[name] for name in KEPT if name in row and row[name] is not None}
        mask = found.pop("attention_mask", None)
        if not {"labels", "prompt_len"} & found.keys():
            found["labels"] = found["input_ids"]
        if mask is not None and not all(mask):
            found = {name: _masked(value, mask) for name, value in found.items()}
        yield found


def _masked(values: Any, mask: Sequence[int]) -> Any:
    # prompt_len, a number, counts from the first token, so that such rows are padded on the right
    return values if np.ndim(values) == 0 else [value for value, seen in zip(values, mask, strict=True) if seen]
