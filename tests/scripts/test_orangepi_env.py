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


@pytest.fixture
def swap(root, tmp_path):
    """``swap(dd)``: what --swap does as root, where dd is this shell script, and the commands that it would call."""
    if Path("/swapfile_lora_ms").exists():
        pytest.skip("the board's swap file is there")

    def start(dd):
        note = f'echo "$(basename $0) $*" >> {tmp_path}/called'
        noted = dict.fromkeys(("chmod", "mkswap", "mv", "rm", "swapon"), note)
        for name, text in {"id": "echo 0", "dd": f"{note}; {dd}", **noted}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(root / "scripts/orangepi_env.sh"), "--swap", "8GB", "true"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done, (tmp_path / "called").read_text().splitlines()

    return start


def test_a_full_disk_is_said(swap):
    done, called = swap("echo 'dd: No space left on device' >&2; exit 1")
    line = "error: --swap: 8192 MB cannot be written to /swapfile_lora_ms: free space on that disk, "
    assert (done.returncode, done.stderr) == (1, f"{line}or give a smaller SIZE\n")
    assert called[1:] == ["rm -f /swapfile_lora_ms.part"]


@pytest.mark.parametrize("cut", [False, True])
def test_half_a_swap_file_is_not_taken_for_one(swap, cut):
    done, called = swap("kill -TERM $PPID" if cut else "true")
    part, file = "/swapfile_lora_ms.part", "/swapfile_lora_ms"
    assert called.pop(0) == f"dd if=/dev/zero of={part} bs=1M count=8192 status=none"
    if cut:
        assert done.returncode != 0 and called == [f"rm -f {part}"]
    else:
        assert done.returncode == 0
        assert called == [f"chmod 600 {part}", f"mkswap {part}", f"mv {part} {file}", f"swapon {file}"]


@pytest.mark.parametrize("arguments", [[], ["--limit", "x", "true"], ["--limit"], ["--colour", "true"]])
def test_wrong_arguments(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "usage:" in done.stderr
