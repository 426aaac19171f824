"""Killed at any moment, a run goes on from its last checkpoint and ends as if nothing had happened.

``LORA_MS_KILLS=20`` kills as many runs once each; by default one run is killed three times.
"""

import json
import os
import random
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_ms import saving

STEPS = 200
TIMES = ("tokens_per_second", "step_time_s", "wait_share", "peak_memory_mb", "eval_time_s")


@pytest.fixture(scope="module")
def command(root, reference, golden, python, tmp_path_factory) -> list[str]:
    """Dropout, noise, four micro-batches a step, a mixture of two files, packed, evaluated and saved often."""
    folder, values = tmp_path_factory.mktemp("data"), golden("trace_qwen2")
    parts = zip(
        values["input_ids"].reshape(-1, 16), values["labels"].reshape(-1, 16), values["lengths"].ravel(), strict=True
    )
    rows = [json.dumps({"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist()}) for ids, labels, n in parts]
    for name, chosen in (("a", rows[:20]), ("b", rows[20:40]), ("held_out", rows[40:48])):
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
    mix = [
        {"dataset_dir": str(folder / "a.jsonl"), "weight": 9, "weight_end": 7},
        {"dataset_dir": str(folder / "b.jsonl"), "weight": 1},
    ]
    return [
        python, "run_mindformer.py", "--config", str(root / "configs/tiny/lora_tiny.yaml"), "--run_mode", "finetune",
        "--load_checkpoint", str(reference / "models" / "qwen2"), "--seq_length", "16", "--max_steps", str(STEPS),
        "--batch_size", "2", "--gradient_accumulation_steps", "4", "--do_eval", "True",
        "--eval_dataset_dir", str(folder / "held_out.jsonl"), "--eval_step_interval", "10",
        "--options", f"train_dataset.mix={json.dumps(mix)}", "pet_config.lora_dropout=0.1",
        "pet_config.neftune_noise_alpha=5", "eval_dataset.batch_size=8",
        "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 4, keep_checkpoint_max: 2}]",
    ]  # fmt: skip


def start(command: list[str], out, root, env, *more: str) -> subprocess.Popen:
    words = [*command, "--output_dir", str(out), *more]
    return subprocess.Popen(words, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child: subprocess.Popen) -> None:
    printed = child.communicate()[0]
    assert child.returncode == 0, printed


def kill(child: subprocess.Popen, step: int, delay: float) -> None:
    """``delay`` seconds after the line of ``step`` or a later one."""
    for line in child.stdout:
        words = line.split()
        if words[:1] == ["step"] and int(words[1].split("/")[0]) >= step:
            break
    else:
        pytest.fail("the run ended before it was killed")
    time.sleep(delay)
    child.kill()
    child.communicate()


def records(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_all_whole(out) -> None:
    """Every file that bears its final name can be read."""
    for file in out.rglob("*"):
        if saving.is_unfinished(file.relative_to(out)):
            continue
        if file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            assert json.loads(file.read_text())


def newest(out) -> int:
    return max((int(path.name.split("_")[1]) for path in (out / "checkpoints").glob("step_*[0-9]")), default=0)


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(command, root, python_env, tmp_path):
    straight = tmp_path / "straight"
    finish(start(command, straight, root, python_env))
    wanted, adapter = records(straight), load_file(straight / "adapter" / "adapter_model.safetensors")
    assert [record["step"] for record in wanted if "loss" in record] == list(range(1, STEPS + 1))
    kills = os.environ.get("LORA_MS_KILLS")
    rng = random.Random(kills)
    plans = [[rng.randrange(5, STEPS - 5)] for _ in range(int(kills))] if kills else [[30, 90, 150]]
    for number, steps in enumerate(plans):
        out = tmp_path / f"killed_{number}"
        for step in steps:
            more = ("--resume_training", "True") if out.exists() else ()
            kill(start(command, out, root, python_env, *more), step, rng.random() * 0.2)
            assert_all_whole(out)
            assert step - 4 <= newest(out) < STEPS
        finish(start(command, out, root, python_env, "--resume_training", "True"))
        assert records(out) == wanted
        names = sorted(str(path.relative_to(straight)) for path in straight.rglob("*"))
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == names
        found = load_file(out / "adapter" / "adapter_model.safetensors")
        best = [load_file(run / "best" / "adapter_model.safetensors") for run in (out, straight)]
        for name, value in adapter.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name}, killed after {steps}")
            np.testing.assert_array_equal(*(tensors[name] for tensors in best), err_msg=f"best {name}")
        print(f"killed after step {steps}: the same end")
