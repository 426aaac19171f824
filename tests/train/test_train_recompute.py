"""Activations computed again: the same numbers, with dropout, with a tied head, in any choice of layers."""

from dataclasses import replace

import numpy as np
import pytest

from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.nn import sharing
from lora_ms.train import shared_layers
from lora_ms.train.gradient import MicroStep, recomputed_layers
from lora_ms.train.optimizer import FlatAdamW, LossScaling


def small(**changes) -> DecoderConfig:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    return DecoderConfig(**sizes, **changes)


@pytest.mark.parametrize(
    ("recompute", "layers"), [(True, [0, 1, 2]), (False, []), (0, []), (2, [0, 1]), ([2, 0, 2], [0, 2])]
)
def test_layers_that_are_meant(recompute, layers):
    assert recomputed_layers(recompute, 3) == layers


@pytest.mark.parametrize("recompute", [4, [0, 3]])
def test_a_layer_that_is_not_there(recompute):
    with pytest.raises(LoraMsError, match="3 layers"):
        recomputed_layers(recompute, 3)


def test_dropout_meets_the_same_zeros(train, tmp_path):
    kept = train(tmp_path / "kept", dropout=0.3, max_steps=3)
    again = train(tmp_path / "again", dropout=0.3, max_steps=3, recompute=True)
    np.testing.assert_allclose(again.losses, kept.losses, rtol=1e-6)
    np.testing.assert_allclose(*([r["grad_norm"] for r in run.records] for run in (again, kept)), rtol=1e-5)


@pytest.fixture(scope="module", params=["", "layers.1.", "layers.1.mlp."])
def tied(native, request):
    """A model, its loss, a batch, the trainable parameters and their gradients: of all, or of the upper layer alone,
    or of a half of it."""
    import mindspore as ms
    from mindspore import Tensor, ops

    from lora_ms.models.hub import new_model
    from lora_ms.train.parts import SummedLoss

    sizes = small(num_hidden_layers=2, tie_word_embeddings=True, attention_bias=True)
    model = new_model(sizes, ms.float32, 0, native)
    for name, parameter in model.parameters_and_names():
        parameter.requires_grad = request.param in name
    params = ms.ParameterTuple([p for p in model.get_parameters() if p.requires_grad])
    loss = SummedLoss(model, model.config.vocab_size).set_train()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (2, 8)).astype(np.int32)
    batch = (ids, np.tile(np.arange(8, dtype=np.int32), (2, 1)), np.arange(16, dtype=np.int32)[::2], ids.ravel()[1::2])
    batch = [Tensor(value) for value in batch]
    value, gradients = ops.value_and_grad(loss, None, params)(*batch)
    gradients = [gradient.asnumpy() for gradient in gradients]
    assert gradients and all(np.abs(gradient).max() > 0 for gradient in gradients)
    return loss, batch, params, value.asnumpy(), gradients


def test_gradients_with_one_layer_computed_again(tied):
    loss, batch, params, value, gradients = tied
    optimizer = FlatAdamW(list(params), loss_scaling=LossScaling(2.0, dynamic=False))
    found = MicroStep(loss, optimizer, [0])(*batch)
    np.testing.assert_allclose(found.asnumpy(), value, rtol=1e-6)
    wanted = np.concatenate([2 * gradient.ravel() for gradient in gradients])
    np.testing.assert_allclose(optimizer.grad.asnumpy(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [1, shared_layers.BLOCK_LAYERS])
def test_gradients_block_by_block(tied, block, monkeypatch):
    """Two micro-batches; the layers have their own values afterwards."""
    monkeypatch.setattr(shared_layers, "BLOCK_LAYERS", block)
    loss, batch, params, value, gradients = tied
    before = {name: parameter.asnumpy() for name, parameter in loss.parameters_and_names()}
    optimizer = FlatAdamW(list(params), loss_scaling=LossScaling(2.0, dynamic=False))
    step = MicroStep(loss, optimizer, True)
    for _ in range(2):
        np.testing.assert_allclose(step(*batch).asnumpy(), value, rtol=1e-6)
    wanted = np.concatenate([4 * gradient.ravel() for gradient in gradients])
    np.testing.assert_allclose(optimizer.grad.asnumpy(), wanted, rtol=1e-4, atol=1e-6)
    for name, parameter in loss.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), before[name], err_msg=name)


@pytest.mark.parametrize(("pattern", "kinds"), [({}, 1), ({r"layers.2.mlp.*": 3}, 2)])
def test_blocks_of_a_kind_share_their_graphs(native, pattern, kinds):
    """Six layers are two blocks and the top."""
    import mindspore as ms

    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.models.hub import new_model
    from lora_ms.train.parts import SummedLoss

    model = new_model(small(num_hidden_layers=6), ms.float32, 0, native)
    inject(model, LoraConfig(2, 4.0, 0.1, "all-linear", rank_pattern=pattern))
    params = [p for p in model.get_parameters() if p.requires_grad]
    shared = MicroStep(SummedLoss(model, 40), FlatAdamW(params), True).shared
    assert (len(shared.blocks), len(shared.graphs), shared.top) == (2, kinds, 8)


METHODS = {
    "dora": {"use_dora": True},
    "biases and whole modules": {"lora_bias": True, "bias": "all", "modules_to_save": ["input_layernorm"]},
    "ia3": None,
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_block_by_block(native, method, monkeypatch):
    """What a layer has of its own, each block has in the graphs that they share."""
    import mindspore as ms
    from mindspore import Tensor

    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.ia3 import IA3Config
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.models.hub import new_model
    from lora_ms.train.evaluation import LabelScores
    from lora_ms.train.parts import SummedLoss

    monkeypatch.setattr(shared_layers, "BLOCK_LAYERS", 1)
    monkeypatch.setattr(sharing, "SHARED_FROM", 3)
    model = new_model(small(num_hidden_layers=3, attention_bias=True), ms.float32, 0, native)
    options = METHODS[method]
    targets = ["k_proj", "down_proj"]
    chosen = IA3Config(targets, feedforward_modules=["down_proj"]) if options is None else LoraConfig(
        2, 4.0, 0.0, targets, **options)  # fmt: skip
    inject(model, chosen)
    rng = np.random.default_rng(2)
    for parameter in model.trainable_params():  # B too: at zero, A has no gradient
        change = rng.normal(0, 0.2, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + change))
    loss = SummedLoss(model, 40).set_train()
    ids = rng.integers(0, 40, 12).astype(np.int32)
    places = np.arange(12, dtype=np.int32)
    batch = [Tensor(part) for part in (ids[None], places[None], places[:-1], ids[1:])]
    found = []
    for lends_memory, recompute in ((False, False), (True, False), (True, True)):  # as a whole; kept; computed again
        model.operators = replace(native, lends_memory=lends_memory)
        optimizer = FlatAdamW(model.trainable_params(), operators=native)
        step = MicroStep(loss, optimizer, recompute)
        found.append((float(step(*batch).asnumpy()), optimizer.grad.asnumpy().copy()))
        assert (step.shared is not None) == lends_memory
    assert (len(step.shared.blocks), len(step.shared.graphs)) == (2, 1)
    for loss_value, gradient in found[1:]:
        assert loss_value == pytest.approx(found[0][0], rel=1e-6)
        np.testing.assert_allclose(gradient, found[0][1], rtol=1e-4, atol=1e-6)
    evaluated = LabelScores(loss)(*batch)[0]
    assert float(evaluated.asnumpy()) == pytest.approx(found[0][0], rel=1e-6)


def test_a_constant_of_ones_own_keeps_a_layer_apart(native):
    """A tensor that is no parameter is part of a compiled graph, and so of the kind of a layer."""
    import mindspore as ms
    from mindspore import Tensor, nn

    class Constant(nn.Cell):
        def __init__(self, value: float):
            super().__init__()
            self.value = Tensor([value], ms.float32)

    one, same, other = (sharing.kind_of([Constant(value)]) for value in (1.0, 1.0, 2.0))
    assert one == same != other
