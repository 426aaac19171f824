"""A short run of the fuzzer; ``run.py`` beside it runs as many cases as one likes."""

import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_reader_fails_but_with_one_line(python, python_env):
    command = [python, str(Path(__file__).with_name("run.py")), "--cases", "40", "--seed", "3"]
    done = subprocess.run(command, env=python_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
