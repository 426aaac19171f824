"""scripts/ascend_report.sh in its short form, on the CPU: one file, whatever is absent."""

import subprocess

import pytest


@pytest.mark.slow
def test_the_file_that_it_writes(root, python, python_env, tmp_path):
    env = python_env | {"DEVICE": "CPU", "QUICK": "1", "PYTHON": python, "REPORT": str(tmp_path / "report.txt")}
    done = subprocess.run(["bash", str(root / "scripts/ascend_report.sh")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.txt").read_text()
    titles = [line for line in text.splitlines() if line.startswith("== ")]
    assert titles == ["== versions", "== npu-smi", "== topology", "== doctor", "== tries"]
    assert "npu-smi is not installed" in text and "4 of 4 are ok" in text
    assert "TFLOP/s in float32" in text


def test_arguments_are_not_dropped_in_silence(root):
    command = ["bash", str(root / "scripts/ascend_report.sh"), "--device", "CPU"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "takes no arguments: set DEVICE=CPU" in done.stderr
