"""Every filesystem call of some savers fails once; fault_injection.py by hand does the same to all of them."""

import subprocess
from pathlib import Path

import pytest

SAVERS = ["checkpoint, next step", "adapter", "cached library", "metrics.jsonl", "data_report.json"]


@pytest.mark.slow
def test_the_old_or_the_new_is_there(python, python_env):
    program = Path(__file__).with_name("fault_injection.py")
    done = subprocess.run([python, program, *SAVERS], env=python_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 * len(SAVERS)
    assert all("BROKEN" not in line and "TRACEBACK" not in line and " 0 calls" not in line for line in lines)
