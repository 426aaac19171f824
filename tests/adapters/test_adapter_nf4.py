"""Adapters on weights in NF4: the same as on the same numbers in float32, whatever the method."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapter_cells, inject
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LayerGroup, LoraConfig
from lora_ms.adapters.methods.miss import MissConfig
from lora_ms.adapters.methods.vera import VeraConfig
from lora_ms.adapters.peft_format import load_adapter, save_adapter
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory, quantised_layers
from lora_ms.quant.settings import Quantisation

pytestmark = pytest.mark.usefixtures("graph_mode")
IDS = Tensor(np.random.default_rng(0).integers(4, 128, (2, 6)).astype(np.int32))
QD = ("q_proj", "down_proj")


def config(**settings) -> LoraConfig:
    return LoraConfig(**{"lora_rank": 2, "lora_alpha": 3.0, "target_modules": QD, **settings})


KINDS = {
    "lora": config(),
    "dora": config(use_dora=True),
    "lora_bias": config(lora_bias=True),
    "bias_all": config(bias="all"),
    "gaussian": config(init_lora_weights="gaussian"),
    "adalora": AdaLoraConfig(4, 6.0, target_modules=QD, target_rank=2),
    "ia3": IA3Config(),
    "vera": VeraConfig(QD, lora_rank=4, d_initial=0.5),
    "miss": MissConfig(QD, lora_rank=4),
    "head_and_embedding": config(target_modules=("q_proj", "lm_head", "embed_tokens")),
    "saved_whole": config(modules_to_save=("k_proj", "norm")),
    "layer_groups": config(layer_groups=(LayerGroup((0,), 4, 8.0), LayerGroup((1,), 2, 3.0, QD))),
}


def quantised(reference, operators, double: bool = True, **settings):
    how = Quantisation(double, **settings)
    return load_directory(reference / "models" / "qwen2", operators=operators, quantisation=how).set_train(False)


def with_its_numbers(reference, operators, model):
    """The model with whole weights of the same numbers."""
    found = load_directory(reference / "models" / "qwen2", operators=operators).set_train(False)
    parameters = dict(found.parameters_and_names())
    for name, cell in quantised_layers(model).items():
        parameters[f"{name}.weight"].set_data(Tensor(cell.numbers()))
    return found


def move(model) -> None:
    """What trains, away from where it starts: every tensor by numbers of its own."""
    rng = np.random.default_rng(1)
    for cell in adapter_cells(model).values():
        for parameter in cell.tensors().values():
            noise = rng.standard_normal(parameter.shape, np.float32) * np.float32(0.2)
            parameter.set_data(Tensor(parameter.asnumpy() + noise))


@pytest.fixture(autouse=True)
def eager(graph_mode):
    """A model that runs once is not worth a graph."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.mark.parametrize("kind", KINDS)
def test_as_on_the_same_numbers(reference, native, tmp_path, kind):
    model = quantised(reference, native)
    twin = with_its_numbers(reference, native, model)
    for each in (model, twin):
        ms.set_seed(0)
        inject(each, KINDS[kind])
        move(each)
    found = model(IDS).asnumpy()
    np.testing.assert_allclose(found, twin(IDS).asnumpy(), rtol=0, atol=2e-5)
    save_adapter(model, tmp_path, KINDS[kind])
    again = quantised(reference, native)
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(again.set_train(False)(IDS).asnumpy(), found)
    merge(model)
    np.testing.assert_allclose(model(IDS).asnumpy(), found, rtol=0, atol=2e-4)


def test_all_weights_count(reference, native):
    model, whole = quantised(reference, native), load_directory(reference / "models" / "qwen2", operators=native)
    assert inject(model, config()) == inject(whole, config())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_quantised_weights_do_not_change(reference, native, init):
    with pytest.raises(LoraMsError, match=f"{init} changes the weights, and these are quantised: choose loftq"):
        inject(quantised(reference, native), config(init_lora_weights=init))


def test_loftq_starts_as_peft(reference, native, golden):
    model = quantised(reference, native, double=False)
    inject(model, config(lora_rank=4, lora_alpha=4, init_lora_weights="loftq"))
    wanted = golden("loftq_qwen2")
    cells = adapter_cells(model)
    assert cells.keys() == wanted.keys()
    for name, cell in cells.items():
        a, b = cell.factor_values()
        np.testing.assert_allclose(b @ a, wanted[name], rtol=0, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)


def test_loftq_says_what_its_scaling_does(reference, native):
    found = inject(quantised(reference, native), config(init_lora_weights="loftq"))
    assert found.notes == ("loftq expects lora_alpha equal to lora_rank: the error is added alpha / rank times",)


def test_loftq_needs_the_weights_before(reference, native):
    stored = load_directory(reference / "nf4" / "plain", operators=native)
    with pytest.raises(LoraMsError, match="loftq needs the weights before they were quantised: give the original"):
        inject(stored, config(init_lora_weights="loftq"))
    whole = load_directory(reference / "models" / "qwen2", operators=native)
    with pytest.raises(LoraMsError, match=r"loftq: model.layers.0.self_attn.q_proj is not quantised; give quant"):
        inject(whole, config(init_lora_weights="loftq"))


def test_loftq_leaves_whole_layers_alone(reference, native):
    model = quantised(reference, native, skip=("model.layers.0",))
    groups = (LayerGroup((0,), 2, 2.0), LayerGroup((1,), 2, 2.0, bits="nf4"))
    inject(model, config(init_lora_weights="loftq", layer_groups=groups))
    begun = {name: cell.lora_b.asnumpy().any() for name, cell in adapter_cells(model).items()}
    assert {name.split(".")[2]: value for name, value in begun.items()} == {"0": False, "1": True}


def test_layers_that_should_have_four_bits(reference, native):
    groups = (LayerGroup((0,), 2, 2.0, bits="nf4"), LayerGroup((1,), 2, 2.0))
    whole = load_directory(reference / "models" / "qwen2", operators=native)
    with pytest.raises(LoraMsError, match=r"q_proj should have four bits, but the model is already loaded"):
        inject(whole, config(layer_groups=groups))
