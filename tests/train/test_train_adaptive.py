"""Micro-batches that follow the memory: the same rows in every step, and the same numbers."""

import numpy as np
import pytest

from lora_ms.data.loader import DataPlan
from lora_ms.recipes import train as recipe
from lora_ms.train import adaptive
from lora_ms.train.adaptive import REST, MemoryMonitor


def test_levels_follow_the_memory_and_rest_after_a_change():
    monitor = MemoryMonitor(2, float)
    high = [monitor.next_level(True, False) for _ in range(2 * REST + 4)]
    assert high == [1] * (REST + 1) + [2] * (REST + 3)  # no level beyond the highest
    assert [monitor.next_level(False, False) for _ in range(3)] == [2, 2, 2]  # neither short nor plenty
    low = [monitor.next_level(False, True) for _ in range(2 * REST + 4)]
    assert low[0] == 1 and low[REST + 1] == 0 and low[-1] == 0


@pytest.mark.parametrize("kind", ["packed", "bucketed"])
def test_a_level_changes_sizes_and_no_row(rows, kind):
    settings = {"batch_size": 8, "accumulation": 1, "epochs": 1, "seed": 0, "pad_id": 0, "seq_length": 16}
    plan = DataPlan.build(rows, kind=kind, prefer_many_lines=True, **settings)
    assert plan.levels >= 2
    for step in range(plan.total_steps):
        whole, label_tokens = plan.step(step)
        for level in (1, plan.levels):
            batches, same = plan.step(step, level)
            assert same == label_tokens == sum(batch.label_tokens for batch in batches)
            lines = max(1, max(len(batch.input_ids) for batch in whole) >> level)
            assert max(len(batch.input_ids) for batch in batches) == lines
            tokens = [np.sort(np.concatenate([b.targets[b.targets >= 0] for b in some])) for some in (whole, batches)]
            np.testing.assert_array_equal(*tokens)


def test_learning_is_not_disturbed(train, plain_run, tmp_path, monkeypatch, capsys):
    """Memory is short after the first step and plenty after the third."""
    shares = iter([0.9, 0.7, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(adaptive, "REST", 0)
    monkeypatch.setattr(recipe, "memory_share", lambda device, budget: next(shares))
    found = train(tmp_path, adaptive_batch=True)
    notices = [line for line in capsys.readouterr().out.splitlines() if "micro-batches are now" in line]
    assert notices == [
        "90% of the memory is in use: micro-batches are now 1/2 of full size",
        "50% of the memory is in use: micro-batches are now 1/1 of full size",
    ]
    np.testing.assert_allclose(found.losses, plain_run.losses, rtol=1e-5)
    for name, value in plain_run.adapter.items():
        np.testing.assert_allclose(found.adapter[name], value, rtol=0, atol=1e-5, err_msg=name)
