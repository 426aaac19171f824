"""Adapters in PEFT's format: exact both ways, and refused with every reason when they do not fit."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from lora_ms.adapters.config import LoraConfig
from lora_ms.adapters.inject import inject, lora_layers
from lora_ms.adapters.peft_format import load_adapter, read_adapter_config, restore_adapter, save_adapter
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory, new_model, read_config

pytestmark = pytest.mark.usefixtures("graph_mode")
PREFIX = "base_model.model."


def fill(model, seed: int = 0) -> None:
    """Random factors, so that none is zero."""
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor.set_data(Tensor(rng.standard_normal(factor.shape, np.float32) * 0.2))


@pytest.fixture
def bare(reference):
    """A model of the reference folder's sizes with weights of its own."""

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


def error_of(function, *args) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "qwen2_all_linear"])
def test_pefts_own_adapters_come_back_byte_for_byte(reference, bare, tmp_path, name):
    source = reference / "adapters" / name
    model = bare(name.split("_")[0])
    config, report = load_adapter(model, source)
    stored = load_file(source / "adapter_model.safetensors")
    assert len(report.modules) == len(stored) / 2
    save_adapter(model, tmp_path, config, "base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(found) == sorted(stored)
    for key, value in stored.items():
        assert found[key].dtype == np.float32
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_saved_and_loaded_is_exact(bare, tmp_path):
    model, config = bare(), LoraConfig(3, 5.0, 0.1, ("q_proj", "up_proj"))
    inject(model, config)
    fill(model)
    save_adapter(model, tmp_path / "a" / "b", config)
    again = bare()
    found, report = load_adapter(again, tmp_path / "a" / "b")
    assert found == config and report.modules == tuple(lora_layers(model))
    for (name, layer), (other_name, other) in zip(lora_layers(model).items(), lora_layers(again).items(), strict=True):
        assert name == other_name and other.scaling == 5.0 / 3
        np.testing.assert_array_equal(other.lora_a.asnumpy(), layer.lora_a.asnumpy())
        np.testing.assert_array_equal(other.lora_b.asnumpy(), layer.lora_b.asnumpy())
    assert load_adapter(bare(), tmp_path / "a" / "b", lora_dropout=0.5)[0].lora_dropout == 0.5


def test_what_is_written(bare, tmp_path):
    model, config = bare(), LoraConfig(3, 5.0, 0.1, "wq|w3")
    inject(model, config)
    save_adapter(model, tmp_path, config, "models/some")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "models/some",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": None,
        "layers_to_transform": None,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    wanted = {}
    for number in "01":
        for leaf, out_features in (("self_attn.q_proj", 64), ("mlp.up_proj", 96)):
            path = f"{PREFIX}model.layers.{number}.{leaf}"
            wanted[f"{path}.lora_A.weight"] = [3, 64]
            wanted[f"{path}.lora_B.weight"] = [out_features, 3]
    assert {key: info["shape"] for key, info in header.items()} == wanted
    assert {info["dtype"] for info in header.values()} == {"F32"}


@pytest.mark.parametrize("targets", [r"model\.layers\.1\.self_attn\.q_proj", ("layers.1.self_attn.q_proj",)])
def test_target_modules_written_name_the_adapted_layers_alone(bare, tmp_path, targets):
    """PEFT makes an adapter on everything that target_modules of the file fits, so it may fit nothing else."""
    model, config = bare(), LoraConfig(2, 4.0, 0.0, targets)
    inject(model, config)
    save_adapter(model, tmp_path, config)
    written = tuple(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"])
    fitting = [name for name in model_layers(bare()) if any(name == t or name.endswith("." + t) for t in written)]
    assert fitting == ["model.layers.1.self_attn.q_proj"]


def model_layers(model) -> list[str]:
    return [name for name, cell in model.cells_and_names() if isinstance(cell, ms.nn.Dense)]


def test_an_adapter_for_another_model_lists_every_shape(reference, bare):
    """qwen2's adapter on llama2, which is 48 wide rather than 64 and has 4 key/value heads of 12."""
    path = reference / "adapters" / "qwen2"
    stored = load_file(path / "adapter_model.safetensors")
    model = bare("llama2")
    width = {"q_proj": (48, 48), "v_proj": (48, 48), "down_proj": (96, 48)}  # in, out
    faults = []
    for key in json.loads(header_of(path / "adapter_model.safetensors")):
        if key == "__metadata__":
            continue
        leaf = key.split(".")[-3]
        wanted = (4, width[leaf][0]) if "lora_A" in key else (width[leaf][1], 4)
        if stored[key].shape != wanted:
            faults.append(f"{key} is {stored[key].shape}, should be {wanted}")
    assert len(faults) == 10  # all but the A of down_proj, whose input is 96 in both
    assert error_of(load_adapter, model, path) == f"{path}: made for another model: {'; '.join(faults)}"
    assert not lora_layers(model)


def header_of(file) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_tensors_without_a_place_and_missing_factors_are_listed(bare, copied):
    path = copied("qwen2")
    stored = load_file(path / "adapter_model.safetensors")
    gone = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
    far = f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"
    dora = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    del stored[gone]
    stored |= {far: np.zeros((4, 64), np.float32), dora: np.zeros(64, np.float32)}
    save_file(stored, path / "adapter_model.safetensors")
    message = error_of(load_adapter, bare(), path)
    assert message.startswith(f"{path}: made for another model: ")
    assert sorted(message.removeprefix(f"{path}: made for another model: ").split("; ")) == [
        f"{gone} is missing",
        f"{dora} (64,) has no place in the model",
        f"{far} (4, 64) has no place in the model",
    ]
    save_file({}, path / "adapter_model.safetensors")
    assert error_of(load_adapter, bare(), path) == f"{path}: made for another model: it holds no LoRA tensor"


def test_keys_that_change_numbers_are_refused_together(bare, copied):
    path = copied("qwen2", use_dora=True, use_rslora=True, rank_pattern={"q_proj": 8}, modules_to_save=["lm_head"])
    assert error_of(load_adapter, bare(), path) == (
        f"{path / 'adapter_config.json'}: not supported yet: "
        "use_dora: True, use_rslora: True, rank_pattern: {'q_proj': 8}, modules_to_save: ['lm_head']"
    )


@pytest.mark.parametrize(
    "change",
    [{"alpha_pattern": {"q_proj": 1}}, {"bias": "all"}, {"lora_bias": True}, {"fan_in_fan_out": True},
     {"trainable_token_indices": [1]}, {"target_parameters": ["x"]}, {"alora_invocation_tokens": [1]},
     {"layer_replication": [[0, 2]]}, {"use_qalora": True}],
)  # fmt: skip
def test_each_key_that_changes_numbers_is_refused(bare, copied, change):
    (key,) = change
    message = f"adapter_config.json: not supported yet: {key}: {change[key]}"
    assert error_of(load_adapter, bare(), copied("qwen2", **change)).endswith(message)


def test_configurations_that_are_no_lora(bare, copied, tmp_path):
    path = copied("qwen2", peft_type="IA3")
    file = path / "adapter_config.json"
    assert error_of(read_adapter_config, path) == f"{file}: peft_type 'IA3' is not supported; supported: LORA"
    file.write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    assert error_of(read_adapter_config, path) == f"{file}: r, target_modules is missing"
    file.write_text("{")
    assert error_of(read_adapter_config, path).startswith(f"{file}: not readable as JSON (")
    file.unlink()
    assert error_of(load_adapter, bare(), path) == f"{path}: no adapter here: adapter_config.json is missing"


def test_an_adapter_without_its_weights(bare, copied):
    path = copied("qwen2")
    (path / "adapter_model.safetensors").unlink()
    assert error_of(load_adapter, bare(), path) == f"{path / 'adapter_model.safetensors'}: no such file"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_never_saved(bare, tmp_path, bad):
    model, config = bare(), LoraConfig(2, 4.0, 0.0, "q_proj")
    inject(model, config)
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    value = layer.lora_b.asnumpy().copy()
    value[3, 1] = bad
    layer.lora_b.set_data(Tensor(value))
    path = tmp_path / "adapter"
    name = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
    assert error_of(save_adapter, model, path, config) == f"{name} holds NaN or infinity; {path} was not written"
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_never_loaded(bare, copied):
    path = copied("qwen2")
    stored = load_file(path / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.1.mlp.down_proj.lora_A.weight"
    stored[name][0, 0] = np.nan
    save_file(stored, path / "adapter_model.safetensors")
    assert error_of(load_adapter, bare(), path) == f"{path}: {name} holds NaN or infinity"


def test_restoring_into_adapters_that_stand(reference, bare):
    model = bare()
    inject(model, LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj")))
    restore_adapter(model, reference / "adapters" / "qwen2")
    stored = load_file(reference / "adapters" / "qwen2" / "adapter_model.safetensors")
    for name, layer in lora_layers(model).items():
        np.testing.assert_array_equal(layer.lora_a.asnumpy(), stored[f"{PREFIX}{name}.lora_A.weight"])
        np.testing.assert_array_equal(layer.lora_b.asnumpy(), stored[f"{PREFIX}{name}.lora_B.weight"])


def test_an_adapter_of_half_precision_is_read_exactly(bare, copied):
    path = copied("qwen2")
    half = {k: v.astype(np.float16) for k, v in load_file(path / "adapter_model.safetensors").items()}
    save_file(half, path / "adapter_model.safetensors")
    model = bare()
    load_adapter(model, path)
    name = "model.layers.0.self_attn.v_proj"
    layer = lora_layers(model)[name]
    assert layer.lora_a.dtype == ms.float32
    np.testing.assert_array_equal(layer.lora_a.asnumpy(), half[f"{PREFIX}{name}.lora_A.weight"].astype(np.float32))


def test_the_base_model_of_a_loaded_directory_is_known(reference):
    model = load_directory(reference / "models" / "llama2")
    assert model.source == str(reference / "models" / "llama2")
