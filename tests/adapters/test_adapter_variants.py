"""Every kind of adapter that PEFT writes: its logits, merged, saved again and loaded again.

The kinds run as compiled graphs on one model each, and operator by operator on the others, which share their cells.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

from lora_ms.adapters.inject import adapted_layers, adapter_cells, inject, saved_layers, select
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.lora import LoraConfig, LoraSpec
from lora_ms.adapters.peft_format import adapter_tensors, load_adapter, read_adapter_config, save_adapter
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory

pytestmark = pytest.mark.usefixtures("graph_mode")
VARIANTS = Path(__file__).parents[1] / "reference" / "variants"
# PiSSA's fast form as PEFT stores it: what it took out of the weight was random, and is not in the file
REFUSED = "qwen2_pissa_niter_4"
NAMES = sorted(path.name for path in VARIANTS.iterdir() if path.is_dir() and path.name != REFUSED)
VIRTUAL = ("prefix", "prompt", "ptuning")  # methods of virtual tokens
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def model_of(name: str) -> str:
    return name.partition("_")[0]


def kind_of(name: str) -> str:
    return name.partition("_")[2]


# the first of each kind, qwen2 before the others: its layers have biases and its head is tied
IN_GRAPH = {kind_of(name): name for name in sorted(NAMES, key=lambda name: (model_of(name) != "qwen2", name))[::-1]}


@contextmanager
def eager() -> Iterator[None]:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def fresh(native, reference) -> Callable:
    return lambda name: load_directory(reference / "models" / model_of(name), operators=native).set_train(False)


@pytest.fixture(scope="module")
def bases(fresh) -> Callable:
    """``bases(name)``: the model of that variant, loaded and compiled once, and never given an adapter."""
    models: dict[str, ms.nn.Cell] = {}

    def base(name: str):
        if model_of(name) not in models:
            models[model_of(name)] = fresh(name)
        return models[model_of(name)]

    return base


def assert_near(found: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=0, atol=1e-4)


def test_every_kind_is_there():
    assert len(NAMES) >= 60 and {model_of(name) for name in NAMES} == {"llama2", "llama3", "qwen2", "qwen3"}


@pytest.mark.parametrize("name", NAMES)
def test_logits_without_with_and_merged(golden, bases, fresh, name):
    values, model = golden(f"variants/{name}"), fresh(name)
    input_ids = Tensor(values["input_ids"])
    assert_near(bases(name)(input_ids), values["base_logits"])
    load_adapter(model, VARIANTS / name)
    if name in IN_GRAPH.values():
        assert_near(model(input_ids), values["logits"])
    with eager():
        if name not in IN_GRAPH.values():
            assert_near(model(input_ids), values["logits"])
        if kind_of(name).startswith(VIRTUAL):
            with pytest.raises(LoraMsError, match="cannot be merged"):
                merge(model)
            return
        merge(model)
        assert not adapter_cells(model)
        assert_near(model(input_ids), values.get("merged_logits", values["logits"]))


def places(model) -> dict[str, LoraSpec]:
    return {name: layer.spec for name, layer in adapted_layers(model).items()}


def scalings(model) -> dict[str, float]:
    return {
        f"{name}.{setting}": float(parameter.asnumpy())
        for name, layer in adapted_layers(model).items()
        for setting, parameter in layer.settings().items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(fresh, tmp_path, name):
    model, again = fresh(name), fresh(name)
    config, report = load_adapter(model, VARIANTS / name)
    save_adapter(model, tmp_path, config, "base")
    stored, saved = load_file(VARIANTS / name / "adapter_model.safetensors"), load_file(tmp_path / WEIGHTS)
    if not config.changed_base:
        # PEFT puts the untouched base weight beside an adapter on the head or the embedding
        wanted = {key: value for key, value in stored.items() if not key.endswith("base_layer.weight")}
        assert saved.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(saved[key], value, err_msg=key)
    found, other = load_adapter(again, tmp_path)
    assert scalings(again) == pytest.approx(scalings(model), rel=1e-6)
    assert other.trainable == report.trainable * (2 if config.changed_base else 1)
    if not config.changed_base:
        assert places(again) == places(model)
        ours, theirs = adapter_tensors(model, config), adapter_tensors(again, found)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            np.testing.assert_array_equal(theirs[key], value, err_msg=key)


BY_PLACE = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("lora_rank", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "feedforward_modules"),
}


@pytest.mark.parametrize("name", NAMES)
def test_settings_saved_and_read_again(fresh, tmp_path, name):
    """What is not by place comes back as it was; what is by place chooses the same layers, ranks and alphas."""
    model = fresh(name)
    config, _ = load_adapter(model, VARIANTS / name)
    save_adapter(model, tmp_path, config, "base")
    again = read_adapter_config(tmp_path)
    assert type(again) is type(config)
    for key in config.__dataclass_fields__.keys() - BY_PLACE:
        assert getattr(again, key) == getattr(config, key), key
    assert not again.changed_base
    factor = 2 if config.changed_base else 1
    wanted = {path: type(spec)(*(factor * value for value in spec)) for path, spec in places(model).items()}
    assert select(fresh(name), again) == wanted
    if isinstance(config, AdaLoraConfig):
        ranks = json.loads((VARIANTS / name / "adapter_config.json").read_text())["rank_pattern"] or {}
        assert config.kept == {key.removesuffix(".lora_E"): tuple(mask) for key, mask in ranks.items()}
    whole = {path for path, cell in adapter_cells(model).items() if cell.spec is None and "weight" in cell.tensors()}
    if not config.trains_all_biases:  # biases of other layers are no modules to save
        assert saved_layers(fresh(name), again).keys() == whole
    copy = fresh(name)
    load_adapter(copy, tmp_path)
    save_adapter(copy, tmp_path / "twice", again, "base")
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("name", [name for name in NAMES if kind_of(name) in ("pissa", "olora")])
def test_starts_taken_out_of_the_weight(golden, fresh, tmp_path, name):
    """A fresh adapter starts as PEFT's; saved, it is a plain adapter of twice the rank on the untouched weight."""
    values, model = golden(f"variants/{name}"), fresh(name)
    rank = read_adapter_config(VARIANTS / name).lora_rank
    inject(model, LoraConfig(rank, 3.0, target_modules=("q_proj", "v_proj"), init_lora_weights=kind_of(name)))
    for path, layer in adapted_layers(model).items():
        a, b = (values[f"initial/{PREFIX}{path}.lora_{factor}.weight"] for factor in "AB")
        np.testing.assert_allclose(layer.lora_b.asnumpy() @ layer.lora_a.asnumpy(), b @ a, rtol=0, atol=1e-5)
    path = "model.layers.0.self_attn.v_proj"
    residual = values[f"residual/{path}.weight"]
    np.testing.assert_allclose(adapted_layers(model)[path].base.weight.asnumpy(), residual, rtol=0, atol=1e-5)
    trained, plain = fresh(name), fresh(name)
    config, _ = load_adapter(trained, VARIANTS / name)
    save_adapter(trained, tmp_path, config)
    load_adapter(plain, tmp_path)
    assert set(places(plain).values()) == {LoraSpec(2 * rank, 6)}
    for path, layer in adapted_layers(plain).items():
        assert layer.initial is None
        np.testing.assert_array_equal(
            layer.base.weight.asnumpy(), fresh(name).parameters_dict()[f"{path}.weight"].asnumpy()
        )
    with eager():
        assert_near(plain(Tensor(values["input_ids"])), values["logits"])


def test_a_start_that_nobody_can_find_again_is_refused(fresh):
    model = fresh(REFUSED)
    with pytest.raises(LoraMsError) as caught:
        load_adapter(model, VARIANTS / REFUSED)
    file = VARIANTS / REFUSED / "adapter_config.json"
    assert str(caught.value) == (
        f"{file}: what pissa_niter_4 took out of the weights was random and is not in the file; "
        "save it in PEFT with path_initial_model_for_weight_conversion"
    )
    assert not adapter_cells(model)
