"""Kills runs at random moments and lets them go on: ``python tests/saving/kills.py [RUNS] [SEED]``

A run of the reference Qwen2 (30 steps with dropout, a checkpoint after every second; every fifth run is evaluated) is
killed by SIGKILL up to 0.1 s after a random record of its metrics, every fourth one twice; then it goes on to its end.
Every folder with a final name must be whole at any time, and adapter, best weights and records those of a run that was
never killed, bit for bit. The exit status is the number of runs that were not.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 30
TIMES = ("tokens_per_second", "step_time_s", "wait_share", "peak_memory_mb", "eval_time_s")


def words(folder: Path, out: Path, evaluated: bool) -> list[str]:
    return [
        "finetune", "--load_checkpoint", str(ROOT / "tests/reference/models/qwen2"), "--seq_length", "16",
        "--train_dataset_dir", str(folder / "rows.jsonl"), "--eval_dataset_dir", str(folder / "rows.jsonl"),
        "--output_dir", str(out), "--do_eval", str(evaluated), "--eval_step_interval", "6", "--max_steps", str(STEPS),
        "--batch_size", "4", "--callbacks.1.save_checkpoint_steps", "2", "--callbacks.1.keep_checkpoint_max", "2",
        "--options", "pet_config.lora_dropout=0.1",
    ]  # fmt: skip


def start(arguments: list[str], log: Path) -> int:
    """The process of a run. It is a fork, so that MindSpore is not imported again."""
    child = os.fork()
    if child:
        return child
    from lora_ms.cli.main import main

    screen = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    status = 1
    try:
        status = main(arguments)
    finally:
        os._exit(status)


def finish(process: int, log: Path) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        raise RuntimeError(f"status {status}: {log.read_text()[-500:]}")


def has_ended(process: int, log: Path) -> bool:
    """Whether the run has come to its end; raises where it has failed."""
    ended, status = os.waitpid(process, os.WNOHANG)
    if status:
        raise RuntimeError(f"status {os.waitstatus_to_exitcode(status)}: {log.read_text()[-500:]}")
    return bool(ended)


def kill_within(process: int, log: Path, seen: int, out: Path, record: int, pause: float) -> None:
    """Kills a run ``pause`` seconds after this record, if it has not come to its end before.

    seen: characters of the log that are of earlier processes.
    """
    while not log.exists() or "\nstep " not in log.read_text()[seen:]:
        if has_ended(process, log):  # it was killed between its last checkpoint and its end: no step is left
            return
        time.sleep(0.005)
    while records_so_far(out) < record:
        if has_ended(process, log):
            return
        time.sleep(0.001)
    time.sleep(pause)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def results(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.glob("*/adapter_model.safetensors"))}


def check_whole(out: Path) -> int:
    """The number of finished folders; raises where one is not whole."""
    from lora_ms import saving
    from lora_ms.train import checkpoint

    checkpoint.check_foreign(out)
    folders = [
        *checkpoint.list_checkpoints(out),
        *(out / name for name in ("adapter", "best") if (out / name).is_dir()),
    ]
    for folder in folders:
        saving.verify(folder)
    return len(folders)


def main(runs: int, seed: int) -> int:
    import lora_ms.recipes.native  # noqa: F401

    dice = random.Random(seed)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [[dice.randrange(3, 128) for _ in range(dice.randrange(5, 16))] for _ in range(32)]
        (folder / "rows.jsonl").write_text("".join(json.dumps({"input_ids": r, "labels": r}) + "\n" for r in rows))
        straight = {evaluated: folder / f"straight_{evaluated}" for evaluated in (False, True)}
        for evaluated, out in straight.items():
            finish(start(words(folder, out, evaluated), folder / "log"), folder / "log")
        for number in range(runs):
            evaluated = number % 5 == 0
            wanted = results(straight[evaluated]), records(straight[evaluated])
            out = folder / f"run_{number}"
            log = folder / f"log_{number}"
            moments = []
            try:
                for _ in range(2 if number % 4 == 3 else 1):
                    resume = ["--resume_training", "True"] if list(out.glob("checkpoints/step_*")) else []
                    seen = len(log.read_text()) if log.exists() else 0
                    process = start([*words(folder, out, evaluated), *resume], log)
                    kill_within(process, log, seen, out, dice.randrange(1, STEPS), dice.random() * 0.1)
                    check_whole(out)
                    moments.append(records_so_far(out))
                resume = ["--resume_training", "True"] if list(out.glob("checkpoints/step_*")) else []
                finish(start([*words(folder, out, evaluated), *resume], log), log)
                check_whole(out)
                same = (results(out), records(out)) == wanted
                fault = "" if same else "another end"
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            failed += bool(fault)
            print(f"run {number}: killed after record {moments}: {fault or 'the same end'}", flush=True)
    print(f"{runs - failed} of {runs} runs ended as if they had not been killed")
    return failed


def records_so_far(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n")


if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 50, int(sys.argv[2]) if sys.argv[2:] else 0))
