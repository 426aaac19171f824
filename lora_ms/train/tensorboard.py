"""The numbers of a run for TensorBoard and for MindSpore's own viewer."""

import time
from pathlib import Path

import mindspore as ms
from mindspore import SummaryRecord, Tensor
from tqdm import tqdm

from lora_ms.errors import LoraMsError
from lora_ms.train.callbacks import EvaluationRecord, RunState, StepRecord, TrainerCallback

# of a StepRecord, besides the terms of the loss
LOGGED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mb")
SCORED = ("eval_loss", "eval_accuracy", "eval_perplexity")  # of an EvaluationRecord


class Scalars(TrainerCallback):
    """Collects, on the main rank, the numbers of every ``every``-th step, of the last step and of all evaluations.

    Numbers that overflowed in float16 are left out.
    """

    def __init__(self, folder: Path, every: int):
        self.folder = folder
        self.every = every

    def on_step_end(self, state: RunState, record: StepRecord) -> None:
        if state.is_main and (record.step % self.every == 0 or record.step == state.total_steps):
            found = {name: getattr(record, name) for name in LOGGED} | record.terms | record.metrics
            self.take(record.step, {f"train/{name}": value for name, value in found.items() if value is not None})

    def on_evaluate(self, state: RunState, evaluation: EvaluationRecord) -> None:
        if state.is_main:
            found = {name: getattr(evaluation, name) for name in SCORED} | evaluation.metrics
            values = {f"eval/{name.removeprefix('eval_')}": value for name, value in found.items() if value is not None}
            self.take(evaluation.step, values)

    def take(self, step: int, values: dict[str, float]) -> None:
        """Writes or keeps numbers, by tag, of step ``step``."""
        raise NotImplementedError


class TensorBoard(Scalars):
    """TensorBoard's event file in ``folder``, on disk step by step.

    It tells TensorBoard to discard what earlier files in the folder hold from its first step on, so that a resumed
    run, or a new one, shows one line. Written without tensorboardX's queue, which blocks once a disk is full.
    """

    def on_train_begin(self, state: RunState) -> None:
        self.full = False
        if not state.is_main:
            return
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writer = EventsWriter(str(self.folder / "events"), f".{state.step}")
        except OSError as error:
            raise LoraMsError(f"report_to tensorboard: cannot write {self.folder}: {error.strerror}") from None
        self._write(state.step + 1, session_log=SessionLog(status=SessionLog.START))

    def take(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step, summary=Summary(value=scalars))

    def _write(self, step: int, **event) -> None:
        from tensorboardX.proto.event_pb2 import Event

        try:
            self.writer.write_event(Event(wall_time=time.time(), step=step, **event))
            self.writer.flush()
        except OSError as error:
            if not self.full:
                tqdm.write(f"warning: cannot write {self.folder}: {error.strerror}; numbers there may be missing")
            self.full = True

    def on_train_end(self, state: RunState) -> None:
        if state.is_main:
            try:
                self.writer.close()
            except OSError:  # the same full disk
                pass


class Summaries(Scalars):
    """MindSpore's summary file in ``folder``, written when the run ends.

    Not before: while a ``SummaryRecord`` is open, its process polls without a pause, which takes most of a core.
    """

    def on_train_begin(self, state: RunState) -> None:
        self.taken: list[tuple[int, dict[str, float]]] = []

    def take(self, step: int, values: dict[str, float]) -> None:
        self.taken.append((step, values))

    def on_train_end(self, state: RunState) -> None:
        if not self.taken:
            return
        try:
            with SummaryRecord(str(self.folder)) as record:
                for step, values in self.taken:
                    for tag, value in values.items():
                        record.add_value("scalar", tag, Tensor(value, ms.float32))
                    record.record(step)
        except (OSError, RuntimeError) as error:
            tqdm.write(f"warning: cannot write {self.folder}: {error}")
