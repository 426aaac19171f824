"""Layouts: every row once, in shapes that hold it, with as little padding as there need be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ms.data.example import TokenRow
from lora_ms.data.loader import DataPlan, EpochOrder
from lora_ms.data.packing import Layout, Shape, first_fit, padded_length, plan_layout


def instruction_rows(count: int, seed: int = 0) -> list[TokenRow]:
    """Rows with the lengths of instruction data: half have fewer than 90 tokens, the longest 1,025."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(np.log(90), 0.85, count)), 12, 1025).astype(int)
    rows = []
    for number, length in enumerate(lengths):
        labels = np.full(length, 7, np.int32)
        labels[: max(1, int(length * rng.uniform(0.2, 0.6)))] = -100
        rows.append(TokenRow(f"row {number}", np.full(length, 7, np.int32), labels))
    return rows


def test_first_fit_decreasing_as_a_table():
    lengths, labels = np.array([3, 5, 2, 4, 2]), np.array([1, 1, 1, 4, 1])
    lines, fills = first_fit(lengths, labels, 8, 8)
    assert lines == [[1, 0], [3, 2, 4]] and fills.tolist() == [[8, 2], [8, 6]]
    lines, fills = first_fit(lengths, labels, 8, 4)  # no more than four targets a line
    assert lines == [[1, 0], [3], [2, 4]] and fills.tolist() == [[8, 2], [4, 4], [4, 2]]


def test_shapes_of_a_packed_step_as_a_table():
    layout = Layout("packed", 4, (Shape(1, 4, 4), Shape(1, 8, 8)))
    laid = layout.arrange(np.array([3, 5, 2, 4]), np.array([1, 1, 1, 1]))
    assert laid == [(Shape(1, 8, 8), [[1, 0]]), (Shape(1, 8, 8), [[3, 2]])]
    assert layout.arrange(np.array([3, 7]), np.array([1, 1])) == [(Shape(1, 8, 8), [[1]]), (Shape(1, 4, 4), [[0]])]


def test_shapes_of_buckets_as_a_table():
    layout = Layout("bucketed", 2, (Shape(2, 4, 8), Shape(2, 16, 32)))
    laid = layout.arrange(np.array([3, 9, 2, 16, 4]), np.ones(5, int))
    assert laid == [
        (Shape(2, 4, 8), [[2], [0]]), (Shape(2, 16, 32), [[4], [1]]), (Shape(2, 16, 32), [[3]])
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=60),
    st.sampled_from(["padded", "bucketed", "packed"]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_every_row_has_one_place_that_holds_it(rows, kind, batch_size, accumulation, world):
    lengths = np.array([length for length, _ in rows])
    labels = np.array([max(1, int(length * share)) for length, share in rows])
    per_step = batch_size * accumulation * world
    steps = -(-len(rows) // per_step)
    order = EpochOrder(len(rows), per_step, steps, steps, 3, True)
    taken = [order.step(step) for step in range(steps)]
    options = dict(batch_size=batch_size, buckets=3, seq_length=96, per_step=per_step, world=world)
    layout = plan_layout(kind, lengths, labels, taken, **options)
    assert len(layout.shapes) <= 3
    for step in taken:
        places = []
        for shape, lines in layout.arrange(lengths[step], labels[step]):
            assert shape in layout.shapes and 1 <= len(lines) <= shape.lines
            assert max(int(lengths[step][line].sum()) for line in lines) <= shape.length
            assert sum(int(labels[step][line].sum()) for line in lines) <= shape.capacity
            assert shape.lines * shape.length <= batch_size * padded_length(int(lengths.max()), 96)
            places += [row for line in lines for row in line]
        assert sorted(places) == list(range(len(step)))


def padding(plan: DataPlan) -> float:
    """Share of padding in the tokens computed."""
    batches = [batch for step in range(plan.total_steps) for batch in plan.step(step)[0]]
    return 1 - sum(batch.input_tokens for batch in batches) / sum(batch.input_ids.size for batch in batches)


def test_packing_leaves_at_most_three_percent_of_padding():
    rows = instruction_rows(10_000)
    assert 85 <= np.median([len(row.input_ids) for row in rows]) <= 95
    options = dict(batch_size=16, accumulation=4, epochs=1, seed=0, pad_id=0, seq_length=1024)
    shares = {kind: padding(DataPlan.build(rows, kind=kind, **options)) for kind in ("packed", "bucketed", "padded")}
    assert shares["packed"] <= 0.03
    assert shares["packed"] < shares["bucketed"] < shares["padded"]


@pytest.mark.parametrize("kind", ["padded", "bucketed", "packed"])
def test_the_same_rows_in_the_same_step_whatever_the_layout(kind):
    rows = instruction_rows(100)
    plan = DataPlan.build(
        rows, batch_size=4, accumulation=2, epochs=2, seed=1, pad_id=0, seq_length=1024, kind=kind
    )  # fmt: skip
    reference = DataPlan.build(rows, batch_size=8, accumulation=1, epochs=2, seed=1, pad_id=0, seq_length=1024)
    assert plan.total_steps == reference.total_steps == 26
    for step in range(plan.total_steps):
        assert plan.step_rows(step).tolist() == reference.step_rows(step).tolist()
        (ours, count), (theirs, wanted) = plan.step(step), reference.step(step)
        assert count == wanted == sum(b.label_tokens for b in ours) == sum(b.label_tokens for b in theirs)
        assert sum(b.tokens for b in ours) == sum(b.tokens for b in theirs)


def plan_of(lengths: np.ndarray, batch_size: int, accumulation: int = 1) -> DataPlan:
    rows = [TokenRow("row", np.full(n, 7, np.int32), np.full(n, 7, np.int32)) for n in lengths]
    options = dict(epochs=3, seed=0, pad_id=0, seq_length=1024, kind="packed")
    return DataPlan.build(rows, batch_size=batch_size, accumulation=accumulation, **options)


@pytest.mark.parametrize("batch_size", [4, 8, 16])
@pytest.mark.parametrize(
    ("shortest", "longest", "rows"), [(35, 59, 104), (19, 38, 108), (20, 42, 72), (28, 141, 91), (35, 1017, 300)]
)
def test_packing_pads_no_more_than_plain_batches(shortest, longest, rows, batch_size):
    """Numbers and lengths of rows as in five real files; plain: each batch as long as its longest row."""
    plan = plan_of(np.random.default_rng(3).integers(shortest, longest + 1, rows), batch_size)
    padding = plan.padding()
    assert plan.layout.kind == "packed" and padding["packed"] <= padding["usual"] + 0.01
    assert len(plan.layout.shapes) <= (2 if longest <= 141 else 3)


def test_rows_that_cannot_share_lines_are_not_packed():
    """Two rows of 390 to 760 tokens do not fit one line; lines of two lengths hold the pairs better."""
    plan = plan_of(np.random.default_rng(3).integers(390, 761, 136), 2)
    assert plan.layout.kind == "bucketed" and len(plan.layout.shapes) == 2
    assert plan.padding()["bucketed"] < 0.2


def test_a_small_run_compiles_one_shape():
    lengths = np.array([58, 31, 44, 40, 37, 38, 57, 41, 44, 30])
    for batch_size in (1, 2, 5, 8):
        assert len(plan_of(lengths, batch_size).layout.shapes) == 1


@pytest.mark.parametrize("padding_cost", [0.2, 1.0])
def test_rows_beyond_those_that_are_tried_out_have_a_place(padding_cost):
    """Shapes are tried out on a few thousand rows; one of the others has more labels than any of these."""
    lengths, labels = np.full(20_000, 900), np.full(20_000, 10)
    rows = np.arange(len(lengths))
    tried = set(np.random.default_rng(0).permutation(len(rows))[:2048].tolist())
    long = next(row for row in rows if row not in tried)
    labels[long] = 400
    layout = plan_layout(
        "packed", lengths, labels, rows.reshape(-1, 4), batch_size=4, buckets=4, seq_length=1024, per_step=4, world=1,
        padding_cost=padding_cost,
    )  # fmt: skip
    step = np.array([long, 0, 1, 2] if long > 2 else [long, 5, 6, 7])
    laid = layout.arrange(lengths[step], labels[step])
    assert sorted(row for batch in laid for row in batch.rows) == [0, 1, 2, 3]
    for batch in laid:
        assert labels[step[batch.rows]].sum() <= batch.shape.capacity
