"""Several processes, started by scripts/msrun_launcher.sh: their numbers are one process's; one that dies ends all."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_ms import saving

pytestmark = pytest.mark.slow

STEPS = 20
# 45 rows, eight a step: the last step of an epoch has five, and of four ranks some have nothing to do in it
RUN = f"""
runner_config: {{max_steps: {STEPS}}}
lr_schedule: {{type: CosineWithWarmUpLR, learning_rate: 5.e-3, warmup_steps: 2}}
optimizer: {{weight_decay: 0.1}}
callbacks: [{{type: CheckpointMonitor, save_checkpoint_steps: {STEPS // 2}}}]
do_eval: True
model:
  model_config:
    seq_length: 16
    pet_config: {{lora_rank: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: all-linear}}
"""
# run_mindformer.py, where the second process has settings of its own
APART = """
import os, sys
from lora_ms.cli.main import run_mindformer

if os.environ.get("MS_NODE_ID") == "1":
    sys.argv += ["--learning_rate", "7e-3", "--do_eval", "False", "--seed", "4"]
raise SystemExit(run_mindformer())
"""
# lora-ms fisher, then finetune; several processes measure for the comparison alone, and train with one's file
MEASURED = """
import sys
from lora_ms.cli.main import main

words = sys.argv[1:]
more = ["--output", "fisher2.safetensors"] if "--use_parallel" in words else []
raise SystemExit(main(["fisher", *words, *more]) or main(["finetune", *words]))
"""
# 30 rows of a domain, 15 to be kept in mind
HYBRID = """
runner_config: {max_steps: 6, gradient_accumulation_steps: 1}
lr_schedule: {learning_rate: 5.e-3}
train_dataset:
  mix:
    - {dataset_dir: domain.jsonl, weight: 5}
    - {dataset_dir: general.jsonl, weight: 3, role: general}
objectives:
  - {type: ewc, weight: 0.2, lambda: 1.e+5, fisher: fisher.safetensors}
  - {type: contrastive}
  - {type: kl_anchor}
model:
  model_config:
    seq_length: 16
    pet_config: {lora_rank: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: all-linear}
"""
# of each: data-parallel and model-parallel ranks, and what else its command says
LAYOUTS = {
    "dp4": (4, 1, ()),
    "tp2": (1, 2, ()),
    "dp2 tp2": (2, 2, ("--parallel_config.data_parallel", "8")),
}


class Launcher:
    """Fine-tunes the reference Qwen2 (two layers, two key/value heads, a tied head) in ``folder``."""

    def __init__(self, folder: Path, root: Path, python: str, env: dict[str, str], rows: Path):
        self.folder, self.root, self.python = folder, root, python
        self.env = env | {"PATH": f"{Path(python).parent}:{env['PATH']}"}
        (folder / "run.yaml").write_text(RUN)
        self.words = ["--config", "run.yaml", "--load_checkpoint", root / "tests/reference/models/qwen2"]
        self.words += ["--train_dataset_dir", rows, "--eval_dataset_dir", rows]

    def alone(self, name: str, *more: str, program: str = "") -> subprocess.CompletedProcess[str]:
        words = [
            program or self.root / "run_mindformer.py",
            *self.words,
            "--output_dir",
            name,
            "--batch_size",
            "8",
            *more,
        ]
        return self.finish(subprocess.Popen([self.python, *map(str, words)], **self.pipes()))

    def start(
        self, name: str, data_ranks: int, shared: int, *more: str, program: str = "run_mindformer.py"
    ) -> subprocess.Popen[str]:
        words = [program, *self.words, "--output_dir", f"'{name}'", "--batch_size", str(8 // data_ranks)]
        words += ["--use_parallel", "True", "--parallel_config.model_parallel", str(shared), *more]
        with socket.socket() as here:
            here.bind(("127.0.0.1", 0))
            port = here.getsockname()[1]
        settings = (data_ranks * shared, port, f"logs of {name}", "True", 120)
        command = ["bash", self.root / "scripts/msrun_launcher.sh", " ".join(map(str, words)), *settings]
        return subprocess.Popen([*map(str, command)], **self.pipes())

    def pipes(self) -> dict:
        return {"cwd": self.folder, "env": self.env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def finish(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        with process:
            out, err = process.communicate(timeout=200)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def records(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def adapter(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.folder / name / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def launch(tmp_path_factory, root, python, python_env, golden) -> Launcher:
    folder, values = tmp_path_factory.mktemp("ranks"), golden("trace_qwen2")
    ids, labels = values["input_ids"].reshape(-1, 16), values["labels"].reshape(-1, 16)
    rows = [
        {"input_ids": ids[i, :n].tolist(), "labels": labels[i, :n].tolist()}
        for i, n in enumerate(values["lengths"].ravel()[:45].tolist())
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launcher = Launcher(folder, root, python, python_env, folder / "rows.jsonl")
    ran = launcher.alone("one")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return launcher


@pytest.fixture(scope="module")
def finished(launch) -> Callable[[str], str]:
    """Runs a layout, once; returns what it said."""
    said: dict[str, str] = {}

    def run(name: str) -> str:
        if name not in said:
            data_ranks, shared, more = LAYOUTS[name]
            ran = launch.finish(launch.start(name, data_ranks, shared, *more))
            assert ran.returncode == 0, ran.stdout + ran.stderr
            said[name] = ran.stdout
        return said[name]

    return run


def assert_same_run(launch: Launcher, found: str, wanted: str = "one") -> None:
    for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        values = [[record[key] for record in launch.records(name) if key in record] for name in (found, wanted)]
        assert len(values[0]) == len(values[1]) > 0
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5, err_msg=key)
    one, other = launch.adapter(wanted), launch.adapter(found)
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_one_process(launch, finished, name):
    data_ranks, shared, _ = LAYOUTS[name]
    said = finished(name)
    assert len(launch.records("one")) == STEPS + 1
    assert_same_run(launch, name)
    notice = " (parallel_config.data_parallel is 8)" if name == "dp2 tp2" else ""
    assert f"processes: {data_ranks} data-parallel x {shared} model-parallel{notice}\n" in said
    train = "LoRA on 14 modules: 7,424 of 77,632 parameters train"
    assert said.count(train) == 1
    # one process writes, and each has its log
    assert sorted(os.listdir(launch.folder / name)) == sorted(os.listdir(launch.folder / "one"))
    logs = {f"worker_{rank}.log" for rank in range(data_ranks * shared)}
    assert set(os.listdir(launch.folder / f"logs of {name}")) == {"scheduler.log", *logs}


def test_a_run_goes_on_under_another_layout(launch, finished):
    """From a checkpoint of one process on two that share the model, and the other way round."""
    finished("tp2")
    for name, begun in (("two of one", "one"), ("one of two", "tp2")):
        part = launch.folder / name / "checkpoints"
        part.mkdir(parents=True)
        (launch.folder / begun / f"checkpoints/step_{STEPS // 2}").rename(part / f"step_{STEPS // 2}")
    ran = launch.alone("one of two", "--resume_training", "True")
    assert ran.returncode == 0, ran.stderr
    ran = launch.finish(launch.start("two of one", 1, 2, "--resume_training", "True"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in ("one of two", "two of one"):
        losses = [record["loss"] for record in launch.records("one") if "loss" in record]
        assert [record["step"] for record in launch.records(name) if "loss" in record] == list(range(11, 21))
        found = [record["loss"] for record in launch.records(name) if "loss" in record]
        np.testing.assert_allclose(found, losses[STEPS // 2 :], rtol=1e-5)
        for key, value in launch.adapter("one").items():
            np.testing.assert_allclose(launch.adapter(name)[key], value, rtol=0, atol=1e-5, err_msg=key)


def test_layers_with_a_window_among_two_ranks(launch):
    """Each rank has half of the heads, and all see as far as in one process."""
    folder = shutil.copytree(launch.root / "tests/reference/models/qwen2", launch.folder / "windowed")
    hf = json.loads((folder / "config.json").read_text())
    hf |= {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    (folder / "config.json").write_text(json.dumps(hf))
    # a larger eps: else the step of a number whose gradient is near zero is its sign, which rounding decides
    more = ["--load_checkpoint", str(folder), "--runner_config.max_steps", "4", "--optimizer.eps=1e-5"]
    for ran in (launch.alone("windowed one", *more), launch.finish(launch.start("windowed tp2", 1, 2, *more))):
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert_same_run(launch, "windowed tp2", "windowed one")
    first, full = (launch.records(name)[0]["loss"] for name in ("windowed one", "one"))
    assert abs(first - full) > 1e-3


@pytest.fixture
def endless(launch) -> Iterator[Callable[..., tuple[subprocess.Popen[str], list[int]]]]:
    """Starts a run that would go on for hours, and waits for its first step; returns it and its ranks' processes."""
    started = []

    def start(name: str, data_ranks: int, shared: int):
        process = launch.start(name, data_ranks, shared, "--runner_config.max_steps", "100000")
        started.append(process)
        metrics, until = launch.folder / name / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        ranks = []
        for rank in range(data_ranks * shared):
            lines = (launch.folder / f"logs of {name}" / f"worker_{rank}.log").read_text().splitlines()
            ranks += [int(line.split()[-1]) for line in lines if line.startswith(f"rank {rank} is process ")]
        assert len(ranks) == data_ranks * shared
        return process, ranks

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def test_a_killed_rank_ends_the_run(launch, endless, alive):
    process, ranks = endless("killed", 1, 2)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert said.splitlines()[:2] == [
        f"error: rank 1, process {ranks[1]}, was killed (signal 9), by hand or for want of memory; "
        "the others were stopped; the full logs are in logs of killed",
        "--- the last lines of logs of killed/worker_1.log",
    ]
    assert not any(map(alive, ranks))


def test_a_stop_finishes_the_step_and_saves(launch, endless, alive):
    process, ranks = endless("stopped", 1, 2)
    process.terminate()
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "Stopping after the step under way …\n")
    last = max(record["step"] for record in launch.records("stopped"))
    assert (launch.folder / f"stopped/checkpoints/step_{last}/adapter_model.safetensors").is_file()
    assert not any(map(alive, ranks))


def test_ranks_with_other_settings_take_no_step(launch):
    """Nor do they touch an earlier run's checkpoint."""
    kept = launch.folder / "differing/checkpoints/step_1"
    with saving.new_folder(kept) as part:
        (part / "w").write_text("w")
    (launch.folder / "apart.py").write_text(APART)
    ran = launch.finish(launch.start("differing", 2, 1, program="apart.py"))
    assert ran.returncode == 2
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, ran.stderr
    assert re.fullmatch(
        r"error: rank \d, process \d+, ended with status 2; the others were stopped; the full logs are in .*", errors[0]
    )
    assert re.fullmatch(
        "error: the processes of this run were started with different settings: here "
        r"(do_eval True; eval_tokens_crc32 \d+; learning_rate 0\.005|do_eval False; eval_tokens_crc32 None; "
        r"learning_rate 0\.007) and 1 more; give all of them the same YAML and flags",
        errors[1],
    )
    assert "step 1/" not in ran.stdout and not (launch.folder / "differing/metrics.jsonl").exists()
    assert (kept / "w").read_text() == "w"


def test_a_rank_that_fails_shows_its_error(launch):
    ran = launch.finish(launch.start("refused", 1, 2, "--parallel_config.model_parallel", "3"))
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == (
        "error: parallel_config.model_parallel 3 does not divide the model's num_heads 4, n_kv_heads 2, "
        "vocab_size 128: choose a number that does"
    )
    assert not (launch.folder / "refused").exists()


@pytest.mark.parametrize(("data_ranks", "shared"), [(2, 2)])
def test_weights_of_four_bits(launch, data_ranks, shared):
    """Shared out by blocks of 64 numbers, or whole in each process: the numbers of one process."""
    import dataclasses

    import mindspore as ms

    from lora_ms.models.hub import new_model, read_config, save_directory

    sizes = read_config(launch.root / "tests/reference/models/qwen2")[0]
    wider = dataclasses.replace(sizes, hidden_size=128, head_dim=32, intermediate_size=256)
    if not (launch.folder / "wider").exists():
        save_directory(new_model(wider, ms.float32, seed=2), launch.folder / "wider")
    words = ["--load_checkpoint", "wider", "--quantize", "nf4-double", "--max_steps", "4", "--do_eval", "False"]
    one, several = f"four bits {shared} alone", f"four bits {shared}"
    for ran in (launch.alone(one, *words), launch.finish(launch.start(several, data_ranks, shared, *words))):
        assert ran.returncode == 0, ran.stdout + ran.stderr
    losses = [[record["loss"] for record in launch.records(name)] for name in (one, several)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    found, wanted = launch.adapter(several), launch.adapter(one)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_terms_of_the_loss_in_two_processes(launch):
    """Fisher information, and a run with EWC, contrast and an anchor: each term is one process's. Contrast compares the
    rows of a micro-batch: the one process takes those of the two in turn."""
    rows = (launch.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (launch.folder / "domain.jsonl").write_text("".join(rows[:30]))
    (launch.folder / "general.jsonl").write_text("".join(rows[30:]))
    (launch.folder / "hybrid.yaml").write_text(HYBRID)
    (launch.folder / "measured.py").write_text(MEASURED)
    hybrid = copy.copy(launch)
    hybrid.words = ["--config", "hybrid.yaml", *launch.words[2:4]]
    in_turn = ["--batch_size", "4", "--gradient_accumulation_steps", "2"]
    for ran in (
        hybrid.alone("hybrid one", *in_turn, program="measured.py"),
        hybrid.finish(hybrid.start("hybrid two", 2, 1, program="measured.py")),
    ):
        assert ran.returncode == 0, ran.stdout + ran.stderr
    one, two = (load_file(launch.folder / name) for name in ("fisher.safetensors", "fisher2.safetensors"))
    assert any(value.any() for value in one.values())
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-6 * value.max(), err_msg=name)
    found, wanted = hybrid.records("hybrid two"), hybrid.records("hybrid one")
    assert len(found) == len(wanted) == 6
    for key in ("loss", "cross_entropy", "ewc", "contrastive", "kl_anchor"):
        values = [[record[key] for record in records] for records in (found, wanted)]
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6, err_msg=key)
        assert max(values[1]) > 1e-3, key
    for name, value in launch.adapter("hybrid one").items():
        np.testing.assert_allclose(launch.adapter("hybrid two")[name], value, rtol=0, atol=1e-5, err_msg=name)
