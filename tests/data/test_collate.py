"""The shift, the lines and the padding, against a loop that is too simple to be wrong."""

import numpy as np
import pytest

from lora_ms.data.collate import collate
from lora_ms.data.example import TokenRow


def token_row(ids: list[int], labels: list[int]) -> TokenRow:
    return TokenRow("row 1", np.array(ids, np.int32), np.array(labels, np.int32))


def test_the_docstrings_table():
    short = token_row([8, 9], [-100, 9])
    lines = [[token_row([5, 6, 7], [-100, 6, 7])], [short, short]]
    batch = collate(lines, batch_size=2, seq_length=4, capacity=5, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 0, 0], [8, 8, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, -1, -1], [0, 0, -1, -1]]
    assert batch.target_index.tolist() == [0, 1, 4, 5, 7]
    assert batch.targets.tolist() == [6, 7, 9, 9, -100]
    assert (batch.tokens, batch.input_tokens, batch.label_tokens) == (7, 4, 4)
    assert {array.dtype for array in batch[:4]} == {np.dtype(np.int32)}


def test_a_row_of_one_token_more_has_it_as_target_only():
    batch = collate([[token_row([1, 2, 3], [-100, 2, 3])]], batch_size=1, seq_length=2, capacity=2, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2]]
    assert batch.target_index.tolist() == [0, 1]
    assert batch.targets.tolist() == [2, 3]
    assert (batch.tokens, batch.label_tokens) == (3, 2)


def test_padding_goes_by_length_not_by_id():
    # pad = eos = 9: the 9 that ends the row is real and learnt.
    batch = collate([[token_row([1, 9, 9], [-100, 9, 9])]], batch_size=1, seq_length=5, capacity=3, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 9, 9, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, -1, -1, -1]]
    assert batch.target_index.tolist() == [0, 1, 4]
    assert batch.targets.tolist() == [9, 9, -100]
    assert (batch.tokens, batch.input_tokens, batch.label_tokens) == (3, 2, 2)


def test_missing_lines_are_padding():
    batch = collate([], batch_size=2, seq_length=3, capacity=2, pad_id=7)
    assert batch.input_ids.tolist() == [[7, 7, 7], [7, 7, 7]]
    assert (batch.target_index.tolist(), batch.targets.tolist()) == ([5, 5], [-100, -100])
    assert (batch.tokens, batch.input_tokens, batch.label_tokens) == (0, 0, 0)


def test_a_label_on_the_first_token_is_no_target():
    row = token_row([4, 5], [4, -100])
    assert (row.learnt.size, row.input_length) == (0, 0)
    assert collate([[row]], batch_size=1, seq_length=2, capacity=1, pad_id=0).label_tokens == 0


@pytest.mark.parametrize(
    ("labels", "length"), [([-100, 2, 3, 4], 3), ([-100, 2, -100, -100], 1), ([1, 2, -100, 4], 3), ([-100] * 4, 0)]
)
def test_tokens_after_the_last_target_are_no_input(labels, length):
    assert token_row([1, 2, 3, 4], labels).input_length == length


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_naive_loop(seed):
    rng = np.random.default_rng(seed)
    batch_size, seq_length = int(rng.integers(1, 5)), int(rng.integers(2, 12))
    lines = [[] for _ in range(rng.integers(1, batch_size + 1))]
    expected = np.full((batch_size, seq_length), 3)
    positions = [[-1] * seq_length for _ in range(batch_size)]
    pairs, tokens = [], 0
    for r, line in enumerate(lines):
        place = 0
        while True:
            ids = rng.integers(0, 9, rng.integers(1, seq_length + 1))
            labels = np.where(rng.random(len(ids)) < 0.5, ids, -100)
            fed = max([t for t in range(len(ids)) if t and labels[t] != -100], default=0)
            if place + fed > seq_length or len(line) > 4:
                break
            line.append(token_row(ids, labels))
            tokens += len(ids)
            for t in range(fed):
                expected[r, place + t], positions[r][place + t] = ids[t], t
                if labels[t + 1] != -100:
                    pairs.append((r * seq_length + place + t, ids[t + 1]))
            place += fed
    batch = collate(lines, batch_size, seq_length, capacity=batch_size * seq_length, pad_id=3)
    last = batch_size * seq_length - 1
    unused = [(last if positions[-1][-1] < 0 else 0, -100)] * (batch_size * seq_length - len(pairs))
    assert batch.input_ids.tolist() == expected.tolist()
    assert batch.position_ids.tolist() == positions
    assert list(zip(batch.target_index.tolist(), batch.targets.tolist(), strict=True)) == pairs + unused
    assert batch.label_tokens == len(pairs) == sum(row.learnt.size for line in lines for row in line)
    assert batch.tokens == tokens


@pytest.mark.parametrize(
    ("lines", "capacity", "text"),
    [
        ([[token_row([1], [-100])]] * 2, 2, "2 lines in a batch of 1"),
        ([[token_row([1, 2, 3, 4], [-100, 2, 3, 4])]], 3, "row 1: ends at token 3 of a line of 2"),
        ([[token_row([1, 2, 3], [-100, 2, 3])]], 1, "2 targets in a capacity of 1"),
    ],
)
def test_a_plans_mistakes_are_refused(lines, capacity, text):
    with pytest.raises(ValueError) as error:
        collate(lines, batch_size=1, seq_length=2, capacity=capacity, pad_id=0)
    assert str(error.value) == text
