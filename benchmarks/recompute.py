"""What recomputation saves and costs: the activation pool's peak and the time of a training step, on and off.

Of each figure the lowest of all rounds is printed.

python benchmarks/recompute.py --steps 15
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parser, write_model


def run(args: argparse.Namespace, folder: Path, more: list[str]) -> dict[str, float]:
    """One side of ``train_step.py``, with the pool's peak in MB."""
    here = Path(__file__).resolve().parent
    sizes = [f"--{name}={getattr(args, name)}" for name in ("layers", "hidden", "heads", "ffn", "vocab")]
    sizes += [f"--{name}={getattr(args, name)}" for name in ("batch", "seq", "steps")]
    command = [sys.executable, str(here / "train_step.py"), *sizes, *more, "--side", "ours", "--model", str(folder)]
    env = {**os.environ, "GLOG_v": "3", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}
    env |= {"MS_DEV_RUNTIME_CONF": "memory_statistics:true", "LORA_MS_START": str(time.time())}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=folder)
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    pool = max(int(found) for found in re.findall(r"peak used mem:(\d+)M", done.stdout + done.stderr))
    return {"pool": pool, "peak": figures["peak_mb"], "median": figures["step_ms"], "best": figures["best_ms"]}


def main() -> None:
    arguments = parser(__doc__)
    for name, value in {"batch": 4, "seq": 256, "steps": 15}.items():
        arguments.add_argument(f"--{name}", type=int, default=value)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(args, folder)
        rounds = [(run(args, folder, []), run(args, folder, ["--recompute"])) for _ in range(args.rounds)]
    off, on = ({key: min(found[key] for found in side) for key in side[0]} for side in zip(*rounds, strict=True))
    print(f"{'':28}{'off':>10}{'on':>10}{'ratio':>8}")
    titles = {
        "pool": "activation pool, MB",
        "peak": "process, MB",
        "median": "step, median, ms",
        "best": "step, best, ms",
    }
    for key, title in titles.items():
        print(f"{title:28}{off[key]:10.0f}{on[key]:10.0f}{on[key] / off[key]:8.2f}")


if __name__ == "__main__":
    main()
