"""Does a long run stay as it began? Memory and step time of many steps of a tiny model, evaluated and saved throughout.

    python benchmarks/long_run.py --steps 20000

Prints, for every thousand steps, the memory of the process and the median time of a step, then how far both have moved
since the first thousand, and the size of what the run has written.
"""

import argparse
import gc
import os
import statistics
import tempfile
from pathlib import Path

EVERY = 1000  # steps of a line


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def size_kb(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations, and between checkpoints")
    args = parser.parse_args()

    import numpy as np

    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.data.example import TokenRow
    from lora_ms.data.loader import DataPlan
    from lora_ms.models.decoder import DecoderConfig
    from lora_ms.models.hub import new_model
    from lora_ms.recipes.data import plan_rows
    from lora_ms.recipes.outputs import weights_of
    from lora_ms.recipes.train import NativeRun, train
    from lora_ms.runtime.device import setup
    from lora_ms.train.callbacks import TrainerCallback
    from lora_ms.train.evaluation import Evaluator
    from lora_ms.train.settings import TrainSettings

    class Watch(TrainerCallback):
        """A line for every thousand steps."""

        def __init__(self):
            self.memory, self.times, self.now = [], [], []

        def on_step_end(self, state, record):
            self.now.append(record.step_time_s)
            if record.step % EVERY == 0:
                gc.collect()
                self.memory.append(resident_mb())
                self.times.append(statistics.median(self.now) * 1e3)
                self.now = []
                print(f"step {record.step:6}  {self.memory[-1]:8.1f} MB  {self.times[-1]:7.2f} ms a step", flush=True)

    import mindspore as ms

    here, _ = setup("CPU", seed=1)
    sizes = DecoderConfig(128, 64, 176, 2, 4, 2, 16, 1e-5, 1e4)
    model = new_model(sizes, ms.float32, 1, here.operators)
    config = LoraConfig(4, 8.0, 0.1, "all-linear")
    inject(model, config)
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 128, int(n), dtype=np.int32) for n in rng.integers(5, 16, 320)]
    rows = [TokenRow(f"row {i}", row, row) for i, row in enumerate(ids)]
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            Path(folder), batch_size=8, seq_length=16, max_steps=args.steps, save_steps=args.every,
            keep_checkpoint_max=2, eval_steps=args.every, logging_steps=100,
        )  # fmt: skip
        plan = plan_rows(rows[:256], None, settings, here, 128)
        held_out = DataPlan.build(
            rows[256:], batch_size=8, accumulation=1, epochs=1, seed=0, shuffle=False, pad_id=0, seq_length=16
        )
        evaluator = Evaluator(model, held_out, 128, here)
        weights = weights_of(model, config, None)
        train(NativeRun(model, plan, settings, here, weights, evaluator=evaluator, callbacks=[watch]))
        written = {name: size_kb(Path(folder) / name) for name in sorted(os.listdir(folder))}
    print(f"memory after {args.steps} steps / after {EVERY}: {watch.memory[-1] / watch.memory[0]:.4f}")
    print(f"step time of the last thousand / of the second: {watch.times[-1] / watch.times[1]:.3f}")
    print("written, in KB:", ", ".join(f"{name} {size:.0f}" for name, size in written.items()))


if __name__ == "__main__":
    main()
