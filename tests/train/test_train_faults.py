"""What goes wrong while a run is under way: a full disk, and numbers that are none in float16."""

import os
import resource
import signal

import mindspore as ms
import numpy as np
from safetensors.numpy import load_file

from lora_ms.train import checkpoint
from lora_ms.train.callbacks import TrainerCallback

LIMIT = 8192  # bytes of a file: enough for records, and for no checkpoint


class FullDisk(TrainerCallback):
    """No file may grow beyond ``LIMIT`` from the first checkpoint on, until step 5 is done."""

    def __init__(self):
        self.saved, self.soft_hard = [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_save(self, state, path):
        self.saved.append(path.name)
        if len(self.saved) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, self.soft_hard[1]))

    def on_step_end(self, state, record):
        if record.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.soft_hard)

    def on_train_end(self, state):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.soft_hard)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(train, plain_run, tmp_path, capsys):
    disk = FullDisk()
    found = train(tmp_path, save_steps=2, callbacks=[disk])
    assert disk.saved == ["step_2", "step_6"]
    warning = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert warning.startswith(f"warning: cannot write {tmp_path / 'checkpoints' / 'step_4'}: File too large")
    assert warning.endswith("the run goes on, and its last checkpoint is step_2")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_6"]
    assert found.records == plain_run.records
    for name, value in plain_run.adapter.items():
        np.testing.assert_array_equal(found.adapter[name], value, err_msg=name)


def test_a_step_that_overflows_in_float16_is_left_out(train, tmp_path, poisoned):
    """The third row of four is taken by step 3."""
    settings = {"batch_size": 1, "shuffle": False, "save_steps": 1, "warmup_steps": 0, "loss_scale": 1024.0}
    found = train(tmp_path, name="deepseek_r1_qwen", dtype=ms.float16, **poisoned, **settings)
    assert [record["loss"] is None for record in found.records] == [False, False, True, False]
    assert [record["grad_norm"] is None for record in found.records] == [False, False, True, False]
    paths = checkpoint.list_checkpoints(tmp_path)
    states = [load_file(path / "optimizer.safetensors") for path in paths]
    assert [float(state["loss_scale"][0]) for state in states] == [1024, 1024, 512, 512]
    assert [float(state["count"][0]) for state in states] == [1, 2, 2, 3]
    weights = [load_file(path / "adapter_model.safetensors") for path in paths]
    for name, value in weights[1].items():
        np.testing.assert_array_equal(weights[2][name], value, err_msg=name)
    assert any((weights[3][name] != value).any() for name, value in weights[2].items())
    assert all(np.isfinite(value).all() for value in found.adapter.values())


class Stopped(TrainerCallback):
    """Asks for the end of the run at step 3, as SIGTERM does, on a disk that is full from step 2 on."""

    def __init__(self):
        self.soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, state, record):
        if record.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, self.soft_hard[1]))
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_notice(self, state, text):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.soft_hard)  # room again, once the checkpoint has failed

    def on_train_end(self, state):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.soft_hard)


def test_a_run_that_is_stopped_on_a_full_disk_keeps_its_weights(train, tmp_path, capsys):
    found = train(tmp_path, save_steps=0, callbacks=[Stopped()])
    assert (found.outcome.steps, found.outcome.stopped, found.outcome.saved) == (4, True, False)
    assert not (tmp_path / "checkpoints").exists()
    assert len(found.adapter) == 28
    assert (
        "checkpoints/step_4: File too large; the run goes on, and its last checkpoint is none"
        in capsys.readouterr().out
    )
