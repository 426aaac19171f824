"""``lora-ms adapters combine``, from directories to a directory."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from lora_ms.adapters.combine import combine, read_adapter
from lora_ms.commands.combine import run
from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError


@pytest.fixture
def folders(reference, tmp_path):
    """Copies of the reference adapters a and b on qwen2."""
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        shutil.copytree(reference / "combined" / "qwen2" / path.name, path)
    return [str(path) for path in paths]


def rename_base(folder: str, base: str | None) -> None:
    file = f"{folder}/adapter_config.json"
    with open(file) as stream:
        config = json.load(stream)
    with open(file, "w") as stream:
        json.dump({**config, "base_model_name_or_path": base}, stream)


def test_directories_become_one(folders, tmp_path, capsys):
    run(folders, [0.7, 0.3], "dare_ties_svd", 0.5, 3, 7, str(tmp_path / "out"))
    wanted = combine([read_adapter(path) for path in folders], [0.7, 0.3], "dare_ties_svd", 0.5, 3, 7)
    found = read_adapter(tmp_path / "out")
    assert set(found.tensors) == set(wanted.tensors)
    for name, (a, b, scaling) in wanted.tensors.items():
        np.testing.assert_array_equal(found.tensors[name][0], a)
        np.testing.assert_array_equal(found.tensors[name][1], b)
        assert found.tensors[name][2] == scaling
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("models/qwen2", 3, 3)
    line = f"2 adapters combined by dare_ties_svd: rank 3 on 4 modules, {tmp_path / 'out'}\n"
    assert capsys.readouterr().out == line


def test_different_base_models_get_a_warning(folders, tmp_path, capsys):
    rename_base(folders[1], "another/model")
    run(folders, [1, 1], "cat", None, None, 0, str(tmp_path / "out"))
    warning, _ = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the adapters name different base models")
    assert f"{folders[0]}: models/qwen2; {folders[1]}: another/model" in warning
    rename_base(folders[0], None)  # one name only: it is taken
    run(folders, [1, 1], "cat", None, None, 0, str(tmp_path / "out"), overwrite=True)
    assert "warning" not in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "another/model"


def test_the_first_tokenizer_comes_along(folders, text_model, tmp_path):
    before = load_tokenizer(text_model)
    before.save_pretrained(folders[1])
    other = shutil.copytree(folders[1], tmp_path / "c")
    (other / "chat_template.jinja").write_text("another")
    run([*folders, str(other)], [1, 1, 1], "cat", None, None, 0, str(tmp_path / "out"))
    after = load_tokenizer(tmp_path / "out")
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template and after.chat_template


def test_another_adapter_is_replaced_only_when_asked_to(folders, tmp_path):
    out = shutil.copytree(folders[0], tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(LoraMsError, match="out holds an adapter: give another folder, or --overwrite True"):
        run(folders, [1, 1], "cat", None, None, 0, str(out))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    run(folders, [1, 1], "cat", None, None, 0, str(out), overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    with pytest.raises(LoraMsError, match="adapter_model.safetensors: it is a file; give a folder"):
        run(folders, [1, 1], "cat", None, None, 0, str(out / "adapter_model.safetensors"), overwrite=True)


def test_faults_leave_nothing_behind(folders, tmp_path):
    with pytest.raises(LoraMsError, match="is one of the adapters: give another folder"):
        run(folders, [1, 1], "cat", None, None, 0, f"{tmp_path}/x/../a")
    with pytest.raises(LoraMsError, match="needs density"):
        run(folders, [1, 1], "ties", None, None, 0, str(tmp_path / "out"))
    with pytest.raises(LoraMsError, match="^adapters: .*none does not exist"):
        run([*folders, str(tmp_path / "none")], [1, 1, 1], "cat", None, None, 0, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_mindspore_is_imported(folders, tmp_path, python, python_env):
    code = "import sys; from lora_ms.commands import combine\n"
    code += "combine.run(sys.argv[1:3], [1, 1], 'svd', None, 2, 0, sys.argv[3])"
    code += "; assert not {'mindspore', 'torch', 'transformers'} & set(sys.modules)"
    command = [python, "-c", code, *folders, str(tmp_path / "out")]
    child = subprocess.run(command, env=python_env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
