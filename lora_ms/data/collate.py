"""From token rows to one fixed-shape micro-batch. The next-token shift happens here and nowhere else."""

from collections.abc import Sequence

import numpy as np

from lora_ms.data.example import IGNORE_INDEX, Batch, TokenRow


def collate(lines: Sequence[Sequence[TokenRow]], batch_size: int, seq_length: int, capacity: int, pad_id: int) -> Batch:
    """Up to `batch_size` lines of `seq_length` tokens, each of one row or several; missing lines are all padding.

    With seq_length 4 and pad_id 0, the lines [ids 5 6 7, labels -100 6 7] and [ids 8 9, labels -100 9; the same] give

        input_ids     5 6 0 0 / 8 8 0 0
        position_ids  0 1 -1 -1 / 0 0 -1 -1  padding has no place in a row: nothing is computed of it
        target_index  0 1 4 5 7              the last slot of capacity 5 is unused, and points to padding
        targets       6 7 9 9 -100

    A row's last learnt token is a target alone, so the inputs end before it (``TokenRow.input_length``).
    target_index counts in the batch flattened to [batch_size * seq_length]; `capacity` is its fixed length.
    Padding goes by length, never by id.
    Raises ValueError for too many or too long lines, or more targets than `capacity`: mistakes of the plan.
    """
    if len(lines) > batch_size:
        raise ValueError(f"{len(lines)} lines in a batch of {batch_size}")
    input_ids = np.full((batch_size, seq_length), pad_id, np.int32)
    position_ids = np.full((batch_size, seq_length), -1, np.int32)
    index = []
    targets = []
    tokens = 0
    input_tokens = 0
    for number in range(batch_size):
        start = 0
        for row in lines[number] if number < len(lines) else ():
            length = row.input_length
            end = start + length
            if end > seq_length:
                raise ValueError(f"{row.where}: ends at token {end} of a line of {seq_length}")
            input_ids[number, start:end] = row.input_ids[:length]
            position_ids[number, start:end] = np.arange(length)
            learnt = row.learnt
            # the shift: the token at position t is the target of the one before it
            index.append(number * seq_length + start + learnt - 1)
            targets.append(row.labels[learnt])
            tokens += len(row.input_ids)
            input_tokens += length
            start = end
    label_tokens = sum(map(len, targets))
    if label_tokens > capacity:
        raise ValueError(f"{label_tokens} targets in a capacity of {capacity}")
    unused = position_ids.size - 1 if position_ids[-1, -1] < 0 else 0
    target_index = np.full(capacity, unused, np.int32)
    padded_targets = np.full(capacity, IGNORE_INDEX, np.int32)
    if targets:
        target_index[:label_tokens] = np.concatenate(index)
        padded_targets[:label_tokens] = np.concatenate(targets)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        target_index=target_index,
        targets=padded_targets,
        tokens=tokens,
        input_tokens=input_tokens,
        label_tokens=label_tokens,
    )
