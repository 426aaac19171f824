"""What holds for every kind of adapter, whatever its numbers: PEFT's own invariants, and float16 weights under it."""

from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from lora_ms.adapters.inject import adapter_cells, build, inject, install, select
from lora_ms.adapters.merge import merge, merged_cells
from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LayerGroup, LoraConfig
from lora_ms.adapters.methods.miss import MissConfig
from lora_ms.adapters.methods.vera import VeraConfig
from lora_ms.adapters.peft_format import adapter_tensors, load_adapter, read_tensors, save_adapter
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import new_model
from lora_ms.ops import select as select_operators
from lora_ms.runtime import native_build

pytestmark = pytest.mark.usefixtures("graph_mode")
IDS = Tensor(np.random.default_rng(0).integers(0, 24, (2, 5)).astype(np.int32))
QV = ("q_proj", "v_proj")
HEAD, EMBED = ("q_proj", "lm_head"), ("q_proj", "embed_tokens")
GROUPS = (LayerGroup((0,), 4, 8.0), LayerGroup((1,), 2, 3.0, ("q_proj", "down_proj")))


def config(**settings) -> LoraConfig:
    return LoraConfig(**{"lora_rank": 2, "lora_alpha": 3.0, "target_modules": QV, **settings})


KINDS = {
    "lora": config(),
    "rslora": config(use_rslora=True),
    "dora": config(use_dora=True, target_modules=("q_proj", "down_proj")),
    "lora_bias": config(lora_bias=True, target_modules=("q_proj", "o_proj")),
    "bias_all": config(bias="all"),
    "bias_lora_only": config(bias="lora_only", target_modules="all-linear"),
    "gaussian": config(init_lora_weights="gaussian"),
    "orthogonal": config(init_lora_weights="orthogonal"),
    "pissa": config(init_lora_weights="pissa"),
    "pissa_niter": config(init_lora_weights="pissa_niter_4"),
    "pissa_rslora": config(init_lora_weights="pissa", use_rslora=True),
    "olora": config(init_lora_weights="olora"),
    "adalora": AdaLoraConfig(4, 6.0, target_modules=QV, target_rank=2),
    "ia3": IA3Config(),
    "ia3_head": IA3Config(("v_proj", "lm_head"), feedforward_modules=("lm_head",), modules_to_save="norm"),
    "lorafa": config(use_lorafa=True),
    "vera": VeraConfig(QV, lora_rank=3, save_projection=False),
    "vera_head": VeraConfig(HEAD, lora_rank=3, d_initial=0.5, projection_prng_key=2, save_projection=False),
    "miss": MissConfig(("v_proj", "down_proj"), lora_rank=3),
    "miss_mini": MissConfig(QV, lora_rank=2, mini_r=2, init_weights="mini"),
    "miss_bat": MissConfig(("q_proj", "down_proj"), lora_rank=4, init_weights="bat"),
    "miss_head": MissConfig(HEAD, lora_rank=3),
    "patterns": config(rank_pattern={"0.self_attn.q_proj": 3}, alpha_pattern={"v_proj": 7.0}),
    "layer_groups": config(layer_groups=GROUPS),
    "embed": config(target_modules=EMBED),
    "embed_dora": config(target_modules=EMBED, use_dora=True),
    "lm_head": config(target_modules=HEAD),
    "lm_head_dora": config(target_modules=HEAD, use_dora=True),
    "save_head": config(modules_to_save="lm_head"),
    "save_embed": config(modules_to_save="embed_tokens"),
    "save_norms": config(modules_to_save="norm"),
    "tokens": config(trainable_token_indices=(20, 3, 7)),
    "tokens_apart": config(trainable_token_indices={"embed_tokens": (20, 3), "lm_head": (1, 7, 20)}),
}
# The weight is divided and multiplied, or taken apart and put together: equal to rounding. All others add zeros.
ROUNDED = ("dora", "embed_dora", "lm_head_dora", "orthogonal", "pissa", "pissa_niter", "pissa_rslora", "olora")
SIZES = DecoderConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    attention_bias=True,
    tie_word_embeddings=True,
)


def fresh(dtype: ms.Type = ms.float32) -> CausalLM:
    """A tied model with biases, none of them zero."""
    library, why = native_build.build()
    assert library is not None, why
    model = new_model(SIZES, dtype, seed=3, operators=select_operators("CPU", library=str(library)))
    rng = np.random.default_rng(3)
    for parameter in model.get_parameters():
        if parameter.ndim == 1:
            value = parameter.asnumpy() + rng.standard_normal(parameter.shape) * 0.2
            parameter.set_data(Tensor(value.astype(np.float32)).astype(dtype))
    return model.set_train(False)


@pytest.fixture(autouse=True)
def same_random_start(graph_mode) -> None:
    ms.set_seed(0)


@pytest.fixture(scope="module")
def base_logits(graph_mode) -> np.ndarray:
    return fresh()(IDS).asnumpy()


@contextmanager
def eager() -> Iterator[None]:
    """A model that runs once is not worth a graph."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)


def move(model: nn.Cell, amount: float = 0.3) -> None:
    """What trains, away from where it starts: every tensor by numbers of its own."""
    rng = np.random.default_rng(1)
    for cell in adapter_cells(model).values():
        for parameter in cell.tensors().values():
            noise = rng.standard_normal(parameter.shape, np.float32) * np.float32(amount)
            parameter.set_data(Tensor(parameter.asnumpy() + noise))


def weights_of(model: nn.Cell) -> dict[str, np.ndarray]:
    return {name: p.asnumpy().copy() for name, p in model.parameters_and_names()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_moved_merged_saved(base_logits, tmp_path, kind):
    """One model's way: a fresh adapter changes nothing, a moved one does, merged it says the same, twice too; and the
    adapter loaded into another model says it again.
    """
    model = fresh()
    inject(model, KINDS[kind])
    start = model(IDS).asnumpy()
    if kind in ROUNDED:
        np.testing.assert_allclose(start, base_logits, rtol=0, atol=1e-4)
    else:
        np.testing.assert_array_equal(start, base_logits)
    move(model)
    moved = model(IDS).asnumpy()  # the graph is that of the line above: the adapter is in it
    assert np.abs(moved - base_logits).max() > 0.1
    save_adapter(model, tmp_path, KINDS[kind])
    merge(model)
    assert not adapter_cells(model)
    with eager():
        np.testing.assert_allclose(model(IDS).asnumpy(), moved, rtol=0, atol=1e-4)
    once = weights_of(model)
    untied = ("lm_head", "lm_head_dora", "miss_head", "vera_head", "ia3_head", "save_head", "tokens_apart")
    assert ("lm_head.weight" in once) == (kind in untied or kind in ("embed", "embed_dora", "save_embed"))
    assert_same(weights_of(merge(model)), once)
    # loaded into another model and merged there, the weights are the same to rounding
    other = fresh()
    load_adapter(other, tmp_path)
    again = weights_of(merge(other))
    assert again.keys() == once.keys()
    for name, value in once.items():
        np.testing.assert_allclose(again[name], value, rtol=0, atol=2e-6 if kind not in ROUNDED else 2e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_parameters_alone_train_and_are_stored(tmp_path, kind):
    """And the directory holds no weight of the base: no tensor has the numbers of one."""
    model, base = fresh(), weights_of(fresh())
    report = inject(model, KINDS[kind])
    trained = {p.name: p for p in model.get_parameters() if p.requires_grad}
    stored = {
        f"{path}.{factor}": parameter
        for path, cell in adapter_cells(model).items()
        for factor, parameter in cell.tensors().items()
    }
    frozen = {name for name in stored if kind == "lorafa" and name.endswith("lora_A.weight")}
    assert {id(p) for p in trained.values()} == {id(p) for name, p in stored.items() if name not in frozen}
    assert report.trainable == sum(p.size for p in trained.values())
    assert report.modules and set(report.modules) == select(fresh(), KINDS[kind]).keys()
    assert all(p.dtype == ms.float32 for p in trained.values())
    move(model)
    save_adapter(model, tmp_path, KINDS[kind])
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = read_tensors(tmp_path)
    assert tensors.keys() == adapter_tensors(model, KINDS[kind]).keys()
    assert len(tensors) == len(trained) + len(frozen)
    for key, value in tensors.items():
        same = [name for name, weight in base.items() if weight.shape == value.shape and np.allclose(weight, value)]
        assert not same, key


@pytest.mark.parametrize("kind", KINDS)
def test_safe_merge_refuses_what_is_no_number(kind):
    model = fresh()
    inject(model, KINDS[kind])
    move(model)
    cells = adapter_cells(model)
    before = weights_of(model)
    for path, cell in cells.items():
        for factor, parameter in cell.tensors().items():
            good = parameter.asnumpy()
            bad = good.copy()
            bad.flat[-1] = np.nan
            parameter.set_data(Tensor(bad))
            with pytest.raises(LoraMsError) as caught:
                merge(model, safe_merge=True)
            message = str(caught.value)
            assert f" of {path} holds NaN or infinity; nothing was merged" in message, factor
            parameter.set_data(Tensor(good))
    assert adapter_cells(model) == cells
    assert_same(weights_of(model), before)
    assert merged_cells(model, safe_merge=True).keys() == cells.keys()


# By kind: which tensors have a gradient at the very start. A product's factor has one where the other is not zero.
FIRST_GRADIENTS = {
    "lora": {"lora_a": False, "lora_b": True},
    "dora": {"lora_a": False, "lora_b": True, "lora_magnitude": True},
    "lora_bias": {"lora_a": False, "lora_b": True, "lora_bias": True},
    "orthogonal": {"lora_a": True, "lora_b": True},
    "pissa": {"lora_a": True, "lora_b": True},
    "olora": {"lora_a": True, "lora_b": True},
    "adalora": {"lora_a": False, "lora_b": False, "lora_e": True},
    "ia3": {"ia3_l": True},
    "vera": {"vera_lambda_b": True, "vera_lambda_d": False},
    "miss": {"miss_block": True},
    "miss_bat": {"miss_block": True},
    "embed": {"lora_a": True, "lora_b": False},
    "lm_head_dora": {"lora_a": False, "lora_b": True, "lora_magnitude": True},
    "save_norms": {"weight": True},
    "bias_lora_only": {"lora_a": False, "lora_b": True, "bias": True},
}
PLACES = {
    "lora": ("model.layers.1.mlp.gate_proj",),
    "dora": ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"),
    "lora_bias": ("model.layers.0.self_attn.v_proj",),
    "orthogonal": ("model.layers.0.self_attn.o_proj",),
    "pissa": ("model.layers.1.self_attn.q_proj",),
    "olora": ("model.layers.1.self_attn.k_proj",),
    "adalora": ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"),
    "ia3": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.up_proj"),
    "vera": ("model.layers.0.self_attn.v_proj",),
    "miss": ("model.layers.0.mlp.gate_proj",),
    "miss_bat": ("model.layers.1.self_attn.v_proj",),
    "embed": ("model.embed_tokens",),
    "lm_head_dora": ("lm_head",),
    "save_norms": ("model.norm", "model.layers.0.input_layernorm"),
    "bias_lora_only": ("model.layers.0.self_attn.q_proj",),
}


def mixed(dtype: ms.Type = ms.float32) -> CausalLM:
    """Cells of every kind in one model."""
    model, cells = fresh(dtype), {}
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    for kind, paths in PLACES.items():
        if kind == "save_norms":
            found = build(model, config(modules_to_save=paths), {})
        else:
            where = select(model, KINDS[kind])
            rank_and_alpha = next(iter(where.values()))
            found = build(model, KINDS[kind], dict.fromkeys(paths, rank_and_alpha))
        assert found.keys() == set(paths)
        cells |= found
    install(model, cells)
    return model


class Gradients(nn.Cell):
    """The gradients of a fixed share of all logits in every trained parameter."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model
        self.parameters = ms.ParameterTuple([p for p in model.get_parameters() if p.requires_grad])
        self.weights = Tensor(np.random.default_rng(4).standard_normal((2, 5, 24)).astype(np.float32))
        self.grad = ops.grad(self.weighted, None, self.parameters)

    def weighted(self, input_ids):
        return (self.model(input_ids) * self.weights).sum()

    def construct(self, input_ids):
        return self.grad(input_ids)


def test_first_gradients():
    model = mixed()
    kinds = {path: kind for kind, paths in PLACES.items() for path in paths}
    cell = Gradients(model)
    names = [p.name.removeprefix("model.") for p in cell.parameters]
    found = {}
    for name, gradient in zip(names, cell(IDS), strict=True):
        path, _, factor = name.rpartition(".")
        path = path if path in kinds else f"model.{path}"
        found.setdefault(path, {})[factor] = bool(np.abs(gradient.asnumpy()).max() > 1e-4)
        assert np.isfinite(gradient.asnumpy()).all()
        if not found[path][factor]:
            np.testing.assert_array_equal(gradient.asnumpy(), 0, err_msg=name)
    assert found == {path: FIRST_GRADIENTS[kind] for path, kind in kinds.items()}


def test_a_float16_base_keeps_adapters_in_float32():
    """Cells of every kind at once, moved: float16 logits near the float32 ones, merged too."""
    logits = {}
    for dtype in (ms.float32, ms.float16):
        ms.set_seed(1)
        model = mixed(dtype)
        move(model, 0.05)
        trained = [p for p in model.get_parameters() if p.requires_grad]
        own = ("base_norms", "vera_a", "vera_b")  # frozen numbers of adapters
        frozen = [p for p in model.get_parameters() if not p.requires_grad and p.ndim and not p.name.endswith(own)]
        assert {p.dtype for p in trained} == {ms.float32} and {p.dtype for p in frozen} == {dtype}
        logits[dtype] = model(IDS).asnumpy()
        assert logits[dtype].dtype == np.float32
        merge(model)
        assert {p.dtype for p in model.get_parameters()} == {dtype}
        np.testing.assert_allclose(
            model(IDS).asnumpy(), logits[dtype], rtol=0, atol=0.02 if dtype == ms.float16 else 1e-4
        )
    moved = np.abs(logits[ms.float32] - fresh()(IDS).asnumpy()).mean()
    assert np.abs(logits[ms.float16] - logits[ms.float32]).max() < 0.02 < 0.1 < moved
