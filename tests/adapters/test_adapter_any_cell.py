"""Adapters in cells that are no model of ours: any dense layer, whatever stands around it and however it is named."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from lora_ms.adapters.inject import adapted_layers, adapter_cells, inject
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.peft_format import adapter_tensors, load_adapter, save_adapter
from lora_ms.nn.layers import Embedding

pytestmark = pytest.mark.usefixtures("graph_mode")
IDS = Tensor(np.random.default_rng(0).integers(0, 24, (2, 5)).astype(np.int32))


def config(**settings) -> LoraConfig:
    return LoraConfig(**{"lora_rank": 2, "lora_alpha": 3.0, **settings})


def move(model: nn.Cell, amount: float = 0.3) -> None:
    """What trains, away from where it starts: every tensor by numbers of its own."""
    rng = np.random.default_rng(1)
    for cell in adapter_cells(model).values():
        for parameter in cell.tensors().values():
            noise = rng.standard_normal(parameter.shape, np.float32) * np.float32(amount)
            parameter.set_data(Tensor(parameter.asnumpy() + noise))


class Another(nn.Cell):
    """No model of ours: dense layers side by side, one with an activation, and rows of more than two axes."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(5)

        def dense(n_in, n_out, **kwargs):
            values = (Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in ((n_out, n_in), n_out))
            return nn.Dense(n_in, n_out, *values, **kwargs)

        self.embed_tokens = Embedding.zeros(24, 6, ms.float32)
        self.embed_tokens.weight.set_data(Tensor(rng.standard_normal((24, 6)).astype(np.float32)))
        self.blocks = nn.SequentialCell(dense(6, 8, activation="relu"), dense(8, 6))
        self.out = dense(6, 4)

    def construct(self, input_ids):
        x = self.embed_tokens(input_ids.reshape((-1,)))
        return self.out(self.blocks(x.reshape((*input_ids.shape, -1))))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("blocks.0", "out"), "lora_bias": True},
        {"target_modules": ("blocks.0", "blocks.1"), "use_dora": True},
        {"target_modules": ("blocks.1",), "init_lora_weights": "pissa"},
        {"target_modules": ("embed_tokens", "out"), "use_rslora": True},
        {"target_modules": ("blocks.1",), "bias": "all"},
        {"target_modules": ("blocks.1",), "modules_to_save": ("blocks.0", "out")},
    ],
    ids=lambda settings: list(settings)[-1],
)
def test_any_cell_with_dense_layers(settings):
    """Every tensor of the adapter counts, and merged the cell says the same."""
    model = Another()
    before = model(IDS).asnumpy()
    inject(model, config(**settings))
    np.testing.assert_allclose(model(IDS).asnumpy(), before, rtol=0, atol=2e-5)
    move(model)
    moved = model(IDS).asnumpy()
    for path, cell in adapter_cells(model).items():
        for factor, parameter in cell.tensors().items():
            kept = parameter.asnumpy()
            parameter.set_data(Tensor(kept + np.float32(0.5)))
            assert np.abs(model(IDS).asnumpy() - moved).max() > 1e-3, f"{path}.{factor}"
            parameter.set_data(Tensor(kept))
    np.testing.assert_allclose(merge(model)(IDS).asnumpy(), moved, rtol=0, atol=5e-5)


def test_an_adapter_with_odd_names_survives(tmp_path):
    """Paths that hold "weight" or "lora_", of which keys are made."""

    class Odd(nn.Cell):
        def __init__(self):
            super().__init__()
            self.lora_weight = nn.Dense(4, 3)
            self.lora_a = nn.SequentialCell(nn.Dense(3, 3))

        def construct(self, x):
            return self.lora_a(self.lora_weight(x))

    model, settings = Odd(), config(target_modules=("lora_weight", "lora_a.0"), lora_bias=True)
    inject(model, settings)
    assert adapted_layers(model).keys() == {"lora_weight", "lora_a.0"}
    move(model)
    save_adapter(model, tmp_path, settings)
    again = Odd()
    load_adapter(again, tmp_path)
    tensors = adapter_tensors(again, settings)
    assert len(tensors) == 6
    for key, value in adapter_tensors(model, settings).items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)
