"""All layers as one operator in generation: the numbers of the cells, to the bit."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapted_layers, inject, install, target_layers
from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.multi_adapter import AdapterPool
from lora_ms.infer import cached_model
from lora_ms.infer.cached_model import CachedModel
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import new_model
from lora_ms.nn.int4 import Int4Projection
from lora_ms.nn.layers import Head
from lora_ms.nn.nf4 import NF4Projection
from lora_ms.ops import select
from lora_ms.quant import nf4
from lora_ms.quant.int4 import Int4
from lora_ms.runtime import native_build

LLAMA = DecoderConfig(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True,
)  # fmt: skip
MIXED = DecoderConfig(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, attention_bias=True, qk_norm=True,
    sliding_window=5, sliding_layers=(1,), unrotated_layers=(0,),
)  # fmt: skip
LORA = LoraConfig(lora_rank=3, lora_alpha=8.0, target_modules="all-linear")
RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def only_native(native):
    if native.cached_layers is None:
        pytest.skip("no compiler here")


def drawn(model: CausalLM) -> CausalLM:
    """The model with biases, norms and factors that are not what they start with."""
    for name, parameter in model.parameters_and_names():
        if parameter.ndim == 1 or "lora_" in name:
            parameter.set_data(Tensor(RNG.normal(0.5, 0.3, parameter.shape).astype(np.float32), parameter.dtype))
    return model


def layers_of(model: CausalLM) -> dict:
    return {name: layer for name, layer in target_layers(model).items() if "layers" in name and type(layer) is not Head}


def with_nf4(model: CausalLM, double: bool) -> CausalLM:
    install(model, {
        name: NF4Projection(nf4.quantise(layer.numbers(), double), layer.bias, model.operators)
        for name, layer in layers_of(model).items()
    })  # fmt: skip
    return model


def with_int4(model: CausalLM) -> CausalLM:
    cells = {}
    for name, layer in layers_of(model).items():
        out, width, groups = layer.out_channels, layer.in_channels, layer.in_channels // 32
        scales = RNG.uniform(0.001, 0.02, (out, groups)).astype(np.float16)
        zeros = RNG.integers(0, 16, (out, groups)).astype(np.uint8)
        codes = RNG.integers(0, 256, (out, width // 2)).astype(np.uint8)
        cells[name] = Int4Projection(Int4(codes, scales, zeros, None), layer.bias, model.operators)
    install(model, cells)
    return model


def adapted(model: CausalLM, config=LORA) -> CausalLM:
    inject(model, config, operators=model.operators)
    return drawn(model)


def with_rows(model: CausalLM, chosen: tuple[int, ...] = (2, 1)) -> CausalLM:
    """Lines that have chosen these of two adapters."""
    pool = AdapterPool(model, len(chosen), adapters=2, lora_rank=3)
    install(model, pool.cells)
    for cell in pool.cells.values():
        for factor in (cell.lora_a, cell.lora_b):
            factor.set_data(Tensor(RNG.normal(0, 0.2, factor.shape).astype(np.float32)))
    pool.choose(chosen)
    return model


MODELS = {
    "llama": lambda ops: new_model(LLAMA, ms.float32, 0, ops),
    "biases, norms, windows": lambda ops: drawn(new_model(MIXED, ms.float32, 0, ops)),
    "float16": lambda ops: drawn(new_model(MIXED, ms.float16, 0, ops)),
    "bfloat16": lambda ops: drawn(new_model(MIXED, ms.bfloat16, 0, ops)),
    "lora": lambda ops: adapted(new_model(LLAMA, ms.float32, 0, ops)),
    "lora with biases": lambda ops: adapted(new_model(MIXED, ms.float32, 0, ops)),
    "lora on float16": lambda ops: adapted(new_model(LLAMA, ms.float16, 0, ops)),
    "nf4": lambda ops: with_nf4(drawn(new_model(MIXED, ms.float32, 0, ops)), False),
    "nf4, double": lambda ops: with_nf4(new_model(LLAMA, ms.float32, 0, ops), True),
    "lora on nf4": lambda ops: adapted(with_nf4(new_model(MIXED, ms.float32, 0, ops), True)),
    "int4": lambda ops: with_int4(drawn(new_model(MIXED, ms.float32, 0, ops))),
    "adapters of lines": lambda ops: with_rows(drawn(new_model(MIXED, ms.float32, 0, ops))),
}


def answers(model: CausalLM, rows: int, monkeypatch, plain: bool) -> list[np.ndarray]:
    """Logits and hidden states of pieces of prompts in two lines, and logits of tokens of all."""
    with monkeypatch.context() as patched:
        if not plain:
            patched.setattr(cached_model, "known_layers", lambda layers: None)
        graphs = CachedModel(model.set_train(False), rows, 128, 16)
    assert (graphs.joined is not None) is plain
    rng = np.random.default_rng(1)
    found = []
    with graphs.running():
        for line, length in ((0, 5), (1, 20), (1, graphs.most)):
            logits, _, hidden = graphs.read(line, rng.integers(1, 50, length), 0, length)
            found += [logits.asnumpy(), hidden.asnumpy()]
        for step in range(3):
            start = np.array([5 + step, 64 + step] + [0] * (rows - 2))
            lengths = np.minimum(start + 1, [128, 128] + [0] * (rows - 2))  # the other lines are idle
            found.append(graphs.next(rng.integers(1, 50, rows), start, lengths)[0].asnumpy()[:2])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_the_cells(native, name, monkeypatch):
    model = MODELS[name](native)
    wanted = answers(model, 2, monkeypatch, plain=False)
    found = answers(model, 2, monkeypatch, plain=True)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.ptp(found[-1]) > 0.01
    assert not np.array_equal(found[-1][0], found[-1][1])


def test_a_piece_that_all_lines_do_not_share(native, monkeypatch):
    """Tokens of one line, where their number is none of three times as many: all lines have chosen its adapter."""
    model = with_rows(new_model(LLAMA, ms.float32, 0, native), (2, 2, 2))
    wanted, found = (answers(model, 3, monkeypatch, plain) for plain in (False, True))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tokens_whose_embedding_is_zero(native, monkeypatch):
    """They are no padding: they see others."""
    model = drawn(new_model(MIXED, ms.float32, 0, native))
    without_embedding(model, 10)
    wanted, found = (answers(model, 2, monkeypatch, plain) for plain in (False, True))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def without_embedding(model: CausalLM, first: int) -> None:
    """The embeddings of the ids from ``first`` on are zero."""
    weight = model.model.embed_tokens.weight
    numbers = weight.asnumpy().copy()
    numbers[first:] = 0
    weight.set_data(Tensor(numbers))


def test_many_lines(native, monkeypatch):
    """More than are multiplied where they lie."""
    model = drawn(new_model(MIXED, ms.float32, 0, native))
    wanted, found = (answers(model, 14, monkeypatch, plain) for plain in (False, True))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_products_rounded_to_bfloat16(native, monkeypatch):
    library = str(native_build.build()[0])
    rounded = select("CPU", library=library, bfloat16=True)
    model = with_nf4(drawn(new_model(MIXED, ms.float32, 0, rounded)), False)
    wanted, found = (answers(model, 14, monkeypatch, plain) for plain in (False, True))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(lora_rank=2, lora_alpha=4.0, target_modules=("q_proj",), use_dora=True),
        LoraConfig(lora_rank=2, lora_alpha=4.0, target_modules=("q_proj",), lora_bias=True),
        LoraConfig(lora_rank=2, lora_alpha=4.0, target_modules=("q_proj",), modules_to_save=("1.input_layernorm",)),
        IA3Config(),
    ],
    ids=["dora", "lora bias", "a trained norm", "ia3"],
)
def test_what_the_operator_does_not_know_stays_cells(native, config):
    model = new_model(LLAMA, ms.float32, 0, native)
    inject(model, config, operators=native)
    assert adapted_layers(model)
    assert CachedModel(model.set_train(False), 1, 64, 16).joined is None
