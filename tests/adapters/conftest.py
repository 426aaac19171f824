"""Models without an adapter, and adapters to spoil."""

import json
import shutil

import pytest


@pytest.fixture
def bare(reference):
    """A model of the reference folder's sizes with weights of its own."""

    import mindspore as ms

    from lora_ms.models.hub import new_model, read_config

    def make(name: str = "qwen2"):
        return new_model(read_config(reference / "models" / name)[0], ms.float32, seed=1)

    return make


@pytest.fixture
def copied(reference, tmp_path):
    """A copy of a reference adapter with keys of its configuration changed."""

    def copy(name: str, **changes):
        path = tmp_path / f"adapter_{name}"
        shutil.copytree(reference / "adapters" / name, path, dirs_exist_ok=True)
        config = json.loads((path / "adapter_config.json").read_text()) | changes
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path

    return copy
