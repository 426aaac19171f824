"""Whole short runs: what must not change the numbers does not, and what they leave behind."""

import json
import math
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

from lora_ms import saving
from lora_ms.adapters.inject import adapted_layers
from lora_ms.data.example import TokenRow
from lora_ms.data.packing import Layout, Shape
from lora_ms.errors import LoraMsError


def assert_same_run(found, wanted, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=rtol, atol=0)
    norms = [[record["grad_norm"] for record in run.records] for run in (found, wanted)]
    np.testing.assert_allclose(*norms, rtol=max(rtol, 1e-5), atol=0)
    assert sorted(found.adapter) == sorted(wanted.adapter)
    for name, value in wanted.adapter.items():
        np.testing.assert_allclose(found.adapter[name], value, rtol=0, atol=atol, err_msg=name)


def test_the_loop_reproduces_the_trace_of_torch(train, golden, tmp_path):
    """Rows, schedule, clipping, decay and records together: a step is two micro-batches of three rows."""
    z = golden("trace_llama3")
    ids, labels, lengths = (z[key].reshape(-1, *z[key].shape[3:]) for key in ("input_ids", "labels", "lengths"))
    data = [TokenRow(f"row {i}", ids[i, :n], labels[i, :n]) for i, n in enumerate(lengths)]

    def start(model):
        for name, layer in adapted_layers(model).items():
            layer.lora_a.set_data(Tensor(z[f"initial/base_model.model.{name}.lora_A.weight"]))

    settings = {"batch_size": 3, "accumulation": 2, "shuffle": False, "warmup_steps": 3, "max_grad_norm": 0.5}
    found = train(tmp_path, name="llama3", prepare=start, data=data, **settings)
    for key in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([record[key] for record in found.records], z[key], rtol=2e-5, err_msg=key)
    assert [record["label_tokens"] for record in found.records] == z["label_tokens"].sum(1).tolist()
    for name, value in found.adapter.items():
        np.testing.assert_allclose(value, z[f"final/{name}"], rtol=0, atol=5e-5, err_msg=name)


def test_a_run_learns(plain_run):
    assert plain_run.losses[-1] < plain_run.losses[0] - 0.3
    assert all(np.abs(value).max() > 1e-3 for value in plain_run.adapter.values())
    assert (plain_run.outcome.steps, plain_run.outcome.stopped) == (6, False)
    assert (plain_run.outcome.first_loss, plain_run.outcome.last_loss) == (plain_run.losses[0], plain_run.losses[-1])


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4)])
def test_gradient_accumulation_changes_nothing(train, plain_run, tmp_path, batch_size, accumulation):
    assert_same_run(train(tmp_path, batch_size=batch_size, accumulation=accumulation), plain_run)


def test_padding_and_spare_slots_change_nothing(train, plain_run, tmp_path):
    """Rows of 32 rather than 16 tokens, and more slots for targets than any batch fills."""
    wide = Layout("padded", 8, (Shape(8, 32, 208),))
    assert_same_run(train(tmp_path, plan={"layout": wide}), plain_run)


def test_reading_losses_seldom_changes_nothing(train, plain_run, tmp_path):
    """And nor does recomputing activations: both in one run, which is compiled once."""
    found = train(tmp_path, sink_size=4, recompute=True)
    assert_same_run(found, plain_run, rtol=1e-6)
    keys = [k for k in plain_run.records[0] if k not in ("loss", "grad_norm")]
    assert [[r[k] for k in keys] for r in found.records] == [[r[k] for k in keys] for r in plain_run.records]


def test_the_same_seed_gives_the_same_run_with_dropout(train, plain_run, tmp_path):
    first, second = train(tmp_path / "1", dropout=0.3, max_steps=3), train(tmp_path / "2", dropout=0.3, max_steps=3)
    assert first.records == second.records
    for name, value in first.adapter.items():
        np.testing.assert_array_equal(second.adapter[name], value, err_msg=name)
    # dropout acts once B is no longer zero
    assert first.losses[0] == pytest.approx(plain_run.losses[0], rel=1e-6)
    assert abs(first.losses[2] - plain_run.losses[2]) > 1e-4


def test_records(plain_run, rows):
    lines = [json.loads(line) for line in (plain_run.path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert list(line) == [
            "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "label_tokens", "tokens_per_second",
            "step_time_s", "wait_share", "peak_memory_mb",
        ]  # fmt: skip
        assert all(math.isfinite(value) and value >= 0 for value in line.values())
        assert line["peak_memory_mb"] > 50 and line["step_time_s"] > 0
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [round(n / 6, 4) for n in range(1, 7)]
    peak = 5e-3  # two steps of warm-up, then half a cosine over four
    wanted = [0, peak / 2, *(peak / 2 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], wanted, rtol=1e-12)
    # one epoch: every row once
    assert sum(line["tokens"] for line in lines) == sum(len(row.input_ids) for row in rows)
    assert sum(line["label_tokens"] for line in lines) == sum(row.learnt.size for row in rows)


def test_the_plot_is_a_picture(plain_run):
    from matplotlib.image import imread

    data = (plain_run.path / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    picture = imread(plain_run.path / "loss.png")
    assert picture.shape[:2] == (840, 840)
    assert (picture[..., :3].min(-1) < 0.5).sum() > 500  # lines and letters


def test_what_a_run_leaves_behind(plain_run):
    names = sorted(str(p.relative_to(plain_run.path)) for p in plain_run.path.rglob("*") if p.is_file())
    assert names == [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/lora-ms.sha256",
        "data_report.json", "loss.png", "metrics.jsonl",
    ]  # fmt: skip


def test_every_nth_step_is_logged_and_the_last(train, tmp_path, capsys):
    found = train(tmp_path, logging_steps=3, max_steps=4)
    assert [record["step"] for record in found.records] == [3, 4]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["3/4", "4/4"]


@pytest.fixture(scope="module")
def resumed_run(train, tmp_path_factory):
    """Three steps of six, stopped, and the other three from their checkpoint."""
    path = tmp_path_factory.mktemp("resumed")
    train(path, max_steps=3, schedule_steps=6, save_steps=3)
    before = sorted(p.name for p in (path / "checkpoints").iterdir())
    shutil.rmtree(path / "adapter")
    return before, train(path, max_steps=6, schedule_steps=6, save_steps=2, keep_checkpoint_max=2, resume=True)


def test_a_resumed_run_is_the_run(resumed_run, plain_run):
    _, found = resumed_run
    assert found.records == plain_run.records
    for name, value in plain_run.adapter.items():
        np.testing.assert_array_equal(found.adapter[name], value, err_msg=name)


def test_checkpoints_are_saved_when_due_and_pruned(resumed_run):
    before, found = resumed_run
    assert before == ["step_3"]
    folder = found.path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_4", "step_6"]
    assert sorted(p.name for p in (folder / "step_6").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lora-ms.sha256", "optimizer.safetensors",
        "trainer_state.json",
    ]  # fmt: skip
    for name, value in load_file(folder / "step_6" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(value, found.adapter[name])
    assert load_file(folder / "step_6" / "optimizer.safetensors")["count"] == [6.0]


def test_other_settings_do_not_resume(resumed_run, train, tmp_path):
    shutil.copytree(resumed_run[1].path, tmp_path / "run")
    with pytest.raises(LoraMsError) as caught:
        train(tmp_path / "run", batch_size=4, seed=8, resume=True)
    path = tmp_path / "run" / "checkpoints" / "step_6"
    assert str(caught.value) == (
        f"{path}: made by a run with other settings: rows_per_step: 8 there, 4 here; seed: 7 there, 8 here; "
        "schedule_steps: 6 there, 12 here"
    )
    with pytest.raises(LoraMsError) as caught:
        train(tmp_path / "run", resume="step_3")
    assert str(caught.value) == f"{path.parent}: no checkpoint named step_3; there are: step_4, step_6"


def test_a_loss_that_is_no_number_stops_the_run(train, tmp_path, poisoned):
    """The third row of four is taken by step 2."""
    adapter = tmp_path / "adapter"
    with saving.new_folder(adapter) as part:
        (part / "adapter_config.json").write_text("the last run's")
    times = adapter.stat().st_mtime_ns
    with pytest.raises(LoraMsError) as caught:
        train(tmp_path, name="deepseek_r1_qwen", **poisoned, batch_size=2, shuffle=False, save_steps=1)
    assert str(caught.value) == (
        "the loss of step 2 (rows row 2, row 3) is nan; no weight was changed by it: "
        "lower the learning rate, or look at these rows"
    )
    assert saving.is_intact(adapter) and adapter.stat().st_mtime_ns == times
    assert (adapter / "adapter_config.json").read_text() == "the last run's"
    good = tmp_path / "checkpoints" / "step_1"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    assert sorted(p.name for p in good.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lora-ms.sha256", "optimizer.safetensors",
        "trainer_state.json",
    ]  # fmt: skip
    assert all(np.isfinite(value).all() for value in load_file(good / "adapter_model.safetensors").values())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_checkpoint_beyond_the_end_is_refused(train, tmp_path):
    """At a constant rate a run may be longer or shorter; one that is done has nothing to go on with."""
    train(tmp_path, max_steps=3, lr_kind="constant", save_steps=3)
    with pytest.raises(LoraMsError, match="step_3: 3 steps are done there, and this run has 2: raise max_steps"):
        train(tmp_path, max_steps=2, lr_kind="constant", resume=True)


def test_nothing_to_train_is_an_error(train, tmp_path):
    def freeze(model):
        for parameter in model.get_parameters():
            parameter.requires_grad = False

    with pytest.raises(LoraMsError) as caught:
        train(tmp_path, prepare=freeze)
    assert str(caught.value) == (
        "no parameter is trainable: give pet_config, or set it to null to train all parameters"
    )


def test_float16_skips_what_overflows_and_then_learns(train, plain_run, tmp_path):
    """A first scale at the end of float32, which flows beside float16 weights here, overflows until halving has brought
    it down; the losses are near float32's."""
    found = train(tmp_path, dtype=ms.float16, loss_scale=2.0**126, max_steps=24, save_steps=24, warmup_steps=0)
    state = load_file(tmp_path / "checkpoints" / "step_24" / "optimizer.safetensors")
    count, scale = int(state["count"][0]), float(state["loss_scale"][0])
    assert 0 < count < 24 and scale == 2.0 ** (126 - (24 - count))
    assert all(value.dtype == np.float32 for value in found.adapter.values())
    assert found.losses[0] == pytest.approx(plain_run.losses[0], rel=2e-2)
    assert found.losses[-1] < found.losses[0] - 0.3
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert all(norm is None or norm > 0 for norm in (line["grad_norm"] for line in lines))


def test_bfloat16_is_near_and_goes_on_as_if_it_had_not_stopped(train, tmp_path):
    """The model's weights are bfloat16: only the rounding of what they are multiplied with, if any, moves the loss."""
    whole = train(tmp_path / "whole", dtype=ms.bfloat16, max_steps=6, dropout=0.1)
    train(tmp_path / "cut", dtype=ms.bfloat16, max_steps=3, schedule_steps=6, save_steps=3, dropout=0.1)
    found = train(tmp_path / "cut", dtype=ms.bfloat16, max_steps=6, schedule_steps=6, resume=True, dropout=0.1)
    assert found.records == whole.records
    for name, value in whole.adapter.items():
        np.testing.assert_array_equal(found.adapter[name], value, err_msg=name)
    plain = train(tmp_path / "plain", max_steps=6, dropout=0.1)
    np.testing.assert_allclose(whole.losses, plain.losses, rtol=5e-3)
