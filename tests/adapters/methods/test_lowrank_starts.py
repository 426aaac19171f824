"""Starts of LoRA that look at data, against PEFT."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapted_layers, build, inject, target_layers
from lora_ms.adapters.methods.base import SeenRows
from lora_ms.adapters.methods.lora import LoraConfig, LoraSpec
from lora_ms.adapters.peft_files import read_adapter_config
from lora_ms.adapters.peft_format import load_adapter, save_adapter
from lora_ms.data.example import TokenRow
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory
from lora_ms.recipes.data import held_out_plan
from lora_ms.runtime.device import Runtime
from lora_ms.train.layer_gradients import layer_gradients
from lora_ms.train.layer_inputs import layer_inputs

pytestmark = pytest.mark.usefixtures("graph_mode")
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def taken(reference, golden, native):
    """What the projections of qwen2 take, of the rows of tests/reference/make_eva.py, packed in several lines."""
    z = golden("trace_qwen2")
    ids, labels = (z[key].reshape(-1, 16)[:24] for key in ("input_ids", "labels"))
    rows = [TokenRow(str(i), ids[i, :n], labels[i, :n]) for i, n in enumerate(z["lengths"].ravel()[:24])]
    model = load_directory(reference / "models" / "qwen2", operators=native)
    plan = held_out_plan(TokenStore.of(rows), 8, None, 16, Runtime("CPU"))
    inputs = list(layer_inputs(model, plan))
    layers = target_layers(model)
    gradients = dict(layer_gradients(model, plan, LoraConfig(target_modules=TARGETS).specs(layers)))
    assert not any(parameter.requires_grad for parameter in model.get_parameters())
    return model, SeenRows(
        lambda: inputs, lambda names: [(name, gradients[name]) for name in names], lambda name: layers[name].numbers()
    )


@pytest.mark.parametrize("rho", [1, 2])
def test_eva_starts_as_in_peft(taken, golden, rho):
    z = golden("eva_qwen2")
    model, seen = taken
    of_module = {name: value for together, value in seen.inputs() for name in together}
    config = LoraConfig(4, 6, target_modules=TARGETS, init_lora_weights="eva", eva_rho=rho)
    found, tensors = config.started(seen, config.specs(target_layers(model)))
    wanted = {key.removeprefix(f"{rho}/"): value for key, value in z.items() if key.startswith(f"{rho}/")}
    scalings = {key.removeprefix("scaling/"): wanted.pop(key) for key in list(wanted) if key.startswith("scaling/")}
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        ours = tensors[name]["lora_A.weight"]
        assert ours.shape == value.shape == (found.spec(name).lora_rank, value.shape[1]), name
        likeness = np.abs((ours * value).sum(1))  # a direction has no sign
        # PEFT looks for the directions in a random subspace, without any to spare where rho is 1: the last ones are off
        assert likeness.min() > (0.998 if rho == 2 else 0.7), name
        centred = of_module[name] - of_module[name].mean(0)
        explained = [float(np.square(centred @ directions.T).sum()) for directions in (ours, value)]
        assert explained[1] <= explained[0] * (1 + 1e-4), name
        assert explained[1] >= explained[0] * (0.999 if rho == 2 else 0.98), name
        assert found.scaling(name) == pytest.approx(float(scalings[name]))


def near_but_for_signs(found: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray, most: float) -> None:
    """Rows of A with columns of B, each pair of either sign; most: the largest difference over the largest number."""
    ours = found["lora_A.weight"], found["lora_B.weight"]
    signs = np.sign((ours[0] * a).sum(1))
    for mine, theirs in ((ours[0] * signs[:, None], a), (ours[1] * signs, b)):
        assert np.abs(mine - theirs).max() <= most * np.abs(theirs).max()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(taken, golden, method):
    z, (model, seen) = golden("starts_qwen2"), taken
    config = LoraConfig(4, 6, target_modules=TARGETS, init_lora_weights="corda", corda_method=method)
    started, found = config.started(seen, config.specs(target_layers(model)))
    assert started.begun and len(found) == 10
    for name, tensors in found.items():
        near_but_for_signs(tensors, z[f"{method}/{name}/A"], z[f"{method}/{name}/B"], most=2e-3)


def test_lora_ga_starts_as_in_peft(taken, golden):
    """A and B are of different directions of the gradient, and each has either sign."""
    z, (model, seen) = golden("starts_qwen2"), taken
    config = LoraConfig(4, 6, target_modules=TARGETS, init_lora_weights="lora_ga")
    started, found = config.started(seen, config.specs(target_layers(model)))
    assert started.begun and len(found) == 10
    for name, tensors in found.items():
        for ours, theirs in (
            (tensors["lora_A.weight"], z[f"lora_ga/{name}/A"]),
            (tensors["lora_B.weight"].T, z[f"lora_ga/{name}/B"].T),
        ):
            signs = np.sign((ours * theirs).sum(1))[:, None]
            assert np.abs(signs * ours - theirs).max() <= 2e-3 * np.abs(theirs).max(), name


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_what_is_found_is_subtracted_and_stored(taken, reference, native, tmp_path, init, request):
    """The model is unchanged at first, and the file is a plain adapter of twice the rank."""
    ms.set_context(mode=ms.PYNATIVE_MODE)  # models that run once or twice
    request.addfinalizer(lambda: ms.set_context(mode=ms.GRAPH_MODE))
    model = load_directory(reference / "models" / "qwen2", operators=native)
    ids = Tensor(np.arange(5, 25, dtype=np.int32)[None])
    config = LoraConfig(2, 6, target_modules=("q_proj", "down_proj"), init_lora_weights=init)
    started, found = config.started(taken[1], config.specs(target_layers(model)))
    base = model(ids).asnumpy()
    inject(model, started)
    for name, cell in adapted_layers(model).items():
        cell.begin_with(found[name])
        assert np.abs(cell.merged_weight() - target_layers(taken[0])[name].numbers()).max() < 1e-5
    np.testing.assert_allclose(model(ids).asnumpy(), base, rtol=0, atol=1e-4)
    for cell in adapted_layers(model).values():
        cell.lora_b.set_data(Tensor(cell.lora_b.asnumpy() + 0.1))
    moved = model(ids).asnumpy()
    assert np.abs(moved - base).max() > 0.1
    save_adapter(model, tmp_path, started)
    plain = load_directory(reference / "models" / "qwen2", operators=native)
    stored, _ = load_adapter(plain, tmp_path)
    assert (stored.lora_rank, stored.init_lora_weights, stored.begun) == (4, True, False)
    np.testing.assert_allclose(plain(ids).asnumpy(), moved, rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_starts_that_need_rows(taken, init):
    with pytest.raises(LoraMsError, match=f"{init} starts from rows"):
        build(taken[0], LoraConfig(4, 4, init_lora_weights=init), {"model.layers.0.self_attn.q_proj": LoraSpec(4, 4)})


def test_rows_and_modules_that_do_not_suit(taken):
    model, seen = taken
    few = seen._replace(inputs=lambda: [(together, value[:3]) for together, value in seen.inputs()])
    for init, rank, targets, rows, said in (
        ("eva", 4, ("q_proj",), few, "needs as many tokens"),
        ("lora_ga", 33, ("q_proj",), seen, "rank 33 of model.layers.0.self_attn.q_proj is above half"),
        ("corda", 2, ("lm_head",), seen, "corda is for projections of layers: lm_head is none"),
    ):
        config = LoraConfig(rank, 4, target_modules=targets, init_lora_weights=init)
        with pytest.raises(LoraMsError, match=said):
            config.started(rows, config.specs(target_layers(model)))


def test_a_start_that_peft_left_in_the_weights_is_refused(reference, tmp_path):
    settings = json.loads((reference / "adapters" / "qwen2" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": "corda"}))
    with pytest.raises(LoraMsError, match="what corda took out of the weights came from rows and is not in the file"):
        read_adapter_config(tmp_path)
