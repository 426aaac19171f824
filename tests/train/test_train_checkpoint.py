"""Checkpoint folders: found by number, pruned, exact, and refused where the run differs."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor
from safetensors.numpy import load_file

from lora_ms import saving
from lora_ms.errors import LoraMsError
from lora_ms.train import checkpoint
from lora_ms.train.optimizer import FlatAdamW, LossScaling

pytestmark = pytest.mark.usefixtures("graph_mode")
SETTINGS = {"rows": 48, "rows_per_step": 8, "seed": 7, "trainable_numbers": 10}
STATE = {**SETTINGS, "best_step": 0, "best_loss": None, "worse": 0, "skipped": 0}


def optimizer(seed: int | None = None) -> FlatAdamW:
    weight = Parameter(Tensor(np.ones((2, 5), np.float32)), name="w")
    made = FlatAdamW([weight], loss_scaling=LossScaling(1024.0, dynamic=False))
    if seed is not None:
        rng = np.random.default_rng(seed)
        for parameter in made.state().values():
            parameter.set_data(Tensor(np.asarray(rng.standard_normal(parameter.shape), np.float32)))
    return made


def write(path):
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_text("w")


def save(folder, step, keep=9, made=None):
    return checkpoint.save(folder, step, (made or optimizer()).whole_state(), STATE, write, keep)


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_is_kept_by_number(tmp_path):
    for step in (2, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_10", "step_100"]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_10", "step_100"]
    assert checkpoint.find(tmp_path, True).name == "step_100"
    assert checkpoint.find(tmp_path, "step_10").name == "step_10"


def test_at_least_one_is_kept(tmp_path):
    save(tmp_path, 1, keep=0)
    save(tmp_path, 2, keep=0)
    assert names(tmp_path) == ["step_2"]


def test_what_is_no_finished_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, 3)
    for name in ("step_9", f"{saving.PART}step_7", "step_x", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / f"{saving.PART}step_7" / checkpoint.STATE).write_text("{}")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_3"]


@pytest.mark.parametrize(
    ("steps", "resume", "message"),
    [
        ((), True, "no checkpoint to resume from"),
        ((), "step_3", "no checkpoint named step_3"),
        ((1, 12), "step_3", "no checkpoint named step_3; there are: step_1, step_12"),
    ],
)
def test_no_such_checkpoint(tmp_path, steps, resume, message):
    for step in steps:
        save(tmp_path, step)
    with pytest.raises(LoraMsError) as caught:
        checkpoint.find(tmp_path, resume)
    assert str(caught.value) == f"{tmp_path / 'checkpoints'}: {message}"


def test_the_optimiser_comes_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 5, made=optimizer(seed=1))
    assert path == tmp_path / "checkpoints" / "step_5"
    assert json.loads((path / checkpoint.STATE).read_text()) == {"step": 5, **STATE}
    assert sorted(p.name for p in path.iterdir()) == [
        "lora-ms.sha256", "optimizer.safetensors", "trainer_state.json", "weights",
    ]  # fmt: skip
    wanted, found = optimizer(seed=1).state(), optimizer()
    assert checkpoint.load(path, found, SETTINGS) == {"step": 5, **STATE}
    assert sorted(found.state()) == ["count", "exp_avg", "exp_avg_sq", "good_steps", "loss_scale"]
    for name, parameter in found.state().items():
        assert parameter.shape == wanted[name].shape and parameter.dtype == ms.float32
        np.testing.assert_array_equal(parameter.asnumpy(), wanted[name].asnumpy(), err_msg=name)
    stored = load_file(path / "optimizer.safetensors")
    assert {name: value.shape for name, value in stored.items()} == {
        "count": (1,), "exp_avg": (10,), "exp_avg_sq": (10,), "good_steps": (1,), "loss_scale": (1,),
    }  # fmt: skip


def test_every_setting_that_differs_is_listed(tmp_path):
    path = save(tmp_path, 5)
    with pytest.raises(LoraMsError) as caught:
        checkpoint.load(path, optimizer(), SETTINGS | {"rows": 50, "seed": 8})
    differences = "rows: 48 there, 50 here; seed: 7 there, 8 here"
    assert str(caught.value) == f"{path}: made by a run with other settings: {differences}"


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path):
    save(tmp_path, 5)

    def fail(path):
        write(path)
        raise LoraMsError("no room")

    with pytest.raises(LoraMsError):
        checkpoint.save(tmp_path, 5, optimizer().whole_state(), STATE, fail, 1)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_5"]
    assert (tmp_path / "checkpoints" / "step_5" / "weights").read_text() == "w"
    save(tmp_path, 5)  # what the failed one left is no obstacle
    assert names(tmp_path) == ["step_5"]
