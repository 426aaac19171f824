"""What a run shows and leaves behind: its progress, ``metrics.jsonl`` and ``loss.png``."""

import importlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ms import saving
from lora_ms.errors import WriteError
from lora_ms.text import counted
from lora_ms.train.callbacks import EvaluationRecord, RunState, StepRecord, TrainerCallback
from lora_ms.train.notebook import in_notebook, progress_bar

METRICS = "metrics.jsonl"
PLOTTED = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
LARGEST = 1e300  # of these numbers


class Metrics:
    """``metrics.jsonl``: one record a line, in order; the lines after ``start`` of a resumed run are dropped.

    What cannot be written is left out: the user is told once, and the run goes on.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        self.missing = False  # whether records are missing, and the user knows
        kept, odd = read_metrics(path) if start and path.is_file() else ([], 0)
        if odd:
            print(f"warning: {path}: {counted(odd, 'line')} of other content than records left out")
        text = "".join(json.dumps(record) + "\n" for record in kept if record["step"] <= start)
        with self._told(), saving.new_file(path) as part:
            part.write_text(text, encoding="utf-8")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, WriteError) as error:
            if not self.missing:
                reason = error.strerror if isinstance(error, OSError) else error
                print(f"warning: cannot write {self.path}: {reason}; records from here on may be missing")
            self.missing = True

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        """Appends one record; it is in the file at once, so that a stopped run has its records."""
        with self._told():
            saving.append(self.path, json.dumps(fields_of(record), ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Brings the records to disk."""
        with self._told():
            saving.sync(self.path)


def fields_of(record: StepRecord | EvaluationRecord) -> dict:
    """What ``metrics.jsonl`` holds of a record: each term of the loss stands under its own name."""
    idle = ("eval_perplexity", "eval_accuracy")  # of preferences
    found = {name: value for name, value in asdict(record).items() if value is not None or name not in idle}
    named = [found.pop("terms", {}), found.pop("metrics", {})]
    return {**found, **named[0], **named[1]}


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """Records of a ``metrics.jsonl``, and how many of its lines are none; a last one that was cut is left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return [], 0
    records = [record for line in lines if (record := _record(line)) is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    numbers = [found[name] for name in PLOTTED if found.get(name) is not None]
    return found if all(isinstance(number, int | float) and abs(number) <= LARGEST for number in numbers) else None


class Progress:
    """A bar with loss, rate and time left on a terminal and in a notebook; a line per logged step elsewhere."""

    def __init__(self, start: int, total: int):
        self.total = total
        self.bar = None
        if sys.stderr.isatty() or in_notebook():
            layout = "{n_fmt}/{total_fmt} |{bar}| {desc} [{elapsed}<{remaining}]"
            self.bar = progress_bar(initial=start, total=total, bar_format=layout, dynamic_ncols=True)

    def show(self, record: StepRecord, logged: bool) -> None:
        """Shows a step; ``logged``: where there is no bar, it is among those to print."""
        loss = "overflow" if record.loss is None else f"{record.loss:.4f}"
        numbers = f"loss {loss}  {record.tokens_per_second:,.0f} tok/s"
        if self.bar is not None:
            with self._on_terminal() as bar:
                bar.set_description_str(numbers, refresh=False)
                bar.update(record.step - bar.n)
        elif logged:
            norm = "overflow" if record.grad_norm is None else f"{record.grad_norm:.2f}"
            rest = f"lr {record.learning_rate:.2e}  norm {norm}"
            rest = "  ".join([rest, *(f"{name} {value:.2f}" for name, value in record.metrics.items())])
            print(f"{self.step(record.step)}  epoch {record.epoch:.2f}  {numbers}  {rest}", flush=True)

    def step(self, step: int) -> str:
        """``step  7/100``."""
        return f"step {step:{len(str(self.total))}}/{self.total}"

    def lines(self, *lines: str) -> None:
        """Prints above the bar."""
        if self.bar is None:
            print(*lines, sep="\n", flush=True)
        else:
            with self._on_terminal() as bar:
                bar.write("\n".join(lines))

    def evaluated(self, e: EvaluationRecord) -> None:
        """Shows an evaluation."""
        scores = [f"eval loss {e.eval_loss:.4f}"]
        if e.eval_perplexity is not None and e.eval_accuracy is not None:
            scores += [f"perplexity {e.eval_perplexity:.2f}", f"accuracy {e.eval_accuracy:.1%}"]
        scores += [f"{name.removeprefix('eval_')} {value:.2f}" for name, value in e.metrics.items()]
        answers = [
            f"  {sign} {' '.join(text.split())}"
            for sample in e.samples
            for sign, text in ((">", sample["prompt"]), (" ", sample["answer"]))
        ]
        self.lines("  ".join([self.step(e.step), *scores, *(["(best so far)"] if e.best else [])]), *answers)

    def close(self) -> None:
        """Leaves the terminal on a new line."""
        if self.bar is not None:
            with self._on_terminal() as bar:
                bar.close()

    @contextmanager
    def _on_terminal(self) -> Iterator[Any]:
        """The bar; where the terminal was closed, there is none from here on."""
        try:
            yield self.bar
        except OSError:
            self.bar = None


class Reporter(TrainerCallback):
    """Progress and metrics of a run, on the main rank."""

    def __init__(self, logging_steps: int):
        self.logging_steps = logging_steps

    def on_train_begin(self, state: RunState) -> None:
        if state.is_main:
            self.metrics = Metrics(state.output_dir / METRICS, state.step)
            self.progress = Progress(state.step, state.total_steps)
            # a third of a second, which the first steps' operators leave to another thread
            threading.Thread(target=_import_plotting, daemon=True).start()

    def on_step_end(self, state: RunState, record: StepRecord) -> None:
        if state.is_main:
            logged = record.step % self.logging_steps == 0 or record.step == state.total_steps
            self.progress.show(record, logged)
            if logged:
                self.metrics.write(record)

    def on_evaluate(self, state: RunState, evaluation: EvaluationRecord) -> None:
        if state.is_main:
            self.progress.evaluated(evaluation)
            self.metrics.write(evaluation)

    def on_save(self, state: RunState, path: Path) -> None:
        self.metrics.sync()  # a run that goes on from there has the records up to it

    def on_notice(self, state: RunState, text: str) -> None:
        if state.is_main:
            self.progress.lines(text)

    def on_train_end(self, state: RunState) -> None:
        if state.is_main:
            self.progress.close()
            self.metrics.sync()
            records, _ = read_metrics(state.output_dir / METRICS)
            if any("loss" in r for r in records):
                try:
                    plot_loss(records, state.output_dir / "loss.png")
                except WriteError as error:
                    print(f"warning: {error}")


def _import_plotting() -> None:
    with suppress(Exception):  # ``plot_loss`` tells
        importlib.import_module("matplotlib.figure")


def _mean_around(values: list[float]) -> list[float]:
    reach = len(values) // 40  # to either side
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def plot_loss(records: list[dict], path: Path) -> None:
    """Draws loss, learning rate and gradient norm over the steps of a run into a PNG.

    The loss is that of every logged step, with all its terms, the mean of those around it, and that of the evaluations.
    What overflowed is left out.
    """
    from matplotlib.figure import Figure  # without pyplot, whose state is the user's, in a notebook
    from matplotlib.ticker import MaxNLocator

    def draw(axes, name: str, **style) -> None:
        found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        steps = [step for step, _ in found]
        values = [value for _, value in found]
        axes.plot(steps, values, marker="." if len(steps) < 50 else None, **style)
        if name == "loss" and len(steps) > 40:
            axes.plot(steps, _mean_around(values), color="#1f4e79", linewidth=2, label="mean of the steps around")

    figure = Figure(figsize=(7, 7), dpi=120, layout="constrained")
    loss, rate, norm = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    draw(loss, "loss", color="#9bb8d3", linewidth=1, label="training step")
    if any("eval_loss" in r for r in records):
        draw(loss, "eval_loss", color="#c0504d", linewidth=2, label="evaluation")
    loss.legend(frameon=False)
    draw(rate, "learning_rate", color="#1f4e79", linewidth=1.5)
    draw(norm, "grad_norm", color="#1f4e79", linewidth=1)
    labels = ("loss (nats per label token)", "learning rate", "gradient norm")
    for axes, label in zip((loss, rate, norm), labels, strict=True):
        axes.set(ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    norm.set_xlabel("optimiser step")
    norm.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    with saving.new_file(path) as part:
        figure.savefig(part, format="png")
