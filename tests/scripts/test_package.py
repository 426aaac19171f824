"""The package: wheel and sdist are complete, and an installed one works outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lora_ms
from lora_ms.bundled import bundled

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KEPT = ("lora_ms", "configs", "scripts", "docs", "requirements")


@pytest.fixture(scope="module")
def built(tmp_path_factory, python) -> Path:
    """A folder with the wheel and the sdist that it was made from, built from a copy without the repository's files."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in KEPT:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, source / file.name)
    argv = [python, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(argv, cwd=output, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory, python):
    """``installed("lora-ms", …)``: runs a command of the wheel in an empty folder; with its own dependencies here."""
    target, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    [wheel] = built.glob("*.whl")
    argv = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(argv, check=True)

    def run(command: str, *argv: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(target)}
        words = [python, str(target / "bin" / command), *argv] if command != "python" else [python, *argv]
        return subprocess.run(words, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=250)

    return run


def test_what_a_wheel_holds(built):
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "lora_ms").rglob("*"):
        if file.suffix in (".py", ".cpp", ".h", ".typed", ".html", ".css", ".js", ".svg"):
            assert str(file.relative_to(ROOT)) in names
    for file in [*ROOT.glob("configs/*/*.yaml"), ROOT / "scripts/msrun_launcher.sh", ROOT / "run_mindformer.py"]:
        assert f"lora_ms/share/{file.relative_to(ROOT)}" in names
    about = f"lora_ms-{lora_ms.__version__}.dist-info"
    assert {f"{about}/licenses/LICENSE", f"{about}/entry_points.txt"} <= names
    metadata = zipfile.ZipFile(wheel).read(f"{about}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "# lora_ms" in metadata
    assert not any(name.startswith("tests") for name in names)


def test_what_an_sdist_holds(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CONTRIBUTING.md", "SECURITY.md", "LICENSE", "configs/tiny/lora_tiny.yaml", "docs/data.md"} <= names
    assert {"scripts/test.sh", "requirements/tested.txt", "lora_ms/ops/csrc/operators.cpp"} <= names


def test_an_installed_one_trains_outside_the_repository(installed, tmp_path):
    where = installed("python", "-c", "import lora_ms; print(lora_ms.__file__, lora_ms.__version__)").stdout
    assert "installed" in where and where.split()[-1] == lora_ms.__version__
    assert installed("lora-ms", "--version").stdout == f"lora-ms {lora_ms.__version__}\n"
    given = ("--load_checkpoint", ROOT / "examples/tiny/model", "--train_dataset_dir", ROOT / "examples/huanhuan.jsonl")
    argv = ["finetune", "--config", "configs/tiny/lora_tiny.yaml", *map(str, given), "--max_steps", "1"]
    done = installed("lora-ms", *argv, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "native operators" not in done.stdout + done.stderr  # no word of why they could not be compiled


def test_its_launcher(installed):
    done = installed("lora-ms-launcher", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: bash ") and "LOG_DIR" in done.stdout


def test_its_launcher_at_a_path_with_a_space(tmp_path):
    place = tmp_path / "a place"
    (place / "bin").mkdir(parents=True)
    for name in ("scripts/msrun_launcher.sh", "scripts/common.sh", "run_mindformer.py"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    (place / "bin" / "msrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (place / "bin" / "msrun").chmod(0o755)
    script = "import sys; from pathlib import Path; import lora_ms.bundled; from lora_ms.cli.launcher import main\n"
    script += (
        "lora_ms.bundled.ROOT = Path(sys.argv[1]); sys.executable = f'{sys.argv[1]}/bin/python'; main(sys.argv[2:])"
    )
    words = ["run_mindformer.py --config x.yaml", "2", "29431", "logs", "True", "60"]
    command = [sys.executable, "-c", script, str(place), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-3:] == [f"{place}/run_mindformer.py", "--config", "x.yaml"], done.stderr


def test_what_is_bundled():
    assert bundled("configs/tiny/lora_tiny.yaml").is_file()
    assert bundled("configs/../setup.py") is bundled("README.md") is bundled("configs/none.yaml") is None
