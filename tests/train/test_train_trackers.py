"""What goes to Weights & Biases, SwanLab and MLflow, offline; and that none of them can end a run."""

from types import SimpleNamespace

import pytest

from lora_ms.errors import LoraMsError
from lora_ms.train import trackers
from lora_ms.train.callbacks import EvaluationRecord, StepRecord

STEP = StepRecord(
    step=2, epoch=1.0, loss=1.5, grad_norm=None, learning_rate=1e-3, tokens=8, label_tokens=4, tokens_per_second=9.0,
    step_time_s=0.1, wait_share=0.0, peak_memory_mb=7.0, terms={"orthogonality": 0.25},
)  # fmt: skip
SCORES = EvaluationRecord(2, 1.0, 0.5, 1.6, 0.75, 4, 0.1)


def report(writer, tmp_path) -> None:
    """As a run does it."""
    state = SimpleNamespace(is_main=True, total_steps=2, step=0, output_dir=tmp_path)
    writer.on_train_begin(state)
    writer.on_step_end(state, STEP)
    writer.on_evaluate(state, SCORES)
    writer.on_train_end(state)


class Failing(trackers.Tracker):
    title = "failing"

    def __init__(self, folder, at: str):
        super().__init__(folder, 1, "run")
        self.at = at
        self.calls: list = []

    def start(self, state):
        self._note("start")

    def send(self, step, values):
        self._note("send", values)

    def finish(self):
        self._note("finish")

    def _note(self, what, *values):
        self.calls.append((what, *values))
        if what == self.at:
            raise RuntimeError("no\nnetwork")


def test_what_is_sent(tmp_path):
    writer = Failing(tmp_path, "nowhere")
    report(writer, tmp_path)
    train = {"loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 9.0, "peak_memory_mb": 7.0, "orthogonality": 0.25}
    scores = {"eval/loss": 0.5, "eval/accuracy": 0.75, "eval/perplexity": 1.6}
    sent = [{f"train/{name}": value for name, value in train.items()}, scores]
    assert writer.calls == [("start",), ("send", sent[0]), ("send", sent[1]), ("finish",)]


@pytest.mark.parametrize(("at", "calls"), [("start", 1), ("send", 2), ("finish", 4)])
def test_a_tracker_that_fails_is_said_once_and_left(at, calls, tmp_path, capsys):
    writer = Failing(tmp_path, at)
    report(writer, tmp_path)
    assert len(writer.calls) == calls
    assert capsys.readouterr().out == "warning: report_to failing: no network; the run goes on without it\n"


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(LoraMsError, match="report_to wandb needs wandb: pip install wandb"):
        trackers.check(["wandb"])
    assert trackers.installed() == []


@pytest.mark.parametrize("name", trackers.TRACKERS)
@pytest.mark.filterwarnings("ignore")
def test_without_a_network(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    (writer,) = trackers.writers([name], tmp_path / "out", 1, "first try", "")
    report(writer, tmp_path)
    assert not writer.lost and "warning" not in capsys.readouterr().out
    kept = {"wandb": "out/wandb/offline-run-*/*.wandb", "swanlab": "out/swanlog/run-*/*.swanlab", "mlflow": "mlflow.db"}
    (file,) = tmp_path.glob(kept[name])
    if name == "mlflow":
        import mlflow

        (run,) = mlflow.search_runs(output_format="list")
        assert run.info.run_name == "first try" and run.info.status == "FINISHED"
        assert (run.data.metrics["train/loss"], run.data.metrics["eval/accuracy"]) == (1.5, 0.75)
    else:
        assert b"train/orthogonality" in file.read_bytes()
