"""Adapters in PEFT's format: exact both ways, and into adapters that stand already."""

import json
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from lora_ms.adapters.inject import adapted_layers, inject
from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.peft_format import load_adapter, restore_adapter, save_adapter
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory
from lora_ms.nn.projection import Projection

pytestmark = pytest.mark.usefixtures("graph_mode")
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


def error_of(function, *args) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args)
    return str(caught.value)


def fill(model, seed: int = 0) -> None:
    """Random factors, so that none is zero."""
    rng = np.random.default_rng(seed)
    for layer in adapted_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor.set_data(Tensor(rng.standard_normal(factor.shape, np.float32) * 0.2))


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
    assert found == config and report.modules == tuple(adapted_layers(model))
    for (name, layer), (other_name, other) in zip(
        adapted_layers(model).items(), adapted_layers(again).items(), strict=True
    ):
        assert name == other_name and float(other.scaling.asnumpy()) == np.float32(5.0 / 3)
        np.testing.assert_array_equal(other.lora_a.asnumpy(), layer.lora_a.asnumpy())
        np.testing.assert_array_equal(other.lora_b.asnumpy(), layer.lora_b.asnumpy())
    assert load_adapter(bare(), tmp_path / "a" / "b", replace(config, lora_dropout=0.5))[0].lora_dropout == 0.5


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
    return [name for name, cell in model.cells_and_names() if isinstance(cell, ms.nn.Dense | Projection)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_never_saved(bare, tmp_path, bad):
    model, config = bare(), LoraConfig(2, 4.0, 0.0, "q_proj")
    inject(model, config)
    layer = adapted_layers(model)["model.layers.1.self_attn.q_proj"]
    value = layer.lora_b.asnumpy().copy()
    value[3, 1] = bad
    layer.lora_b.set_data(Tensor(value))
    path = tmp_path / "adapter"
    name = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
    assert error_of(save_adapter, model, path, config) == f"{name} holds NaN or infinity; {path} was not written"
    assert list(tmp_path.iterdir()) == []


def test_restoring_into_adapters_that_stand(reference, bare):
    model, config = bare(), LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj"))
    inject(model, config)
    restore_adapter(model, reference / "adapters" / "qwen2", config)
    stored = load_file(reference / "adapters" / "qwen2" / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        np.testing.assert_array_equal(layer.lora_a.asnumpy(), stored[f"{PREFIX}{name}.lora_A.weight"])
        np.testing.assert_array_equal(layer.lora_b.asnumpy(), stored[f"{PREFIX}{name}.lora_B.weight"])


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_restoring_what_was_taken_out_of_the_weights(bare, tmp_path, init):
    """The file has twice the rank; the adapter that stands gets its half, and the start it was trained from."""
    config = LoraConfig(2, 3.0, target_modules=("q_proj",), init_lora_weights=init)
    model, again = bare(), bare()
    for seed, each in enumerate((model, again)):
        ms.set_seed(seed)  # pissa_niter draws other numbers for each
        inject(each, config)
    fill(model)
    save_adapter(model, tmp_path, config)
    assert load_file(tmp_path / "adapter_model.safetensors")[f"{PREFIX}{Q0}.lora_A.weight"].shape == (4, 64)
    restore_adapter(again, tmp_path, config)
    for name, layer in adapted_layers(again).items():
        other = adapted_layers(model)[name]
        for found, wanted in ((layer.lora_a, other.lora_a), (layer.lora_b, other.lora_b)):
            np.testing.assert_array_equal(found.asnumpy(), wanted.asnumpy())
        for found, wanted in zip(layer.initial, other.initial, strict=True):
            np.testing.assert_array_equal(found, wanted)
        np.testing.assert_allclose(layer.base.weight.asnumpy(), other.base.weight.asnumpy(), rtol=0, atol=1e-6)


def test_restoring_ranks_that_adalora_kept(bare, tmp_path):
    kept = (False, True, True, False)
    config = AdaLoraConfig(4, 6.0, target_modules=("q_proj",), target_rank=2, kept={Q0: kept})
    model, again = bare(), bare()
    for each in (model, again):
        inject(each, config)
    fill(model)
    save_adapter(model, tmp_path, config)
    restore_adapter(again, tmp_path, config)
    for name, layer in adapted_layers(again).items():
        other, mask = adapted_layers(model)[name], np.array(kept if name == Q0 else [True] * 4)
        np.testing.assert_array_equal(layer.lora_a.asnumpy(), other.lora_a.asnumpy() * mask[:, None])
        np.testing.assert_array_equal(layer.lora_b.asnumpy(), other.lora_b.asnumpy() * mask)


def test_restoring_another_adapter_is_refused(reference, bare):
    model, config = bare(), LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj"))
    inject(model, config)
    before = [p.asnumpy().copy() for p in model.get_parameters()]
    path = reference / "adapters" / "qwen2"
    message = error_of(restore_adapter, model, path, config)
    surplus = [f"{PREFIX}model.layers.{n}.mlp.down_proj.lora_{ab}.weight" for n in "01" for ab in "AB"]
    assert message.startswith(f"{path}: not the adapter of this run: ") and message.endswith(" and 1 more")
    assert [f"{key} " in message for key in surplus] == [True, True, True, False]
    for parameter, value in zip(model.get_parameters(), before, strict=True):
        np.testing.assert_array_equal(parameter.asnumpy(), value)


def test_an_adapter_of_half_precision_is_read_exactly(bare, copied):
    path = copied("qwen2")
    half = {k: v.astype(np.float16) for k, v in load_file(path / "adapter_model.safetensors").items()}
    save_file(half, path / "adapter_model.safetensors")
    model = bare()
    load_adapter(model, path)
    name = "model.layers.0.self_attn.v_proj"
    layer = adapted_layers(model)[name]
    assert layer.lora_a.dtype == ms.float32
    np.testing.assert_array_equal(layer.lora_a.asnumpy(), half[f"{PREFIX}{name}.lora_A.weight"].astype(np.float32))


def test_the_base_model_of_a_loaded_directory_is_known(reference):
    model = load_directory(reference / "models" / "llama2")
    assert model.source == str(reference / "models" / "llama2")
