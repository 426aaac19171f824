"""Adapter files that do not fit or do not make sense: one line with every reason, and the model as it was."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_ms.adapters.inject import adapted_layers
from lora_ms.adapters.methods import METHODS
from lora_ms.adapters.peft_config import UNSUPPORTED
from lora_ms.adapters.peft_format import load_adapter, read_adapter_config
from lora_ms.errors import LoraMsError

pytestmark = pytest.mark.usefixtures("graph_mode")
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


def error_of(function, *args) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_adapter_for_another_model_names_three_shapes(reference, bare):
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
    assert error_of(load_adapter, model, path) == f"{path}: made for another model: {'; '.join(faults[:3])} and 7 more"
    assert not adapted_layers(model)


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
        f"{dora} (64,) has no place",
        f"{far} (4, 64) has no place in the model",
    ]
    save_file({}, path / "adapter_model.safetensors")
    assert error_of(load_adapter, bare(), path) == f"{path}: made for another model: it holds no LoRA tensor"


# every key that asks for what is not computed here, with a value that asks for it
REFUSED = {
    "fan_in_fan_out": True,
    "target_parameters": ["x"],
    "alora_invocation_tokens": [1],
    "layer_replication": [[0, 2]],
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"sample_scaler": 1},
    "kasa_config": {"beta": 1},
    "velora_config": {"rank": 1},
}


def test_keys_that_are_not_computed_are_refused_together(bare, copied):
    assert set(REFUSED) == {*UNSUPPORTED} - {"trainable_token_indices"}  # which LoRA has
    path = copied("qwen2", **REFUSED)
    listed = ", ".join(f"{key}: {REFUSED[key]}" for key in UNSUPPORTED if key in REFUSED)
    assert error_of(load_adapter, bare(), path) == f"{path / 'adapter_config.json'}: not supported: {listed}"


@pytest.mark.parametrize("key", REFUSED)
def test_each_key_that_is_not_computed_is_refused(bare, copied, key):
    model, path = bare(), copied("qwen2", **{key: REFUSED[key]})
    file = path / "adapter_config.json"
    assert error_of(load_adapter, model, path) == f"{file}: not supported: {key}: {REFUSED[key]}"
    assert not adapted_layers(model)


def test_tokens_that_are_trained(bare, copied):
    path = copied("qwen2", trainable_token_indices=[1])
    assert error_of(load_adapter, bare(), path) == (
        f"{path}: made for another model: {PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta is missing"
    )
    message = "trainable_token_indices names token 128: the model's vocabulary has 128"
    assert error_of(load_adapter, bare(), copied("qwen2", trainable_token_indices=[128])) == message
    path = copied("qwen2", trainable_token_indices=[[1]])
    assert "trainable_token_indices expects token ids below" in error_of(load_adapter, bare(), path)
    path = copied("qwen2", trainable_token_indices=[1], peft_type="ADALORA", target_r=2, init_r=4)
    assert "not supported: trainable_token_indices: [1]" in error_of(load_adapter, bare(), path)


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_keys_left_empty_ask_for_nothing(bare, copied, value):
    load_adapter(bare(), copied("qwen2", **dict.fromkeys(REFUSED, value)))


def test_weights_that_loftq_changed_are_not_in_the_file(bare, copied):
    message = error_of(load_adapter, bare(), copied("qwen2", init_lora_weights="loftq"))
    assert "loftq put the weights themselves into four bits, and these are not in the file" in message


def test_no_layers_are_all_layers(bare, copied):
    """As PEFT reads an empty list."""
    assert read_adapter_config(copied("qwen2", layers_to_transform=[])).layers_to_transform is None


def test_a_key_that_is_computed_wants_its_tensors(bare, copied):
    """An adapter that says it is DoRA, or has a bias beside B, but holds neither."""
    assert f"{PREFIX}{Q0}.lora_magnitude_vector is missing" in error_of(
        load_adapter, bare(), copied("qwen2", use_dora=True)
    )
    assert f"{PREFIX}{Q0}.lora_B.bias is missing" in error_of(load_adapter, bare(), copied("qwen2", lora_bias=True))
    message = error_of(load_adapter, bare(), copied("qwen2", lora_bias=False, use_dora=False, bias="all"))
    assert f"{PREFIX}{Q0}.base_layer.bias is missing" in message
    assert message.endswith(" is missing and 3 more")  # of q_proj, v_proj and k_proj in two layers


def test_ranks_of_the_file_are_held_against_its_shapes(bare, copied):
    path = copied("qwen2", rank_pattern={"q_proj": 8})
    faults = []
    for number in "01":
        name = f"{PREFIX}model.layers.{number}.self_attn.q_proj"
        faults += [f"{name}.lora_A.weight is (4, 64), should be (8, 64)"]
        faults += [f"{name}.lora_B.weight is (64, 4), should be (64, 8)"]
    found = f"{'; '.join(faults[:3])} and 1 more"
    assert error_of(load_adapter, bare(), path) == f"{path}: made for another model: {found}"


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_no_module_of_the_file(bare, copied, key):
    path = copied("qwen2", **{key: {"v_proj": 4, "o_proj": 4}})
    assert error_of(load_adapter, bare(), path) == f"{path}: {key} 'o_proj' matches none of the adapter's modules"


def test_alpha_and_rslora_of_the_file_scale(bare, copied):
    model = bare()
    load_adapter(model, copied("qwen2", alpha_pattern={"0.self_attn.q_proj": 3, "q_proj": 5}, use_rslora=True))
    found = {name: float(layer.scaling.asnumpy()) for name, layer in adapted_layers(model).items()}
    alphas = dict.fromkeys(found, 8) | {Q0: 3, "model.layers.1.self_attn.q_proj": 5}
    assert found == {name: np.float32(alpha / 2) for name, alpha in alphas.items()}  # over the root of rank 4


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_truncated_file(bare, copied, cut):
    path = copied("qwen2")
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    message = error_of(load_adapter, bare(), path)
    assert message.startswith(f"{file}: ") and "\n" not in message


def test_configurations_that_are_no_lora(bare, copied, tmp_path):
    path = copied("qwen2", peft_type="LOHA")
    supported = ", ".join(method.PEFT_TYPE for method in METHODS.values())
    file = path / "adapter_config.json"
    assert error_of(read_adapter_config, path) == f"{file}: peft_type 'LOHA' is not supported; supported: {supported}"
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


def test_not_a_number_is_never_loaded(bare, copied):
    path = copied("qwen2")
    stored = load_file(path / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"
    stored[name][0, 0] = np.nan
    save_file(stored, path / "adapter_model.safetensors")
    assert error_of(load_adapter, bare(), path) == f"{path}: {name} holds NaN or infinity"


def test_a_module_saved_whole_wants_its_tensor(bare, copied):
    """PEFT warns of the missing key; the module would be the base's, though the adapter was trained with another."""
    path = copied("qwen2", modules_to_save=["lm_head"])
    assert error_of(load_adapter, bare(), path) == f"{path}: made for another model: {PREFIX}lm_head.weight is missing"
