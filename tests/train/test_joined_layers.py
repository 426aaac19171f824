"""Layers in training as one operator: loss and gradients of the graphs of blocks, to the bit."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import inject, install, target_layers
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import new_model
from lora_ms.nn import sharing
from lora_ms.nn.dropout import DrawTable, DropoutKernel
from lora_ms.nn.layers import Embedding, Head
from lora_ms.nn.nf4 import NF4Projection
from lora_ms.ops import select
from lora_ms.quant import nf4
from lora_ms.runtime import native_build
from lora_ms.train import evaluation, gradient
from lora_ms.train.evaluation import LabelScores
from lora_ms.train.gradient import MicroStep
from lora_ms.train.joined_layers import JoinedLayers
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss
from lora_ms.train.shared_layers import SharedLayers

LLAMA = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip
MIXED = {"attention_bias": True, "qk_norm": True, "sliding_window": 5, "sliding_layers": (1,), "unrotated_layers": (0,)}
TOKENS = 32  # of a line, of two
BATCH_ENDS = 20, 28  # from where on the lines are padding


@pytest.fixture(autouse=True)
def deep(native, monkeypatch):
    """Three layers are enough to be shared."""
    if native.trained_layers is None:
        pytest.skip("no compiler here")
    monkeypatch.setattr(sharing, "SHARED_FROM", 3)


def model_of(operators, sizes=None, dtype=ms.float32, quantised: bool = False, **adapter) -> CausalLM:
    """A model with LoRA, whose norms, biases and factors are not what they start with."""
    model = new_model(DecoderConfig(**LLAMA, **(sizes or {})), dtype, 0, operators)
    if quantised:
        layers = {n: x for n, x in target_layers(model).items() if type(x) not in (Head, Embedding)}
        install(model, {
            name: NF4Projection(nf4.quantise(layer.numbers(), True), layer.bias, operators)
            for name, layer in layers.items()
        })  # fmt: skip
    inject(model, LoraConfig(**{"lora_rank": 4, "lora_alpha": 8.0, "target_modules": "all-linear"} | adapter),
           operators=operators)  # fmt: skip
    rng = np.random.default_rng(3)
    for name, parameter in model.parameters_and_names():
        if parameter.ndim == 1 or "lora_" in name:
            value = rng.normal(0.3, 0.3, parameter.shape).astype(np.float32)
            parameter.set_data(Tensor(value, parameter.dtype))
    return model.set_train(True)


def batch() -> list[Tensor]:
    """Two lines that end in padding, and a few labels."""
    rng = np.random.default_rng(1)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (2, 1))
    for line, end in enumerate(BATCH_ENDS):
        positions[line, end:] = -1
    places = np.array([3, 4, 5, 19, 40, 50, 59], np.int32)
    targets = rng.integers(1, 50, places.size).astype(np.int32)
    return [Tensor(x) for x in (rng.integers(1, 50, (2, TOKENS)).astype(np.int32), positions, places, targets)]


def found(model: CausalLM, monkeypatch, joined: bool) -> list[np.ndarray]:
    """Losses and the summed gradient of two micro-batches, and the evaluation's loss."""
    kind = JoinedLayers if joined else SharedLayers
    with monkeypatch.context() as patched:
        if not joined:
            patched.setattr(gradient, "joined_layers", lambda *_, **__: None)
            patched.setattr(evaluation, "joined_layers", lambda *_, **__: None)
        kernels = [cell for _, cell in model.cells_and_names() if isinstance(cell, DropoutKernel)]
        draws = [kernel.draws for kernel in kernels if kernel.probability > 0]
        table = DrawTable(draws, 2 * TOKENS, 96, seed=5) if draws else None
        optimizer = FlatAdamW(model.trainable_params())
        loss = SummedLoss(model, 50)
        step = MicroStep(loss, optimizer)
        assert type(step.shared) is kind
        losses = []
        for number in range(2):
            if table is not None:
                table.fill(0, number)
            losses.append(step(*batch()).asnumpy())
        model.set_train(False)
        scores = LabelScores(loss)
        assert type(scores.shared) is kind
        losses += [value.asnumpy() for value in scores(*batch())]
        if table is not None:
            table.close()
        model.set_train(True)
    return [*losses, optimizer.grad.asnumpy()]


CASES = {
    "all, of several ranks": {"rank_pattern": {r"layers.1.self_attn.q_proj": 2, r"layers.0.mlp.*": 7}},
    "dropout, biases, norms, windows": {"sizes": MIXED, "lora_dropout": 0.3},
    "queries and values alone": {"target_modules": ("q_proj", "v_proj"), "lora_dropout": 0.1},
    "from a feed-forward block on": {"target_modules": r"model.layers.(1.mlp.up_proj|2.self_attn.k_proj)"},
    "the embedding, too": {"target_modules": ("embed_tokens", "o_proj")},
    "nf4": {"quantised": True, "sizes": MIXED},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_of_the_blocks(native, case, monkeypatch):
    model = model_of(native, **CASES[case])
    wanted, values = (found(model, monkeypatch, joined) for joined in (False, True))
    for one, other in zip(values, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(values[-1]).max() > 0.01
    assert (values[-1] != 0).mean() > 0.5


def test_tokens_whose_embedding_is_zero(native, monkeypatch):
    """They are no padding: they see others."""
    model = model_of(native, MIXED)
    weight = model.model.embed_tokens.weight
    numbers = weight.asnumpy().copy()
    numbers[10:] = 0
    weight.set_data(Tensor(numbers))
    wanted, values = (found(model, monkeypatch, joined) for joined in (False, True))
    for one, other in zip(values, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_products_rounded_to_bfloat16(monkeypatch):
    rounded = select("CPU", library=str(native_build.build()[0]), bfloat16=True)
    model = model_of(rounded, MIXED, ms.bfloat16)
    wanted, values = (found(model, monkeypatch, joined) for joined in (False, True))
    for one, other in zip(values, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "adapter",
    [{"use_dora": True}, {"bias": "all"}, {"use_lorafa": True}, {"modules_to_save": ("0.input_layernorm",)}],
    ids=["dora", "biases", "lora-fa", "a norm"],
)
def test_what_the_operator_does_not_train_stays_in_blocks(native, adapter):
    model = model_of(native, MIXED, target_modules=("q_proj",), **adapter)
    assert type(MicroStep(SummedLoss(model, 50), FlatAdamW(model.trainable_params())).shared) is SharedLayers


def test_recomputed_layers_stay_in_blocks(native):
    model = model_of(native)
    step = MicroStep(SummedLoss(model, 50), FlatAdamW(model.trainable_params()), recompute=1)
    assert type(step.shared) is SharedLayers
