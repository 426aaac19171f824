"""Micro-batches, made in MindSpore's own data thread while the device computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_ms.data.loader import DataPlan

COLUMNS = ["input_ids", "position_ids", "target_index", "targets", "counts"]


class Step(NamedTuple):
    """One optimiser step of this rank."""

    batches: list[tuple[Any, ...]]  # input_ids, position_ids, target_index, targets of each, as Tensors
    tokens: int
    label_tokens: int  # on all ranks


def feed(plan: DataPlan, start: int, level: int = 0) -> Iterator[Step]:
    """The steps of a plan from `start` on, their micro-batches at `level`."""
    import mindspore.dataset as ds

    def micro_batches():
        for step in range(start, plan.total_steps):
            batches, label_tokens = plan.step(step, level)
            for left, batch in zip(range(len(batches) - 1, -1, -1), batches, strict=True):
                yield *batch[:4], np.array([left, batch.tokens, label_tokens], np.int64)
            if not batches:  # nothing for this rank, which still takes part in the step
                yield *(np.zeros(1, np.int32) for _ in range(4)), np.array([-1, 0, label_tokens], np.int64)

    dataset = ds.GeneratorDataset(micro_batches, COLUMNS, shuffle=False, num_parallel_workers=1)
    batches: list[tuple[Any, ...]] = []
    tokens = 0
    for *arrays, counts in dataset.create_tuple_iterator(num_epochs=1, do_copy=False):
        left, more, label_tokens = counts.asnumpy().tolist()
        tokens += more
        if left >= 0:
            batches.append(tuple(arrays))
        if left <= 0:
            yield Step(batches, tokens, label_tokens)
            batches, tokens = [], 0
