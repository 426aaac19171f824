"""The bundled tiny model and the quick start: their sizes and their scores."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ms.models.hub import read_config
from lora_ms.storage import open_dir

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny/model"


def test_the_model_is_small():
    config, hf = read_config(MODEL)
    entries = open_dir(MODEL)
    numbers = 0
    for entry in entries.values():
        count = 1
        for size in entry.shape:
            count *= size
        numbers += count
    assert hf["architectures"] == ["Qwen2ForCausalLM"] and config.tie_word_embeddings
    assert numbers <= 3_000_000
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000


@pytest.mark.slow
def test_the_model_answers_what_it_was_not_taught(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/tiny/score.py"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    right, total = map(int, re.search(r"^all\s+(\d+)/(\d+)", done.stdout, re.M).groups())
    assert total == 200
    assert right >= 170  # 85%


@pytest.mark.slow
def test_the_quick_start_teaches_a_name(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, ROOT / "examples/quickstart.py", "--name", "Nova", "--author", "Wei", "--output_dir", out],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    total, before, after = map(
        int, re.search(r"(\d+) questions .* with Nova: (\d+) before, (\d+) after", done.stdout).groups()
    )
    assert (total, before) == (30, 0)
    assert after >= 27  # 90%
    assert json.loads((out / "adapter/adapter_config.json").read_text())["r"] == 8
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 112  # 108 rows by 8, 8 epochs
