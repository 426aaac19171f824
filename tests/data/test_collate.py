"""The shift and the padding, against a loop that is too simple to be wrong."""

import numpy as np
import pytest

from lora_ms.data.collate import collate, label_count
from lora_ms.data.example import TokenRow


def token_row(ids: list[int], labels: list[int]) -> TokenRow:
    return TokenRow("row 1", np.array(ids, np.int32), np.array(labels, np.int32))


def test_the_docstrings_table():
    rows = [token_row([5, 6, 7], [-100, 6, 7]), token_row([8, 9], [-100, 9])]
    batch = collate(rows, batch_size=2, seq_length=4, capacity=4, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch.target_index.tolist() == [0, 1, 4, 0]
    assert batch.targets.tolist() == [6, 7, 9, -100]
    assert (batch.tokens, batch.label_tokens) == (5, 3)
    assert {array.dtype for array in batch[:3]} == {np.dtype(np.int32)}


def test_a_row_of_one_token_more_has_it_as_target_only():
    batch = collate([token_row([1, 2, 3], [-100, 2, 3])], batch_size=1, seq_length=2, capacity=2, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2]]
    assert batch.target_index.tolist() == [0, 1]
    assert batch.targets.tolist() == [2, 3]
    assert (batch.tokens, batch.label_tokens) == (2, 2)


def test_padding_goes_by_length_not_by_id():
    # pad = eos = 9: the 9 that ends the row is real and learnt.
    batch = collate([token_row([1, 9, 9], [-100, 9, 9])], batch_size=1, seq_length=5, capacity=3, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 9, 9, 9, 9]]
    assert batch.target_index.tolist() == [0, 1, 0]
    assert batch.targets.tolist() == [9, 9, -100]
    assert (batch.tokens, batch.label_tokens) == (3, 2)


def test_missing_rows_are_padding():
    batch = collate([], batch_size=2, seq_length=3, capacity=2, pad_id=7)
    assert batch.input_ids.tolist() == [[7, 7, 7], [7, 7, 7]]
    assert (batch.target_index.tolist(), batch.targets.tolist()) == ([0, 0], [-100, -100])
    assert (batch.tokens, batch.label_tokens) == (0, 0)


def test_a_label_on_the_first_token_is_no_target():
    row = token_row([4, 5], [4, -100])
    assert label_count(row) == 0
    assert collate([row], batch_size=1, seq_length=2, capacity=1, pad_id=0).label_tokens == 0


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_naive_loop(seed):
    rng = np.random.default_rng(seed)
    batch_size, seq_length = int(rng.integers(1, 5)), int(rng.integers(2, 12))
    rows = []
    for _ in range(rng.integers(1, batch_size + 1)):
        ids = rng.integers(0, 9, rng.integers(1, seq_length + 1))
        rows.append(token_row(ids, np.where(rng.random(len(ids)) < 0.5, ids, -100)))
    batch = collate(rows, batch_size, seq_length, capacity=batch_size * seq_length, pad_id=3)

    expected_ids = [[3] * seq_length for _ in range(batch_size)]
    pairs = []
    for r, row in enumerate(rows):
        for t in range(len(row.input_ids)):
            expected_ids[r][t] = row.input_ids[t]
            if t + 1 < len(row.input_ids) and row.labels[t + 1] != -100:
                pairs.append((r * seq_length + t, row.input_ids[t + 1]))
    unused = [(0, -100)] * (batch_size * seq_length - len(pairs))
    assert batch.input_ids.tolist() == expected_ids
    assert list(zip(batch.target_index.tolist(), batch.targets.tolist(), strict=True)) == pairs + unused
    assert batch.label_tokens == len(pairs) == sum(map(label_count, rows))
    assert batch.tokens == sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize(
    "rows, capacity, text",
    [
        ([token_row([1], [-100])] * 2, 2, "2 rows in a batch of 1"),
        ([token_row([1, 2, 3, 4], [-100, 2, 3, 4])], 3, "row 1: 4 tokens in rows of 2"),
        ([token_row([1, 2, 3], [-100, 2, 3])], 1, "2 targets in a capacity of 1"),
    ],
)
def test_a_plans_mistakes_are_refused(rows, capacity, text):
    with pytest.raises(ValueError) as error:
        collate(rows, batch_size=1, seq_length=2, capacity=capacity, pad_id=0)
    assert str(error.value) == text
