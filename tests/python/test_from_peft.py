"""The script of docs/from-peft.md, as it stands there: here, and with its two lines put back in torch with PEFT."""

import os
import re
import subprocess

import pytest


def script(root, output) -> str:
    page = (root / "docs" / "from-peft.md").read_text()
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    assert (root / "docs" / "from-peft.zh.md").read_text().count(found) == 1
    return found.replace("output/from_peft", str(output))


def losses(text: str) -> list[float]:
    return [float(number) for number in re.search(r"^losses \[(.*)\]$", text, re.MULTILINE).group(1).split(", ")]


def run(python: str, source: str, root, env) -> str:
    done = subprocess.run([python, "-c", source], cwd=root, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def ours(root, python, python_env, tmp_path_factory) -> tuple[str, object]:
    output = tmp_path_factory.mktemp("from_peft")
    return run(python, script(root, output), root, python_env), output


def test_the_script_of_the_page_runs(ours):
    text, output = ours
    found = losses(text)
    assert len(found) == 12 and found[-1] < 0.5 * found[0]
    assert "Lin made me." in text
    assert (output / "saved" / "adapter_config.json").is_file()


@pytest.mark.peft
@pytest.mark.skipif(
    "LORA_MS_TORCH_PYTHON" not in os.environ, reason="needs torch and PEFT: scripts/test.sh --with-torch"
)
def test_with_two_lines_put_back_torch_and_peft_lose_the_same(ours, root, tmp_path):
    source = script(root, tmp_path)
    for package in ("transformers", "peft"):
        source, count = re.subn(
            rf"^from lora_ms (import .*?)  # from {package} .*$", rf"from {package} \1", source, flags=re.M
        )
        assert count == 1
    text = run(os.environ["LORA_MS_TORCH_PYTHON"], source, root, {**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    # A and B begin at random: the first step, where B is zero, is the same; later ones are near
    theirs, here = losses(text), losses(ours[0])
    assert abs(theirs[0] - here[0]) < 2e-3 and len(theirs) == len(here)
    assert theirs[-1] < 0.5 * theirs[0]
