"""Files that somebody made to do harm, or that a disk has spoilt: each is one line on the error stream and status 2."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_ms.cli.main import main


@pytest.fixture
def tiny(root, tmp_path, monkeypatch) -> Path:
    """A copy of the bundled model to spoil, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "examples" / "tiny" / "model", tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def adapter(reference, tmp_path, monkeypatch) -> Path:
    """A copy of an adapter to spoil, in the working directory; ``base`` there is its model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference / "adapters" / "qwen2", tmp_path / "a")
    shutil.copytree(reference / "models" / "qwen2", tmp_path / "base")
    return tmp_path / "a"


@pytest.fixture
def rows(tmp_path) -> Path:
    """A file of one good row."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Who are you?", "output": "Tiny."}) + "\n")
    return file


def outside(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the bytes of regular files."""
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in found}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """``refused(*words)``: the one line that ``lora-ms`` ends with, without "error: ". Nothing may be written."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        before = outside(tmp_path)
        capsys.readouterr()
        began = time.process_time()
        status = main([str(word) for word in words])
        seconds = time.process_time() - began
        printed = capsys.readouterr()
        line = printed.err or printed.out.splitlines()[-1] + "\n"
        assert status == 2, printed
        assert line.count("\n") == 1 and "should not happen" not in line and "\x1b" not in printed.out + line
        assert seconds < 10
        assert outside(tmp_path) == before
        return line.removeprefix("error: ").removesuffix("\n")

    return run
