"""Too little memory, and another process that is gone, are one line that says what to do, with status 2."""

import subprocess

import pytest

CHILD = """
import resource, sys
import mindspore
from lora_ms.cli.main import main
size = int(open("/proc/self/status").read().partition("VmSize:")[2].split()[0]) << 10
limit = size + (700 << 20)  # the pool's first block is 1 GB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_in_too_little_memory(model, rows_file, tmp_path, python, python_env):
    command = [python, "-c", CHILD, "finetune", "--load_checkpoint", str(model), "--train_dataset_dir", str(rows_file)]
    command += ["--output_dir", str(tmp_path / "out"), "--device_target", "CPU", "--seq_length", "16"]
    child = subprocess.run(command, env=python_env, capture_output=True, text=True)
    assert child.returncode == 2, child.stderr[-2000:]
    (line,) = [line for line in child.stderr.splitlines() if line.startswith("error:")]
    assert "out of memory" in line and "batch_size" in line and "seq_length" in line
    assert "Traceback" not in child.stderr


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Out of memory: …")])
def test_words_for_it(fault, monkeypatch, capsys):
    from lora_ms.cli import main as module

    monkeypatch.setattr(module, "_lora_ms", lambda argv: (_ for _ in ()).throw(fault))
    assert module.main([]) == 2
    assert "batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "It is possible that an exception has occurred in the TCP connection between the scheduler and the worker.",
        "Launch kernel failed: Default/AllReduce-op5",
    ],
)
def test_words_for_a_lost_connection(words, monkeypatch, capsys):
    from lora_ms.cli import main as module

    monkeypatch.setattr(module, "_lora_ms", lambda argv: (_ for _ in ()).throw(RuntimeError(words)))
    assert module.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the connection to the other processes of this run is lost: ")
    assert said.endswith("with --resume_training True to go on from the last checkpoint\n") and said.count("\n") == 1


def test_another_fault_is_one_line_and_a_traceback_with_debug(monkeypatch, capsys):
    from lora_ms.cli import main as module

    monkeypatch.setattr(module, "_lora_ms", lambda argv: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    assert module.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError: no such kernel" in line and "--debug" in line
    with pytest.raises(RuntimeError, match="no such kernel"):
        module.main(["--debug"])
