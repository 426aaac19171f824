"""run.log, metrics.jsonl and what is printed."""

import json
import sys

import pytest

from lora_ms.errors import LoraMsError
from lora_ms.train.callbacks import StepRecord
from lora_ms.train.log import Tee
from lora_ms.train.report import Metrics, Progress, plot_loss, read_metrics


def test_what_is_printed_goes_to_the_file_too(tmp_path, capsys):
    screen = sys.stdout
    with Tee() as log:
        print("loss", end=" ")
        assert list(tmp_path.iterdir()) == []
        log.to(tmp_path / "run.log")
        print("1.5 …")
        assert sys.stdout is not screen
    print("after")
    assert sys.stdout is screen
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == "loss 1.5 …\n"
    assert capsys.readouterr().out == "loss 1.5 …\nafter\n"
    with Tee() as log:  # a resumed run adds to it
        log.to(tmp_path / "run.log")
        print("more")
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == "loss 1.5 …\nmore\n"


def test_the_reason_of_a_failure_stands_in_the_file(tmp_path):
    screen = sys.stdout
    with pytest.raises(LoraMsError, match="^bad row$"), Tee() as log:
        log.to(tmp_path / "run.log")
        raise LoraMsError("bad row")
    assert sys.stdout is screen
    assert (tmp_path / "run.log").read_text() == "error: bad row\n"


def test_nothing_is_written_before_a_place_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(LoraMsError, match="cannot be written"), Tee() as log:
        print("checked")
        log.to(tmp_path / "file" / "sub" / "run.log")
    assert capsys.readouterr().out == "checked\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step, epoch=step / 4, loss=2.0 / step, grad_norm=0.5, learning_rate=1e-3, tokens=100, label_tokens=40,
        tokens_per_second=1234.56, step_time_s=0.081, wait_share=0.25, peak_memory_mb=300.0,
    )  # fmt: skip


def test_a_resumed_run_drops_the_records_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        metrics = Metrics(path, start)
        for step in steps:
            metrics.write(record(step))
    assert [r["step"] for r in read_metrics(path)[0]] == [1, 2, 3, 4]
    assert json.loads(path.read_text().splitlines()[2]) == {
        "step": 3, "epoch": 0.75, "loss": 2.0 / 3, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 100,
        "label_tokens": 40, "tokens_per_second": 1234.56, "step_time_s": 0.081, "wait_share": 0.25,
        "peak_memory_mb": 300.0,
    }  # fmt: skip
    Metrics(path, 0)  # a run from its beginning keeps none
    assert path.read_text() == ""


def test_each_record_is_on_disk_at_once(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write(record(1))
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 1


def test_lines_where_there_is_no_terminal(capsys):
    progress = Progress(0, 100)
    progress.show(record(1), logged=False)
    progress.show(record(2), logged=True)
    progress.close()
    assert capsys.readouterr().out == "step   2/100  epoch 0.50  loss 1.0000  1,235 tok/s  lr 1.00e-03  norm 0.50\n"


STEPS = [{"step": n, "loss": 4.0 / n, "grad_norm": 1.0 + n % 2, "learning_rate": 1e-3 / n} for n in range(1, 61)]
SCORED = [{"step": n, "eval_loss": 4.4 / n} for n in (20, 40, 60)]
OVERFLOWN = {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.0}


@pytest.mark.parametrize(
    ("records", "lines", "names"),
    [
        # lines in the three panels: loss (each step, their mean, evaluation), learning rate, gradient norm
        (STEPS + SCORED, (60, 60, 3, 60, 60), ["training step", "mean of the steps around", "evaluation"]),
        (STEPS[:5], (5, 5, 5), ["training step"]),
        ([{"step": 1, "loss": 2.0}], (1, 0, 0), ["training step"]),
        ([OVERFLOWN, *STEPS[1:3], SCORED[0]], (2, 1, 3, 2), ["training step", "evaluation"]),
        ([OVERFLOWN], (0, 1, 0), ["training step"]),
    ],
    ids=["all", "no evaluation", "one step", "an overflow", "overflows alone"],
)
def test_the_plots_lines(tmp_path, monkeypatch, records, lines, names):
    """Three panels over one x axis, each with as many points as there are numbers."""
    from matplotlib.figure import Figure

    figures = []
    write = Figure.savefig

    def noting(figure, *args, **kwargs):
        figures.append(figure)
        write(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noting)
    plot_loss(records, tmp_path / "loss.png")
    monkeypatch.undo()
    (figure,) = figures
    panels = figure.axes
    found = [line for axes in panels for line in axes.get_lines()]
    assert [len(line.get_xdata()) for line in found] == list(lines)
    assert [axes.get_ylabel() for axes in panels] == ["loss (nats per label token)", "learning rate", "gradient norm"]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == names
    assert len({axes.get_xlim() for axes in panels}) == 1
    values = [r["loss"] for r in records if r.get("loss") is not None]
    assert list(found[0].get_ydata()) == values
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
