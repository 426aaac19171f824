"""What a run shows and leaves behind: progress, ``metrics.jsonl`` and ``loss.png``."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_ms import storage

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Record:
    """One optimiser step."""

    step: int  # from 1
    epoch: float
    loss: float  # nats per label token
    grad_norm: float | None  # before clipping; None where it overflowed in float16 and the step was left out
    learning_rate: float
    tokens: int  # without padding, on this rank
    label_tokens: int  # on all ranks
    tokens_per_second: float
    step_time_s: float
    wait_share: float  # of the step's time, spent waiting for data
    peak_memory_mb: float


class Metrics:
    """``metrics.jsonl``: one record a line, in order; the lines after ``start`` of a resumed run are dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        kept = [r for r in read_metrics(path) if r["step"] <= start] if start and path.is_file() else []
        with storage.whole(path) as part:
            part.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self.stream = open(path, "a", buffering=1)  # a line at a time, so that a stopped run has its records

    def write(self, record: Record) -> None:
        """Appends one record."""
        self.stream.write(json.dumps(asdict(record)) + "\n")

    def close(self) -> None:
        """No more records."""
        self.stream.close()


def read_metrics(path: Path) -> list[dict]:
    """Records of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Progress:
    """A bar with loss, rate and time left on a terminal; a line per logged step elsewhere."""

    def __init__(self, start: int, total: int):
        self.total, self.bar = total, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{n_fmt}/{total_fmt} |{bar}| {desc} [{elapsed}<{remaining}]"
            self.bar = tqdm(initial=start, total=total, bar_format=layout, dynamic_ncols=True)

    def show(self, record: Record, logged: bool) -> None:
        """One step is done; ``logged``: it is among those to print where there is no bar."""
        numbers = f"loss {record.loss:.4f}  {record.tokens_per_second:,.0f} tok/s"
        if self.bar is not None:
            self.bar.set_description_str(numbers, refresh=False)
            self.bar.update(record.step - self.bar.n)
        elif logged:
            width = len(str(self.total))
            norm = "overflow" if record.grad_norm is None else f"{record.grad_norm:.2f}"
            rest = f"lr {record.learning_rate:.2e}  norm {norm}"
            print(f"step {record.step:{width}}/{self.total}  epoch {record.epoch:.2f}  {numbers}  {rest}", flush=True)

    def close(self) -> None:
        """Leaves the terminal on a new line."""
        if self.bar is not None:
            self.bar.close()


class Reporter:
    """Progress and metrics of a run; does nothing where ``active`` is False (all ranks but the first)."""

    def __init__(self, output_dir: Path, start: int, total: int, logging_steps: int, active: bool):
        self.output_dir, self.total, self.logging_steps = output_dir, total, logging_steps
        self.parts = (Metrics(output_dir / METRICS, start), Progress(start, total)) if active else None

    def show(self, record: Record) -> None:
        """One step is done."""
        if self.parts is not None:
            metrics, progress = self.parts
            logged = record.step % self.logging_steps == 0 or record.step == self.total
            progress.show(record, logged)
            if logged:
                metrics.write(record)

    def close(self) -> None:
        """The run has ended; draws the plot."""
        if self.parts is not None:
            for part in self.parts:
                part.close()
            records = read_metrics(self.output_dir / METRICS)
            if records:
                plot_loss(records, self.output_dir / "loss.png")


def plot_loss(records: list[dict], path: Path) -> None:
    """Draws the loss of every logged step, and the mean of the steps around it, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    reach = len(losses) // 40  # steps to either side that the mean takes in
    around = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    smooth = [sum(part) / len(part) for part in around]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    axes.plot(steps, losses, color="#9bb8d3", linewidth=1, label="step", marker="." if len(steps) < 3 else None)
    axes.plot(steps, smooth, color="#1f4e79", linewidth=2, label="mean of the steps around")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per label token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with storage.whole(path) as part:
        figure.savefig(part, format="png")
    pyplot.close(figure)
