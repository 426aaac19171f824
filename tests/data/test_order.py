"""Mixtures follow their weights over the run, and any step can be asked for at any time."""

import numpy as np
import pytest

from lora_ms.data.example import TokenRow
from lora_ms.data.loader import DataPlan, MixedOrder, Source

INDUSTRY, GENERAL = Source(300, 0.9, 0.7), Source(200, 0.1, 0.3)


def shares(order: MixedOrder, steps: range) -> np.ndarray:
    taken = np.concatenate([order.step(step) for step in steps])
    return np.array([np.mean(taken < 300), np.mean(taken >= 300)])


def test_shares_move_on_a_line_from_the_first_weights_to_the_last():
    order = MixedOrder([INDUSTRY, GENERAL], 20, 101, 0, True)
    assert shares(order, range(0, 5)) == pytest.approx([0.9, 0.1], abs=0.02)
    assert shares(order, range(48, 53)) == pytest.approx([0.8, 0.2], abs=0.02)
    assert shares(order, range(96, 101)) == pytest.approx([0.7, 0.3], abs=0.02)
    assert shares(order, range(101)) == pytest.approx([0.8, 0.2], abs=1e-3)
    assert all(len(order.step(step)) == 20 for step in range(101))


def test_every_source_goes_round_in_its_own_epochs():
    order = MixedOrder([INDUSTRY, GENERAL], 20, 200, 3, True)
    taken = np.concatenate([order.step(step) for step in range(200)])
    industry = taken[taken < 300]
    for epoch in range(len(industry) // 300):
        assert sorted(industry[epoch * 300 : (epoch + 1) * 300]) == list(range(300))
    assert industry[:300].tolist() != industry[300:600].tolist()


def test_any_step_at_any_time():
    first, again = (MixedOrder([INDUSTRY, GENERAL, Source(7, 1.0, 0.0)], 12, 60, 5, True) for _ in range(2))
    wanted = {step: first.step(step).tolist() for step in range(60)}
    for step in (59, 3, 30, 0):
        assert again.step(step).tolist() == wanted[step]
    assert (
        MixedOrder([INDUSTRY, GENERAL], 12, 60, 6, True).step(9).tolist()
        != MixedOrder([INDUSTRY, GENERAL], 12, 60, 5, True).step(9).tolist()
    )


def test_a_plan_of_a_mixture():
    rows = [TokenRow(f"row {n}", np.arange(1, 6, dtype=np.int32), np.arange(1, 6, dtype=np.int32)) for n in range(500)]
    plan = DataPlan.build(
        rows, batch_size=10, accumulation=1, epochs=1, seed=0, pad_id=0, seq_length=16, kind="packed",
        sources=[INDUSTRY, GENERAL],
    )  # fmt: skip
    assert plan.total_steps == 50
    assert np.mean([np.mean(plan.step_rows(step) < 300) for step in range(50)]) == pytest.approx(0.8, abs=0.01)
