"""Adapters as others save them: names that PEFT reads too, modules that are missing, and messages that stay short."""

import json
import re
import shutil

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

import lora_ms
from lora_ms.adapters.check import check_files, missing_modules
from lora_ms.adapters.combine import read_adapter
from lora_ms.adapters.offline_merge import read_updates
from lora_ms.adapters.peft_files import read_adapter_config, usual_key
from lora_ms.adapters.peft_format import load_adapter
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import open_model
from lora_ms.models.hub import load_directory
from lora_ms.python.model import ModelForCausalLM
from lora_ms.storage import read_json

pytestmark = pytest.mark.usefixtures("graph_mode")


def renamed(adapter, target, pattern: str, new: str):
    """A copy of ``adapter`` whose tensors' names end otherwise."""
    path = shutil.copytree(adapter, target)
    file = path / "adapter_model.safetensors"
    tensors = {re.sub(pattern, new, name): value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return path


def change(adapter, **keys) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def keep(adapter, wanted) -> None:
    """Leaves in the file the tensors whose names ``wanted`` likes."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if wanted(name)}, file, {"format": "pt"})


SPELLINGS = [
    ("adapters/qwen2", r"lora_([AB])\.weight$", r"lora_\1.default.weight"),
    ("adapters/qwen2", r"lora_A\.weight$", r"lora_A.default.weight"),  # one of the two
    ("variants/qwen2_dora", r"lora_magnitude_vector$", r"lora_magnitude_vector.weight"),
    ("variants/qwen2_dora", r"lora_magnitude_vector$", r"lora_magnitude_vector.default.weight"),
    ("variants/llama3_embed", r"lora_embedding_([AB])$", r"lora_embedding_\1.default"),
    ("variants/qwen2_trainable_tokens", r"tokens_delta$", r"tokens_delta.default"),
    ("variants/llama3_adalora", r"lora_([ABE])$", r"lora_\1.default"),
    ("variants/qwen2_lora_bias", r"lora_B\.(weight|bias)$", r"lora_B.default.\1"),
    ("variants/qwen2_bias_lora_only", r"base_layer\.bias$", r"bias"),  # PEFT before 0.6
    ("variants/qwen2_bias_all", r"base_layer\.bias$", r"bias"),
]


@pytest.mark.parametrize(("adapter", "pattern", "new"), SPELLINGS)
def test_other_spellings_load_to_the_same_numbers(reference, tmp_path, adapter, pattern, new):
    path = renamed(reference / adapter, tmp_path / "adapter", pattern, new)
    name = path_of_model(adapter)
    models = [load_directory(reference / "models" / name) for _ in range(2)]
    for model, found in zip(models, (reference / adapter, path), strict=True):
        load_adapter(model, found)
    first, second = (dict(model.parameters_and_names()) for model in models)
    assert first.keys() == second.keys()
    for key, parameter in first.items():
        np.testing.assert_array_equal(parameter.asnumpy(), second[key].asnumpy(), err_msg=key)


def path_of_model(adapter: str) -> str:
    return adapter.split("/")[1].split("_")[0]


@pytest.mark.parametrize(("adapter", "pattern", "new"), SPELLINGS)
def test_merging_and_checking_read_them_too(reference, tmp_path, adapter, pattern, new):
    path = renamed(reference / adapter, tmp_path / "adapter", pattern, new)
    base = reference / "models" / path_of_model(adapter)
    entries = open_model(base, read_json(base / "config.json")).entries
    entries.setdefault("lm_head.weight", entries["model.embed_tokens.weight"])
    if "lora_bias" not in adapter:  # which needs layers with one
        assert read_updates(path, entries).keys() == read_updates(reference / adapter, entries).keys()
    table = {check.name: check for check in check_files(path, base)}
    assert all(check.status != "fault" for check in table.values())
    names = table["vLLM: names"]
    assert names.status == "warning" and "spelled as PEFT reads and vLLM does not" in names.text
    assert "vLLM: names" not in {check.name for check in check_files(reference / adapter, base)}


def test_combining_reads_them_too(reference, tmp_path):
    path = renamed(reference / "adapters" / "qwen3", tmp_path / "adapter", *SPELLINGS[0][1:])
    usual, other = read_adapter(reference / "adapters" / "qwen3"), read_adapter(path)
    assert usual.tensors.keys() == other.tensors.keys()
    for name, factors in usual.tensors.items():
        for one, two in zip(factors, other.tensors[name], strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_bias_in_both_places_is_refused(reference, tmp_path):
    path = shutil.copytree(reference / "variants" / "qwen2_bias_all", tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.base_layer.bias"))
    save_file({**tensors, name.replace("base_layer.", ""): tensors[name]}, path / "adapter_model.safetensors")
    with pytest.raises(LoraMsError, match=r"q_proj.base_layer.bias is there twice, once as .*q_proj"):
        load_adapter(load_directory(reference / "models" / "qwen2"), path)


def test_what_we_save_again_has_the_usual_names(reference, tmp_path):
    path = renamed(reference / "adapters" / "qwen2", tmp_path / "adapter", *SPELLINGS[0][1:])
    model = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
    lora_ms.PeftModel.from_pretrained(model, path).save_pretrained(tmp_path / "again")
    usual = load_file(reference / "adapters" / "qwen2" / "adapter_model.safetensors")
    assert sorted(load_file(tmp_path / "again" / "adapter_model.safetensors")) == sorted(usual)


def test_one_tensor_under_two_spellings_is_refused(reference, tmp_path):
    path = shutil.copytree(reference / "adapters" / "qwen2", tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    double = name.replace("lora_A.weight", "lora_A.default.weight")
    save_file({**tensors, double: tensors[name]}, path / "adapter_model.safetensors")
    with pytest.raises(LoraMsError, match="is there twice, once as .*lora_A"):
        load_adapter(load_directory(reference / "models" / "qwen2"), path)


@pytest.mark.parametrize(
    ("key", "usual"),
    [
        ("m.q_proj.lora_A.weight", "m.q_proj.lora_A.weight"),
        ("m.lora_A.default.weight.q_proj.lora_B.weight", "m.lora_A.default.weight.q_proj.lora_B.weight"),
        ("m.q_proj.lora_A.other.weight", "m.q_proj.lora_A.other.weight"),
        ("m.default.weight", "m.default.weight"),
        ("m.q_proj.lora_E.default", "m.q_proj.lora_E"),
    ],
)
def test_only_ends_are_read_otherwise(key, usual):
    assert usual_key(key) == usual


# modules that are missing

MISSING = [
    (lambda name: "layers.1" not in name, {}, "down_proj of layers 1, q_proj of layers 1, v_proj of layers 1"),
    (lambda name: "layers.0.self_attn.q_proj" not in name, {}, "q_proj of layers 0"),
    (lambda name: "v_proj" not in name, {}, "v_proj of layers 0-1"),
    (lambda name: True, {"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "k_proj of layers 0-1"),
    (lambda name: "layers.1" not in name, {"target_modules": r".*\.(q|v|down)_proj"},
     "down_proj of layers 1, q_proj of layers 1, v_proj of layers 1"),
    (lambda name: True, {"modules_to_save": ["lm_head"]}, "lm_head"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "keys", "missing"), MISSING)
def test_missing_modules_are_a_fault(reference, tmp_path, wanted, keys, missing):
    path = shutil.copytree(reference / "adapters" / "qwen2", tmp_path / "adapter")
    keep(path, wanted)
    change(path, **keys)
    table = {check.name: check for check in check_files(path, reference / "models" / "qwen2")}
    assert table["complete"].status == "fault"
    assert table["complete"].text == f"adapter_config.json names modules of which it holds nothing: {missing}"


@pytest.mark.parametrize(("wanted", "keys", "missing"), MISSING[:5])
def test_loading_says_what_is_missing(reference, tmp_path, capsys, wanted, keys, missing):
    path = shutil.copytree(reference / "adapters" / "qwen2", tmp_path / "adapter")
    keep(path, wanted)
    change(path, **keys)
    line = f"warning: {path} holds nothing of {missing}, which its adapter_config.json names: "
    line += "these modules are the model's own"
    _, found = load_adapter(load_directory(reference / "models" / "qwen2"), path)
    assert found.notes == (line,)
    lora_ms.PeftModel.from_pretrained(
        load_directory(reference / "models" / "qwen2", model_class=ModelForCausalLM), path
    )
    assert capsys.readouterr().out == f"{line}\n"


def test_a_stored_adapter_may_name_modules_that_are_not_there(reference, tmp_path):
    path = shutil.copytree(reference / "adapters" / "qwen2", tmp_path / "adapter")
    change(path, target_modules=["q_proj", "v_proj", "down_proj", "Wqkv"], layers_to_transform=[0, 1, 7])
    _, found = load_adapter(load_directory(reference / "models" / "qwen2"), path)
    assert len(found.modules) == 6 and not found.notes


@pytest.mark.parametrize(
    "variant",
    ["qwen2_layers_to_transform", "qwen2_exclude_modules", "qwen2_regex_target", "qwen2_all_linear", "llama3_adalora",
     "qwen2_embed", "qwen2_modules_to_save_head", "qwen2_modules_to_save_norms", "qwen2_bias_all", "llama2_lm_head",
     "qwen2_lm_head_tying", "qwen2_modules_to_save_tying", "qwen3_embed_dora", "qwen2_trainable_tokens",
     "qwen3_trainable_tokens_head"],
)  # fmt: skip
def test_nothing_is_missing_of_what_peft_saved(reference, capsys, variant):
    path, base = reference / "variants" / variant, reference / "models" / variant.split("_")[0]
    assert "complete" not in {check.name for check in check_files(path, base)}
    _, found = load_adapter(load_directory(base), path)
    assert found.notes == () and capsys.readouterr().out == ""


def test_names_by_leaf_and_layer(reference):
    config = read_adapter_config(reference / "adapters" / "qwen2")
    names = [f"model.layers.{i}.self_attn.{leaf}" for i in range(6) for leaf in ("q_proj", "k_proj", "v_proj")]
    held = [name for name in names if not name.startswith(("model.layers.2", "model.layers.4", "model.layers.5"))]
    assert missing_modules(config, held, names) == "q_proj of layers 2, 4-5, v_proj of layers 2, 4-5"
    assert missing_modules(config, names, names) == ""


# messages of another model's adapter


def wide(target, layers: int):
    """An adapter for a model of ``layers`` layers and another width."""
    target.mkdir()
    shape = {"A": (4, 80), "B": (80, 4)}
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.{leaf}.lora_{factor}.weight": np.ones(shape[factor], np.float32)
        for i in range(layers)
        for leaf in ("q_proj", "v_proj")
        for factor in "AB"
    }
    save_file(tensors, target / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("layers", [3, 40])
@pytest.mark.parametrize("command", ["load", "merge", "python"])
def test_another_models_adapter_is_told_in_short(reference, tmp_path, layers, command):
    path, base = wide(tmp_path / "wide", layers), reference / "models" / "qwen2"
    calls = {
        "load": lambda: load_adapter(load_directory(base), path),
        "merge": lambda: read_updates(path, open_model(base, read_json(base / "config.json")).entries),
        "python": lambda: lora_ms.PeftModel.from_pretrained(load_directory(base, model_class=ModelForCausalLM), path),
    }
    with pytest.raises(LoraMsError) as caught:
        calls[command]()
    text = str(caught.value).replace(str(path), "wide")
    assert text.startswith("wide: made for another model: ")
    # of the first two layers each shape is wrong, of the others each tensor has no place
    assert text.endswith(f" and {4 * layers - 3} more") and len(text) < 500


def test_logits_of_an_incomplete_adapter_are_those_of_its_part(reference, golden, tmp_path):
    """What is missing is the model's own: the same as an adapter that names the part."""
    whole = reference / "adapters" / "qwen2"
    half = shutil.copytree(whole, tmp_path / "half")
    keep(half, lambda name: "layers.1" not in name)
    part = shutil.copytree(half, tmp_path / "part")
    change(part, layers_to_transform=[0])
    values, found = golden("adapter_logits_qwen2"), []
    for path in (half, part):
        model = load_directory(reference / "models" / "qwen2")
        load_adapter(model, path)
        found.append(model.set_train(False)(Tensor(values["input_ids"])).asnumpy())
    np.testing.assert_array_equal(found[0], found[1])
