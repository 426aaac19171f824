"""What the doctor finds, on this machine and on worse ones."""

import subprocess

import pytest

from lora_ms.recipes import doctor
from lora_ms.recipes.doctor import FAULT, OK, WARNING

FINE = {name: "1.0" for name in doctor.REQUIRED} | {"mindspore": "2.9.0", "numpy": "1.26.4"}


def test_this_machine(capsys):
    """Everything but the import: two processes of msrun among it, which import MindSpore twice."""
    finding = doctor.msrun_finding()
    assert finding == ("msrun", OK, "two processes connected and summed their numbers")
    assert doctor.mindspore_finding().status == OK


def test_the_command(monkeypatch, capsys):
    from lora_ms.cli.main import main

    monkeypatch.setattr(doctor, "mindspore_finding", lambda: doctor.Finding("import", OK, "as it should be"))
    assert main(["doctor", "--msrun", "False"]) == 0
    out = capsys.readouterr().out
    assert "no problem found" in out and max(map(len, out.splitlines())) <= 80
    monkeypatch.setattr(doctor, "mindspore_finding", lambda: doctor.Finding("import", FAULT, "word " * 40))
    assert main(["doctor", "--msrun", "False"]) == 2
    out = capsys.readouterr().out
    assert "1 problem" in out and max(map(len, out.splitlines())) <= 80


def test_without_mindspore(tmp_path, python, python_env):
    """A Python that finds no MindSpore at all: the report says so."""
    code = (
        "import sys, importlib.metadata as m\n"
        "sys.modules['mindspore'] = None\n"
        "from lora_ms.commands.doctor import run\n"
        "from lora_ms.recipes import doctor\n"
        "doctor.installed = lambda name: None if name.startswith('mind') else '1.0'\n"
        "sys.exit(2 if run() else 0)\n"
    )
    child = subprocess.run([python, "-c", code], env=python_env, capture_output=True, text=True)
    assert child.returncode == 2, child.stderr
    assert "mindspore     fault    is missing: pip install mindspore" in child.stdout
    assert "msrun" not in child.stdout


@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({}, "numpy", OK, "1.26.4"),
        ({"numpy": "2.1.0"}, "numpy", FAULT, "pip install 'numpy<2'"),
        ({"mindspore": "2.5.0"}, "mindspore", FAULT, "2.7.2, 2.9 and 2.10"),
        ({"mindspore": "2.11.0"}, "mindspore", WARNING, "is not tested"),
        ({"transformers": None}, "transformers", FAULT, "pip install transformers"),
    ],
)
def test_packages(changes, name, status, words):
    found = [finding for finding in doctor.package_findings(FINE | changes) if finding.name == name]
    assert found[-1].status == status and words in found[-1].text


def test_mindformers_wants_its_transformers(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy<2", "transformers == 4.57.1"])
    found = doctor.package_findings(FINE | {"mindformers": "1.9.0", "transformers": "4.51.0"})
    assert found[-1].status == WARNING and "transformers==4.57.1" in found[-1].text


@pytest.mark.parametrize(("running", "status"), [((3, 9), FAULT), ((3, 11), OK), ((3, 13), FAULT)])
def test_python(running, status):
    assert doctor.python_finding(running).status == status


def test_devices(tmp_path):
    assert doctor.device_finding(tmp_path, {}).status == OK
    (tmp_path / "davinci0").touch()
    assert "set_env.sh" in doctor.device_finding(tmp_path, {}).text
    assert doctor.device_finding(tmp_path, {}).status == FAULT
    assert doctor.device_finding(tmp_path, {"ASCEND_HOME_PATH": "/usr/local/Ascend"}).status == OK


def test_memory():
    (found,) = doctor.memory_findings(8192, None)
    assert (found.status, found.text[:6]) == (OK, "8.0 GB")
    little, group = doctor.memory_findings(512, (4096, 3584))
    assert little.status == WARNING and "4.0 GB, 3.5 GB of it in use" in group.text


def test_a_process_that_hangs_is_killed(tmp_path, python):
    assert doctor.process([python, "-c", "import time; time.sleep(60)"], str(tmp_path), 1) == (None, "")
