"""The plan of a run: the same rows in the same step whatever the layout, in shapes that always suffice."""

from dataclasses import replace

import numpy as np
import pytest

from lora_ms.data.example import Example, Message, TokenRow
from lora_ms.data.loader import DataPlan
from lora_ms.data.packing import round_up
from lora_ms.data.pipeline import Preparation
from lora_ms.data.pipeline import prepare_rows as prepare
from lora_ms.data.report import Report
from lora_ms.errors import LoraMsError


def token_row(number: int, length: int, prompt: int = 1) -> TokenRow:
    """A row whose every id is its number, so that batches tell which rows they hold."""
    labels = np.full(length, number, np.int32)
    labels[:prompt] = -100
    return TokenRow(f"row {number}", np.full(length, number, np.int32), labels)


def some_rows(count: int, seed: int = 0, longest: int = 30) -> list[TokenRow]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return [token_row(number, length, rng.integers(1, length)) for number, length in enumerate(lengths, start=1)]


def prepare_rows(rows, *, tokenizer, **options):
    return prepare(rows, tokenizer, Preparation(**options))


def build(rows, **options) -> DataPlan:
    settings = dict(batch_size=2, accumulation=1, epochs=1, seed=0, pad_id=0, seq_length=64)
    return DataPlan.build(rows, **{**settings, **options})


def rows_in(plan: DataPlan, step: int) -> list[int]:
    """Numbers of the rows in this rank's batches, read off the batches themselves."""
    batches, _ = plan.step(step)
    return [int(row[0]) for batch in batches for row in batch.input_ids if row[0] != plan.pad_id]


def test_steps_of_a_small_plan_as_a_table():
    rows = [token_row(1, 3), token_row(2, 2), token_row(3, 2)]
    plan = build(rows, shuffle=False, epochs=2)
    assert (plan.steps_per_epoch, plan.total_steps, plan.layout.shapes) == (2, 4, ((2, 16, 16),))
    (batch,), label_tokens = plan.step(0)
    assert batch.input_ids.tolist() == [[1, 1] + [0] * 14, [2] + [0] * 15]
    assert batch.target_index.tolist() == [0, 1, 16] + [31] * 13  # padding
    assert batch.targets.tolist() == [1, 1, 2] + [-100] * 13
    assert (batch.tokens, batch.label_tokens, label_tokens) == (5, 3, 3)
    (batch,), label_tokens = plan.step(3)
    assert batch.input_ids.tolist() == [[3] + [0] * 15, [0] * 16]
    assert (batch.tokens, batch.label_tokens, label_tokens) == (2, 1, 1)
    assert [plan.epoch_of(step) for step in range(5)] == [0.0, 2 / 3, 1.0, 1 + 2 / 3, 2.0]


@pytest.mark.parametrize("count", [1, 7, 16, 21])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_per_epoch(count, shuffle):
    plan = build(some_rows(count), batch_size=2, accumulation=2, epochs=3, seed=5, shuffle=shuffle)
    per_epoch = plan.steps_per_epoch
    epochs = [sum([rows_in(plan, epoch * per_epoch + step) for step in range(per_epoch)], []) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(1, count + 1))
    assert (epochs[0] == list(range(1, count + 1))) == (not shuffle or count == 1)
    assert (epochs[0] == epochs[1]) == (not shuffle or count == 1)


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_layouts_of_one_size_take_the_same_rows_in_the_same_step(drop_remainder):
    rows = some_rows(27)
    common = dict(epochs=2, seed=3, drop_remainder=drop_remainder)
    reference = build(rows, batch_size=8, **common)
    layouts = [
        [build(rows, batch_size=8 // accumulation, accumulation=accumulation, **common)] for accumulation in (1, 2, 4)
    ]
    layouts.append([build(rows, batch_size=4, rank=rank, world=2, **common) for rank in range(2)])
    layouts.append([build(rows, batch_size=1, accumulation=2, rank=rank, world=4, **common) for rank in range(4)])
    assert reference.total_steps == (6 if drop_remainder else 8)
    for ranks in layouts:
        assert {plan.total_steps for plan in ranks} == {reference.total_steps}
        assert len({plan.layout.shapes for plan in ranks}) == 1
        for step in range(reference.total_steps):
            taken = sorted(number for plan in ranks for number in rows_in(plan, step))
            assert taken == sorted(rows_in(reference, step))
            batches = [batch for plan in ranks for batch in plan.step(step)[0]]
            total = sum(rows[number - 1].learnt.size for number in taken)
            assert sum(batch.label_tokens for batch in batches) == total
            assert {plan.step(step)[1] for plan in ranks} == {total}


@pytest.mark.parametrize("seed", range(10))
def test_capacity_is_the_smallest_that_suffices_for_the_whole_run(seed):
    rng = np.random.default_rng(seed)
    rows = some_rows(int(rng.integers(1, 40)), seed)
    options = dict(batch_size=int(rng.integers(1, 6)), accumulation=int(rng.integers(1, 4)), epochs=4, seed=seed)
    ranks = [build(rows, rank=rank, world=2, shuffle=bool(seed % 3), **options) for rank in range(2)]
    # collate refuses more than the capacity, so that building every batch is itself the check of the upper side.
    largest = max(
        batch.label_tokens for plan in ranks for step in range(plan.total_steps) for batch in plan.step(step)[0]
    )
    capacity = -(-largest // 64) * 64 if largest > 64 else -(-largest // 16) * 16
    ((lines, length, found),) = ranks[0].layout.shapes
    assert lines == options["batch_size"] and found == min(capacity, lines * length)
    assert ranks[1].layout == ranks[0].layout


def test_the_same_seed_gives_the_same_plan_at_any_step():
    rows = some_rows(20)
    first, again, other = (build(rows, epochs=3, seed=seed) for seed in (7, 7, 8))
    straight = [first.step(step) for step in range(first.total_steps)]
    for step in reversed(range(first.total_steps)):
        batches, label_tokens = again.step(step)
        assert label_tokens == straight[step][1]
        for ours, theirs in zip(batches, straight[step][0], strict=True):
            np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
            np.testing.assert_array_equal(ours.target_index, theirs.target_index)
            np.testing.assert_array_equal(ours.targets, theirs.targets)
    assert [rows_in(first, step) for step in range(10)] != [rows_in(other, step) for step in range(10)]


def test_max_steps_decides_whatever_the_epochs():
    rows = some_rows(5)
    assert [build(rows, epochs=2, max_steps=steps).total_steps for steps in (-1, 2, 100)] == [6, 2, 100]
    plan = build(rows, max_steps=100)
    assert sorted(rows_in(plan, 96) + rows_in(plan, 97) + rows_in(plan, 98)) == [1, 2, 3, 4, 5]
    for step in (-1, 100):
        with pytest.raises(IndexError, match=f"^step {step} of 100$"):
            plan.step(step)


@pytest.mark.parametrize(
    "longest, seq_length, padded",
    [(17, 64, 16), (18, 64, 32), (61, 62, 62), (513, 4096, 512), (514, 4096, 576), (17, 16, 16)],
)
def test_padded_length(longest, seq_length, padded):
    assert build([token_row(1, 2), token_row(2, longest)], seq_length=seq_length).layout.shapes[-1].length == padded


def test_round_up():
    assert [round_up(value, 16, 64, above=64) for value in (1, 16, 17, 64, 65, 129)] == [16, 16, 32, 64, 128, 192]


def test_drop_remainder_that_leaves_nothing():
    with pytest.raises(LoraMsError) as error:
        build(some_rows(5), batch_size=2, accumulation=2, world=2, drop_remainder=True)
    assert str(error.value) == (
        "drop_remainder leaves nothing to train on: 5 rows, but a step takes 8 "
        "(batch_size 2 x accumulation 2 x ranks 2); set drop_remainder: False or lower batch_size"
    )


def text_row(where: str, answer: str) -> Example:
    return Example(where, (Message("user", "a"), Message("assistant", answer)))


def test_prepare_rows_encodes_drops_and_counts(chatml):
    # 19 tokens of prompt, then the answer's, <|im_end|> and a newline.
    rows = [text_row("d.jsonl:1", "bc"), text_row("d.jsonl:2", "b" * 50), token_row(3, 6, prompt=4)]
    kept, report = prepare_rows(rows, tokenizer=chatml, seq_length=32, vocab_size=264)
    assert [row.where for row in kept] == ["d.jsonl:1", "row 3"]
    assert [len(row.input_ids) for row in kept] == [23, 6]
    assert kept[0].labels.tolist() == [-100] * 19 + [65, 66, 263, -100]
    assert report == Report(
        rows=3, kept=2, dropped_too_long=1, seq_length=32, tokens=29, label_tokens=3 + 2, longest=23,
        answer_tokens_lost=51, percentiles={"shortest": 6, "50%": 23, "90%": 71, "99%": 71, "longest": 71},
        scripts={"Latin": 1.0}, turns=2, cut_would_keep=1, cut_would_keep_tokens=13,
    )  # fmt: skip
    assert report.lines() == [
        "data: 3 rows, 1 dropped (longer than seq_length 32), 29 tokens, 17% of them learnt, longest 23",
        "  answer tokens lost beyond seq_length: 51",
        "  truncation: cut would keep a part of 1 of the rows dropped, with 13 answer tokens",
    ]


def test_the_limit_is_seq_length_for_text_and_one_more_for_tokens(chatml):
    text = text_row("d.jsonl:1", "bc")
    assert [row.where for row in prepare_rows([text], tokenizer=chatml, seq_length=23)[0]] == ["d.jsonl:1"]
    tokens = [token_row(1, 22), token_row(2, 23), token_row(3, 24)]
    kept, report = prepare_rows([text, *tokens], tokenizer=chatml, seq_length=22)
    assert [row.where for row in kept] == ["row 1", "row 2"]
    assert report.dropped_too_long == 2
    (batch,), label_tokens = build(kept, seq_length=22, shuffle=False).step(0)
    assert batch.input_ids.tolist() == [[1] * 21 + [0], [2] * 22]
    assert (batch.label_tokens, label_tokens) == (21 + 22, 43)


def test_report_in_words():
    report = Report(
        rows=1200, kept=1200, dropped_too_long=0, seq_length=128, tokens=30124, label_tokens=12351, longest=57
    )
    assert report.lines() == ["data: 1,200 rows, 30,124 tokens, 41% of them learnt, longest 57"]
    assert replace(report, rows=1, layout="padded into lines of 64 tokens, 2 per micro-batch").lines() == [
        "data: 1 row, 30,124 tokens, 41% of them learnt, longest 57",
        "  padded into lines of 64 tokens, 2 per micro-batch",
    ]


def fault(rows, **options) -> str:
    with pytest.raises(LoraMsError) as error:
        prepare_rows(rows, **{"tokenizer": None, "seq_length": 16, **options})
    return str(error.value)


def test_rows_that_are_all_too_long():
    rows = [token_row(number, length) for number, length in enumerate((44, 40, 90), start=1)]
    assert fault(rows) == ("all 3 rows are longer than seq_length 16 (shortest: 40 tokens, row 2); raise seq_length")
    assert fault(rows[:1]) == (
        "the only row is longer than seq_length 16 (shortest: 44 tokens, row 1); raise seq_length"
    )


def test_rows_without_a_label():
    masked = [token_row(number, 4, prompt=4) for number in range(1, 8)]
    first_only = TokenRow("row 8", np.array([1, 2], np.int32), np.array([1, -100], np.int32))
    assert fault([first_only, *masked]) == (
        "no row has a label, so nothing can be learnt (first: row 8); check labels or prompt_len"
    )
    assert fault([*masked[:2], token_row(9, 4)]) == (
        "2 of 3 rows have no label: row 1, row 2; check their labels or prompt_len, or remove them"
    )
    assert fault([token_row(9, 4), *masked]) == (
        "7 of 8 rows have no label: row 1, row 2, row 3, row 4, row 5 and 2 more; "
        "check their labels or prompt_len, or remove them"
    )


def test_ids_beyond_the_vocabulary():
    another = "is the tokenizer, or the tokenised data, another model's?"
    row = TokenRow("row 2", np.array([1, 7, 2], np.int32), np.array([-100, 5, 2], np.int32))
    label = TokenRow("row 3", np.array([1, 2, 2], np.int32), np.array([-100, 9, 2], np.int32))
    assert fault([token_row(1, 4), row], vocab_size=7) == (
        f"row 2: token id 7 does not exist in a vocabulary of 7; {another}"
    )
    assert fault([token_row(1, 4), label], vocab_size=7) == (
        f"row 3: token id 9 does not exist in a vocabulary of 7; {another}"
    )
    assert len(prepare_rows([token_row(7, 4)], tokenizer=None, seq_length=16, vocab_size=8)[0]) == 1


def test_text_needs_a_tokenizer_and_a_dataset_needs_rows():
    assert fault([text_row("d.jsonl:1", "b")]) == (
        "d.jsonl:1: a text row needs a tokenizer; give one, or rows of input_ids and labels"
    )
    assert fault([]) == "the dataset: there are no rows; give at least one"
