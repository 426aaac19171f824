"""From token rows to one fixed-shape micro-batch. The next-token shift happens here and nowhere else."""

from collections.abc import Sequence

import numpy as np

from lora_ms.data.example import IGNORE_INDEX, Batch, TokenRow


def label_count(row: TokenRow) -> int:
    """Number of next-token targets in a row. A label on the first token is none: nothing comes before it."""
    return int(np.count_nonzero(row.labels[1:] != IGNORE_INDEX))


def collate(rows: Sequence[TokenRow], batch_size: int, seq_length: int, capacity: int, pad_id: int) -> Batch:
    """Right-pad up to `batch_size` rows to `seq_length` tokens; missing rows are all padding.

    With seq_length 4 and pad_id 0, the rows ids [5, 6, 7], labels [-100, 6, 7] and ids [8, 9], labels [-100, 9] give

        input_ids     5 6 7 0 / 8 9 0 0
        target_index  0 1 4 0               the last slot of capacity 4 is unused
        targets       6 7 9 -100

    A row may have seq_length + 1 tokens: its last token is a target only. Padding goes by length, never by id.
    Raises ValueError for too many or too long rows, or more targets than `capacity`: mistakes of the plan.
    """
    if len(rows) > batch_size:
        raise ValueError(f"{len(rows)} rows in a batch of {batch_size}")
    input_ids = np.full((batch_size, seq_length), pad_id, np.int32)
    index, targets, tokens = [], [], 0
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        if length > seq_length + 1:
            raise ValueError(f"{row.where}: {length} tokens in rows of {seq_length}")
        fed = min(length, seq_length)
        input_ids[number, :fed] = row.input_ids[:fed]
        tokens += fed
        following = row.labels[1:]
        learnt = np.flatnonzero(following != IGNORE_INDEX)
        index.append(number * seq_length + learnt)
        targets.append(following[learnt])
    label_tokens = sum(map(len, targets))
    if label_tokens > capacity:
        raise ValueError(f"{label_tokens} targets in a capacity of {capacity}")
    target_index = np.zeros(capacity, np.int32)
    padded_targets = np.full(capacity, IGNORE_INDEX, np.int32)
    if rows:
        target_index[:label_tokens] = np.concatenate(index)
        padded_targets[:label_tokens] = np.concatenate(targets)
    return Batch(input_ids, target_index, padded_targets, tokens, label_tokens)
