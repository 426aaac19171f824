"""Starts of LoRA that look at data, against PEFT."""

import numpy as np
import pytest

from lora_ms.adapters.inject import inject, target_layers
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.data.example import TokenRow
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory
from lora_ms.recipes.data import held_out_plan
from lora_ms.runtime.device import Runtime
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
    return model, list(layer_inputs(model, plan))


@pytest.mark.parametrize("rho", [1, 2])
def test_eva_starts_as_in_peft(taken, golden, rho):
    z = golden("eva_qwen2")
    model, inputs = taken
    of_module = {name: value for together, value in inputs for name in together}
    config = LoraConfig(4, 6, target_modules=TARGETS, init_lora_weights="eva", eva_rho=rho)
    found, tensors = config.started(inputs, config.specs(target_layers(model)))
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


def test_eva_needs_rows(taken, reference, native):
    model = load_directory(reference / "models" / "qwen2", operators=native)
    with pytest.raises(LoraMsError, match="starts from rows"):
        inject(model, LoraConfig(4, 4, init_lora_weights="eva"))
    config = LoraConfig(4, 4, target_modules=("q_proj",), init_lora_weights="eva")
    few = [(together, value[:3]) for together, value in taken[1]]
    with pytest.raises(LoraMsError, match="needs as many tokens"):
        config.started(few, config.specs(target_layers(model)))
