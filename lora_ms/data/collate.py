"""From token rows to one fixed-shape micro-batch. The next-token shift happens here and nowhere else."""

from collections.abc import Sequence

import numpy as np

from lora_ms.data.example import IGNORE_INDEX, Batch, TokenRow


def label_count(row: TokenRow) -> int:
    """Number of next-token targets in a row. A label on the first token is none: nothing comes before it."""
    return int(np.count_nonzero(row.labels[1:] != IGNORE_INDEX))


def fed_length(row: TokenRow) -> int:
    """Number of leading tokens that the model must see: those before the last target. What follows teaches nothing."""
    learnt = np.flatnonzero(row.labels[1:] != IGNORE_INDEX)
    return int(learnt[-1]) + 1 if learnt.size else 0


def collate(lines: Sequence[Sequence[TokenRow]], batch_size: int, seq_length: int, capacity: int, pad_id: int) -> Batch:
    """Up to `batch_size` lines of `seq_length` tokens, each of one row or several; missing lines are all padding.

    With seq_length 4 and pad_id 0, the lines [ids 5 6 7, labels -100 6 7] and [ids 8 9, labels -100 9; the same] give

        input_ids     5 6 0 0 / 8 8 0 0
        position_ids  0 1 0 1 / 0 0 0 1
        target_index  0 1 4 5 0             the last slot of capacity 5 is unused
        targets       6 7 9 9 -100

    Padding goes by length, never by id.
    Raises ValueError for too many or too long lines, or more targets than `capacity`: mistakes of the plan.
    """
    if len(lines) > batch_size:
        raise ValueError(f"{len(lines)} lines in a batch of {batch_size}")
    input_ids = np.full((batch_size, seq_length), pad_id, np.int32)
    position_ids = np.zeros((batch_size, seq_length), np.int32)
    index, targets, tokens, fed = [], [], 0, 0
    for number in range(batch_size):
        start = 0
        for row in lines[number] if number < len(lines) else ():
            end = start + fed_length(row)
            if end > seq_length:
                raise ValueError(f"{row.where}: ends at token {end} of a line of {seq_length}")
            input_ids[number, start:end] = row.input_ids[: end - start]
            position_ids[number, start:end] = np.arange(end - start)
            following = row.labels[1:]
            learnt = np.flatnonzero(following != IGNORE_INDEX)
            index.append(number * seq_length + start + learnt)
            targets.append(following[learnt])
            tokens, fed, start = tokens + len(row.input_ids), fed + end - start, end
        position_ids[number, start:] = np.arange(seq_length - start)
    label_tokens = sum(map(len, targets))
    if label_tokens > capacity:
        raise ValueError(f"{label_tokens} targets in a capacity of {capacity}")
    target_index = np.zeros(capacity, np.int32)
    padded_targets = np.full(capacity, IGNORE_INDEX, np.int32)
    if targets:
        target_index[:label_tokens] = np.concatenate(index)
        padded_targets[:label_tokens] = np.concatenate(targets)
    return Batch(input_ids, position_ids, target_index, padded_targets, tokens, fed, label_tokens)
