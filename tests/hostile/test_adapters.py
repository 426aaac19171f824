"""Folders of adapters."""

import json
import time

import pytest

from lora_ms.adapters.check import base_entries, check_files
from lora_ms.adapters.offline_merge import read_updates
from lora_ms.adapters.peft_files import read_adapter_config
from lora_ms.errors import LoraMsError

SETTINGS = [
    ("r", ["8", 0, -1, 8.5, True, 10**9, [8]]),
    ("lora_alpha", ["16", None, float("nan"), float("inf"), 1e300, [16], True]),
    ("lora_dropout", [-0.1, 1.5, "0", []]),
    ("target_modules", [5, {"a": 1}, [5], "(", "x" * 3000, None]),
    ("exclude_modules", [5, [None], "*x"]),
    ("modules_to_save", [5, [1], {}]),
    ("trainable_token_indices", [5, "5", [1.5], [-1], [2**40], [3, 3], [[3]], {"embed_tokens": 3}, {"x": [3, 3]}]),
    ("layers_to_transform", ["0", [-1], [1001], 0.5, [[0]], {}]),
    ("layers_pattern", [5, [None], "("]),
    ("rank_pattern", [[], "x", {"(": 4}, {"q": "4"}, {"q": -1}, {"q": [1]}, {"q": 10**9}, {"x" * 3000: 4}]),
    ("alpha_pattern", [[], {"*": 4}, {"q": "4"}, {"q": None}, {"q": 1e300}]),
    ("bias", [5, [], "some"]),
    ("init_lora_weights", [5, {}, []]),
    ("use_dora", ["yes", 1]),
    ("peft_type", [5, None, [], "Zz"]),
    ("base_model_name_or_path", [5, []]),
]
CASES = [(key, value) for key, values in SETTINGS for value in values]


@pytest.mark.parametrize(("key", "value"), CASES, ids=[f"{key}-{str(value)[:20]}" for key, value in CASES])
def test_settings_of_an_adapter(adapter, key, value):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(LoraMsError) as error:
        read_adapter_config(adapter)
    assert str(error.value).startswith(str(file)) and len(str(error.value)) < 600


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_an_expression_that_never_ends(refused, adapter, key):
    pattern = "([a-z_.0-9]+)+Z"
    file = adapter / "adapter_config.json"
    value = pattern if key.endswith("modules") else {pattern: 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    if key.endswith("pattern"):
        line = refused("merge", "--load_adapter", "a", "--load_checkpoint", "base", "--output_dir", "o")
        assert line.endswith(f"the regular expression {pattern!r} takes too long: it was stopped")
    else:
        began = time.process_time()
        list(check_files(adapter, adapter.parent / "base"))
        assert time.process_time() - began < 5


def test_many_expressions_take_their_time_and_no_more(adapter):

    file = adapter / "adapter_config.json"
    patterns = {f"([a-z_.0-9]+)+Z{number}": 4 for number in range(50)}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": patterns}))
    began = time.process_time()
    with pytest.raises(LoraMsError, match="takes too long"):
        read_updates(adapter, base_entries(adapter.parent / "base"))
    assert time.process_time() - began < 8


def test_a_linked_secret_is_not_copied(refused, adapter, tmp_path):
    (tmp_path / "secret").write_text("SECRET")
    (adapter / "chat_template.jinja").symlink_to(tmp_path / "secret")
    line = refused("merge", "--load_adapter", "a", "--load_checkpoint", "base", "--output_dir", "o")
    assert line.startswith("a: chat_template.jinja leads out of the folder, to ")
    (adapter / "chat_template.jinja").unlink()
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("SECRET")
    (adapter / "additional_chat_templates").symlink_to(tmp_path / "templates")
    line = refused("merge", "--load_adapter", "a", "--load_checkpoint", "base", "--output_dir", "o")
    assert "leads out of the folder, to " in line


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter_outside(refused, adapter, tmp_path, name):
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    line = refused("merge", "--load_adapter", "a", "--load_checkpoint", "base", "--output_dir", "o")
    assert line.startswith(f"a: {name} leads out of the folder, to ")


def test_check_adapter_says_what_is_wrong_with_the_weights(refused, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    assert "1 fault" in refused("check-adapter", "--load_adapter", "a", "--load_checkpoint", "base")


def test_a_name_of_the_base_that_no_file_can_have(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "é" * 5000}))
    assert list(check_files(adapter, None))
