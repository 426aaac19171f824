"""How long the steps of a run will take, by how long those of the last run with the same model took."""

from collections.abc import Callable
from statistics import median

from lora_ms.train.callbacks import RunState, StepRecord, TrainerCallback

LEAST = 3  # steps, the first of which compiles, that tell how long one takes


class StepTimes(TrainerCallback):
    """Hands the seconds of a usual step to ``remember`` as the run ends, on the main rank."""

    def __init__(self, remember: Callable[[float], None]):
        self.remember = remember
        self.seconds: list[float] = []

    def on_step_end(self, state: RunState, record: StepRecord) -> None:
        self.seconds.append(record.step_time_s)

    def on_train_end(self, state: RunState) -> None:
        if state.is_main and len(self.seconds) >= LEAST:
            self.remember(median(self.seconds[1:]))


def duration(seconds: float) -> str:
    """``40 s``, ``7 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
