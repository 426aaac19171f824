"""What a run shows and leaves behind: its progress, ``metrics.jsonl`` and ``loss.png``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from lora_ms import storage
from lora_ms.errors import WriteError
from lora_ms.train.callbacks import EvaluationRecord, RunState, StepRecord, TrainerCallback

METRICS = "metrics.jsonl"


class Metrics:
    """``metrics.jsonl``: one record a line, in order; the lines after ``start`` of a resumed run are dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        self.full = False  # whether the disk is, and the user knows
        kept = [r for r in read_metrics(path) if r["step"] <= start] if start and path.is_file() else []
        with storage.whole(path) as part:
            part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        # a line at a time, so that a stopped run has its records
        self.stream = open(path, "a", buffering=1, encoding="utf-8")

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        """Appends one record; on a full disk, says so once and goes on."""
        try:
            self.stream.write(json.dumps(fields_of(record), ensure_ascii=False) + "\n")
        except OSError as error:
            if not self.full:
                print(f"warning: cannot write {self.path}: {error.strerror}; records from here on may be missing")
            self.full = True

    def close(self) -> None:
        """No more records."""
        try:
            self.stream.close()
        except OSError:  # the same full disk
            pass


def fields_of(record: StepRecord | EvaluationRecord) -> dict:
    """What ``metrics.jsonl`` holds of a record: each term of the loss stands under its own name."""
    found = asdict(record)
    terms = found.pop("terms", {})
    return {**found, **terms}


def read_metrics(path: Path) -> list[dict]:
    """Records of a ``metrics.jsonl``; the last line of a killed run may be cut, and is left out then."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


class Progress:
    """A bar with loss, rate and time left on a terminal; a line per logged step elsewhere."""

    def __init__(self, start: int, total: int):
        self.total = total
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{n_fmt}/{total_fmt} |{bar}| {desc} [{elapsed}<{remaining}]"
            self.bar = tqdm(initial=start, total=total, bar_format=layout, dynamic_ncols=True)

    def show(self, record: StepRecord, logged: bool) -> None:
        """Shows a step; ``logged``: where there is no bar, it is among those to print."""
        loss = "overflow" if record.loss is None else f"{record.loss:.4f}"
        numbers = f"loss {loss}  {record.tokens_per_second:,.0f} tok/s"
        if self.bar is not None:
            self.bar.set_description_str(numbers, refresh=False)
            self.bar.update(record.step - self.bar.n)
        elif logged:
            norm = "overflow" if record.grad_norm is None else f"{record.grad_norm:.2f}"
            rest = f"lr {record.learning_rate:.2e}  norm {norm}"
            print(f"{self.step(record.step)}  epoch {record.epoch:.2f}  {numbers}  {rest}", flush=True)

    def step(self, step: int) -> str:
        """``step  7/100``."""
        return f"step {step:{len(str(self.total))}}/{self.total}"

    def lines(self, *lines: str) -> None:
        """Prints above the bar."""
        if self.bar is None:
            print(*lines, sep="\n", flush=True)
        else:
            self.bar.write("\n".join(lines))

    def evaluated(self, e: EvaluationRecord) -> None:
        """Shows an evaluation."""
        scores = f"eval loss {e.eval_loss:.4f}  perplexity {e.eval_perplexity:.2f}  accuracy {e.eval_accuracy:.1%}"
        answers = [
            f"  {sign} {' '.join(text.split())}"
            for sample in e.samples
            for sign, text in ((">", sample["prompt"]), (" ", sample["answer"]))
        ]
        self.lines(f"{self.step(e.step)}  {scores}{'  (best so far)' if e.best else ''}", *answers)

    def close(self) -> None:
        """Leaves the terminal on a new line."""
        if self.bar is not None:
            self.bar.close()


class Reporter(TrainerCallback):
    """Progress and metrics of a run, on the main rank."""

    def __init__(self, logging_steps: int):
        self.logging_steps = logging_steps

    def on_train_begin(self, state: RunState) -> None:
        if state.is_main:
            self.metrics = Metrics(state.output_dir / METRICS, state.step)
            self.progress = Progress(state.step, state.total_steps)

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

    def on_notice(self, state: RunState, text: str) -> None:
        if state.is_main:
            self.progress.lines(text)

    def on_train_end(self, state: RunState) -> None:
        if state.is_main:
            self.progress.close()
            self.metrics.close()
            records = read_metrics(state.output_dir / METRICS)
            if any("loss" in r for r in records):
                try:
                    plot_loss(records, state.output_dir / "loss.png")
                except WriteError as error:
                    print(f"warning: {error}")


def _mean_around(values: list[float]) -> list[float]:
    reach = len(values) // 40  # to either side
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def plot_loss(records: list[dict], path: Path) -> None:
    """Draws loss, learning rate and gradient norm over the steps of a run into a PNG.

    The loss is that of every logged step, with all its terms, the mean of those around it, and that of the evaluations.
    What overflowed is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    def draw(axes, name: str, **style) -> None:
        found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        steps = [step for step, _ in found]
        values = [value for _, value in found]
        axes.plot(steps, values, marker="." if len(steps) < 50 else None, **style)
        if name == "loss" and len(steps) > 40:
            axes.plot(steps, _mean_around(values), color="#1f4e79", linewidth=2, label="mean of the steps around")

    figure, (loss, rate, norm) = pyplot.subplots(
        3, sharex=True, figsize=(7, 7), dpi=120, height_ratios=(3, 1, 1), layout="constrained"
    )
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
    with storage.whole(path) as part:
        figure.savefig(part, format="png")
    pyplot.close(figure)
