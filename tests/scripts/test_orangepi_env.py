"""The environment of an Orange Pi: variables, statuses, wrong arguments."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def run(root):
    def start(*arguments):
        return subprocess.run(
            ["bash", str(root / "scripts/orangepi_env.sh"), *arguments], capture_output=True, text=True
        )

    return start


def test_variables_and_status(run):
    done = run("bash", "-c", "echo $MAX_COMPILE_CORE_NUMBER $TE_PARALLEL_COMPILER $MALLOC_ARENA_MAX; exit 3")
    assert (done.returncode, done.stdout) == (3, "1 1 2\n")


def test_sourced_it_sets_variables_alone(root):
    script = f"source {root}/scripts/orangepi_env.sh; echo $TE_PARALLEL_COMPILER $-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.split()[0] == "1" and "e" not in done.stdout.split()[1]


def test_a_limit_is_set_or_a_warning_given(run):
    done = run("--limit", "2GB", "bash", "-c", "exit 4")
    assert done.returncode == 4
    assert done.stderr == "" or "running without a limit" in done.stderr


@pytest.mark.skipif(Path("/swapfile_lora_ms").exists(), reason="the board's swap file is there")
def test_a_full_disk_is_said(root, tmp_path):
    for name, text in {"id": "echo 0", "dd": "echo 'dd: No space left on device' >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(root / "scripts/orangepi_env.sh"), "--swap", "8GB", "true"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = "error: --swap: 8192 MB cannot be written to /swapfile_lora_ms: free space on that disk, "
    assert (done.returncode, done.stderr) == (1, f"{line}or give a smaller SIZE\n")


@pytest.mark.parametrize("arguments", [[], ["--limit", "x", "true"], ["--limit"], ["--colour", "true"]])
def test_wrong_arguments(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "usage:" in done.stderr
