"""What a run leaves alone, survives and refuses in its output folder."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms import saving
from lora_ms.cli.main import main
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.recipes.train import write_results
from lora_ms.train import checkpoint
from lora_ms.train.agreement import check_agreement
from lora_ms.train.callbacks import StepRecord
from lora_ms.train.log import Tee
from lora_ms.train.report import Metrics, read_metrics
from lora_ms.train.signals import StopSignal


def save(output_dir: Path, step: int, **state) -> Path:
    kept = {"best_step": 0, "best_loss": None, "worse": 0, "skipped": 0, **state}
    optimizer = {"m": np.zeros(3, np.float32)}
    return checkpoint.save(output_dir, step, optimizer, kept, lambda part: (part / "w").write_text("w"), keep=9)


def record(step: int) -> StepRecord:
    return StepRecord(step, 1.0, 2.0, 1.0, 1e-3, 8, 8, 1.0, 1.0, 0.0, 1.0)


# --- others' files


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("checkpoints/llama-70b/model.safetensors", "checkpoints/llama-70b/"),
        ("checkpoints/notes.txt", "checkpoints/notes.txt"),
        ("checkpoints/step_7/trainer_state.json", "checkpoints/step_7/"),  # without a list: not known to be ours
        ("checkpoints/step_3/mine.txt", "checkpoints/step_3/"),
        ("best/mine.txt", "best/mine.txt"),
        ("adapter/below/mine.txt", "adapter/below/mine.txt"),
        ("model/mine.txt", "model/mine.txt"),
        ("adapter_lora/mine.txt", "adapter_lora/mine.txt"),
        ("adapter", "adapter/adapter"),
    ],
)
def test_others_files_are_named_and_removed_where_that_is_asked(tmp_path, name, named):
    save(tmp_path, 3)
    (tmp_path / "checkpoints" / f"{saving.PART}step_4").mkdir()
    (tmp_path / "checkpoints" / f"{saving.PART}step_4" / "half").write_text("of a run that was killed")
    (tmp_path / "notes.txt").write_text("beside what a run replaces")
    checkpoint.check_foreign(tmp_path)
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("precious")
    with pytest.raises(LoraMsError) as caught:
        checkpoint.check_foreign(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds {named}, which no run is known to have written and this one would remove: move it away, "
        "give another output_dir, or set overwrite_output_dir: True to delete it"
    )
    assert mine.read_text() == "precious"
    checkpoint.remove_foreign(tmp_path)
    checkpoint.check_foreign(tmp_path)
    assert not mine.exists() and (tmp_path / "notes.txt").exists()


def test_what_others_put_there_during_a_run_stays(tmp_path):
    path = save(tmp_path, 3)
    (path / "mine.txt").write_text("precious")
    assert checkpoint.clear(tmp_path) == ["step_3"]
    assert [p.name for p in path.iterdir()] == ["mine.txt"]


# --- checkpoints


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"step": "3"}, "step '3', step '3' in step_3"),
        ({"step": 4}, "step 4 in step_3"),
        ({"step": 10**13}, "step 10000000000000, step 10000000000000 in step_3"),
        ({"skipped": -1}, "skipped -1"),
        ({"skipped": True}, "skipped True"),
        ({"best_loss": float("nan")}, "best_loss nan"),
        ({"best_loss": "1"}, "best_loss '1'"),
        ({"worse": None, "best_step": 1.5}, "best_step 1.5, worse None"),
    ],
)
def test_the_state_has_bounds(tmp_path, state, named):
    stored = {"step": 3, "best_step": 0, "best_loss": None, "worse": 0, "skipped": 0}
    checkpoint.check_state(tmp_path / "step_3", stored)
    with pytest.raises(LoraMsError) as caught:
        checkpoint.check_state(tmp_path / "step_3", stored | state)
    assert str(caught.value) == f"{tmp_path / 'step_3' / checkpoint.STATE}: not what a run has written: {named}"


def test_a_damaged_checkpoint_names_an_earlier_one(tmp_path):
    save(tmp_path, 3)
    path = save(tmp_path, 5)
    (path / "w").write_text("x")
    with pytest.raises(LoraMsError, match=r"w is damaged: .*\(--resume_training step_3 goes on from an earlier one\)$"):
        checkpoint.load(path, None, {})


# --- records and log


def test_records_outlive_what_goes_wrong(tmp_path, capsys):
    folder = tmp_path / "out"
    metrics = Metrics(folder / "metrics.jsonl", 0)
    metrics.write(record(1))
    (folder / "metrics.jsonl").unlink()
    folder.rmdir()
    metrics.write(record(2))
    metrics.write(record(3))
    assert capsys.readouterr().out == (
        f"warning: cannot write {folder / 'metrics.jsonl'}: No such file or directory; records from here on may be "
        "missing\n"
    )
    folder.mkdir()  # by the next checkpoint
    metrics.write(record(4))
    assert [found["step"] for found in read_metrics(folder / "metrics.jsonl")[0]] == [4]


ODD = [b"\xff", b"[1]", b"{}", b'{"step": "1"}', b'{"step": 1, "loss": "x"}', b"[" * 100_000, b"null", b'{"step":']
ODD += [b'{"step": 1, "loss": NaN}', b'{"step": 1' + b"0" * 400 + b"}", b'{"step": 1, "loss": 1' + b"0" * 400 + b"}"]


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_other_lines_among_the_records(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write(record(1))
    with open(path, "ab") as file:
        file.write(line + b"\n")
    metrics.write(record(2))
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')  # cut
    metrics = Metrics(path, 2)
    assert capsys.readouterr().out == f"warning: {path}: 1 line of other content than records left out\n"
    assert [found["step"] for found in read_metrics(path)[0]] == [1, 2]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    folder = tmp_path / "out"
    with Tee() as log:
        log.to(folder / "run.log")
        print("one")
        (folder / "run.log").unlink()
        folder.rmdir()
        print("two")
        print("three")
    warning = f"warning: cannot write {folder / 'run.log'}: No such file or directory; lines there may be missing"
    assert capsys.readouterr().out.splitlines() == ["one", warning, "two", "three"]


def test_a_screen_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        with Tee() as log:
            log.to(tmp_path / "run.log")
            os.close(reader)
            for number in range(3):
                print("line", number, flush=True)
    assert (tmp_path / "run.log").read_text() == "line 0\nline 1\nline 2\n"


# --- results and signals


def test_results_go_elsewhere_where_they_must(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    fault = write_results(tmp_path / "file" / "adapter", lambda part: (part / "w").write_text("w"))
    assert isinstance(fault, WriteError)
    (folder,) = tmp_path.glob("lora_ms_adapter_*")
    assert str(fault).startswith(f"cannot write {tmp_path / 'file' / 'adapter'}: ")
    assert str(fault).endswith(f"; what was trained is in {folder} instead")
    saving.verify(folder)
    assert (folder / "w").read_text() == "w"
    assert write_results(tmp_path / "adapter", lambda part: (part / "w").write_text("w")) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_however_often_it_comes(number):
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with StopSignal() as stop:
            assert not stop.seen
            for _ in range(3):
                os.kill(os.getpid(), number)
            assert stop.seen
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                os.getpid()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.seen and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- several processes


class OtherRank:
    """The sums that a rank sees beside one with ``values`` and ``code``."""

    def __init__(self, values: dict, code: str = "1"):
        self.sent: list[np.ndarray] = []
        try:
            check_agreement(values, self.note, 2, code)
        except LoraMsError:
            pass

    def note(self, x: Tensor) -> Tensor:
        self.sent.append(x.asnumpy())
        return Tensor(2 * x.asnumpy())

    def sum(self, x: Tensor) -> Tensor:
        return Tensor(x.asnumpy() + self.sent.pop(0))


VALUES = {"seed": 1, "groups": (), "learning_rate": 1e-4, "resume": False, "name": "层"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed 1"),
        ({"learning_rate": 2e-4, "resume": True}, "learning_rate 0.0001; resume False"),
        ({"name": "屋"}, "name '层'"),
    ],
)
def test_ranks_with_other_settings_are_noticed(change, named):
    check_agreement(VALUES, OtherRank(VALUES).sum, 2, "1")
    with pytest.raises(LoraMsError) as caught:
        check_agreement(VALUES, OtherRank(VALUES | change).sum, 2, "1")
    assert str(caught.value) == (
        f"the processes of this run were started with different settings: here {named}; give all of them the same YAML "
        "and flags"
    )


@pytest.mark.parametrize("other", [OtherRank(VALUES, "2"), OtherRank(VALUES | {"more": 1})], ids=["code", "keys"])
def test_ranks_with_another_version_are_noticed(other):
    with pytest.raises(LoraMsError, match="have different versions of this program, or of MindSpore"):
        check_agreement(VALUES, other.sum, 2, "1")


# --- adapters


def test_check_adapter_finds_flipped_bits(reference, tmp_path, capsys):
    source = reference / "adapters" / "qwen2"
    words = ["check-adapter", "--load_adapter", str(tmp_path / "a")]
    with saving.new_folder(tmp_path / "a") as part:
        for file in source.iterdir():
            (part / file.name).write_bytes(file.read_bytes())
    main(words)
    assert f"digests         ok       all files are as {saving.MARKER} says" in capsys.readouterr().out
    file = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    assert main(words) == 2
    assert "adapter_model.safetensors is damaged: its" in capsys.readouterr().out
    (tmp_path / "a" / saving.MARKER).unlink()  # another program's: nothing to compare with
    main(words)
    assert "digests" not in capsys.readouterr().out
