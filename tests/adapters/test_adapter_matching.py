"""Which layers an adapter stands on, what it freezes, and what it counts."""

import mindspore as ms
import numpy as np
import pytest

from lora_ms.adapters.inject import adapted_layers, freeze, inject, report, select
from lora_ms.adapters.matching import matches
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LayerGroup, LoraConfig
from lora_ms.adapters.methods.lora_cells import LoRADense
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import new_model

pytestmark = pytest.mark.usefixtures("graph_mode")
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
)
LEAVES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
          "g": "mlp.gate_proj", "u": "mlp.up_proj", "d": "mlp.down_proj"}  # fmt: skip


def paths(letters: str, layers: str = "01") -> set[str]:
    """``paths("qv")``: the query and value projections of both layers."""
    return {f"model.layers.{n}.{LEAVES[letter]}" for n in layers for letter in letters}


@pytest.fixture
def model() -> CausalLM:
    return new_model(SIZES, ms.float32, seed=0)


@pytest.mark.parametrize(
    ("target_modules", "wanted"),
    [
        # an expression from the start of the leaf name
        ("q_proj", paths("q")),
        ("q", paths("q")),
        ("proj", set()),
        (".*proj", paths("qkvogud")),
        ("q_proj|v_proj", paths("qv")),
        ("[qk]_", paths("qk")),
        # of its MindFormers alias
        (".*wq|.*wk|.*wv|.*wo", paths("qkvo")),
        ("wq", paths("q")),
        ("w1", paths("g")),
        ("w2", paths("d")),
        ("w3", paths("u")),
        # wholly with the dotted path
        (r"model\.layers\.1\.self_attn\.(q|k)_proj", paths("qk", "1")),
        (r".*\.mlp\..*", paths("gud")),
        (r"model\.layers\.1", set()),
        # one that looks around is about the whole path: the bare name passes by what it forbids
        (r"^(?!.*layers\.0\.).*[qv]_proj$", paths("qv", "1")),
        (r".*(?<!self_attn\.v)_proj", paths("qkogud")),
        (r"(?!o_)\w_proj", paths("qkv")),
        ("lm_head", {"lm_head"}),
        (".*", paths("qkvogud") | {"lm_head", "model.embed_tokens"}),
        (r"model\.(embed_tokens|layers\.0\.mlp\..*)", paths("gud", "0") | {"model.embed_tokens"}),
        # a list: path suffixes, whole words
        (("q_proj",), paths("q")),
        (("proj",), set()),
        (("wq",), set()),
        (("self_attn.q_proj", "down_proj"), paths("qd")),
        (("model.layers.0.mlp.up_proj",), paths("u", "0")),
        (("layers.1.mlp.up_proj", "lm_head"), paths("u", "1") | {"lm_head"}),
        (("embed_tokens",), {"model.embed_tokens"}),
        # everything but the head and the embedding
        ("all-linear", paths("qkvogud")),
    ],
)
def test_target_modules(target_modules, wanted):
    names = [*sorted(paths("qkvogud")), "lm_head", "model.embed_tokens"]
    assert {name for name in names if matches(name, target_modules)} == wanted


@pytest.mark.parametrize(
    ("exclude_layers", "wanted"),
    [
        ("layers.0", paths("qkvogud", "1")),
        (("layers.0",), paths("qkvogud", "1")),
        (["mlp", "q_proj"], paths("kvo")),
        ((), paths("qkvogud")),
    ],
)
def test_exclude_layers(model, exclude_layers, wanted):
    config = LoraConfig(target_modules="all-linear", exclude_layers=exclude_layers)
    assert set(select(model, config)) == wanted
    inject(model, config)
    assert set(adapted_layers(model)) == wanted


COULD = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, or all-linear"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules="query"), f"target_modules 'query' matches no layer; could match: {COULD}"),
        (LoraConfig(target_modules=["wq"]), f"target_modules wq matches no layer; could match: {COULD}"),
        (LoraConfig(target_modules="all"),
         "target_modules 'all' matches no layer: for all dense layers write all-linear"),
        (LoraConfig(target_modules="q_proj", exclude_layers="self_attn"),
         f"target_modules 'q_proj' matches no layer outside self_attn; could match: {COULD}"),
        (LoraConfig(target_modules="q_proj", exclude_modules=r".*\.q_proj"),
         f"target_modules 'q_proj' matches no layer outside .*\\.q_proj; could match: {COULD}"),
        (LoraConfig(target_modules="q_proj", layers_to_transform=(2, 5)),
         f"target_modules 'q_proj' matches no layer in layers [2, 5]; could match: {COULD}"),
        (LoraConfig(target_modules="q_proj("),
         "not a regular expression: 'q_proj(': missing ), unterminated subpattern at position 6"),
        (LoraConfig(exclude_modules="*k_proj"),
         "not a regular expression: '*k_proj': nothing to repeat at position 0"),
    ],
)  # fmt: skip
def test_no_match_says_what_could_match(model, config, message):
    with pytest.raises(LoraMsError) as caught:
        inject(model, config)
    assert str(caught.value) == message
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["q_proj", "v_porj"]),
         "target_modules v_porj: the model has no such module; the nearest: v_proj"),
        (LoraConfig(target_modules=["q_proj", "wv", "upproj"]),
         "target_modules wv, upproj: the model has no such module; the nearest: v_proj, up_proj"),
        (LoraConfig(target_modules=["q_proj", "layers.7.mlp.up_proj"]),
         "target_modules layers.7.mlp.up_proj: the model has no such module; the nearest: layers.1.mlp.up_proj"),
        (LoraConfig(target_modules=["q_proj", "xyz"]),
         f"target_modules xyz: the model has no such module; could match: {COULD}"),
        (LoraConfig(target_modules=["q_proj", "c_attn", "c_proj"]),
         f"target_modules c_attn, c_proj: the model has no such module; could match: {COULD}"),
        (LoraConfig(target_modules=["q_proj", "c_proj"]),  # as near to one as to another
         f"target_modules c_proj: the model has no such module; could match: {COULD}"),
        (LoraConfig(exclude_modules=["k_porj"]),
         "exclude_modules k_porj: the model has no such module; the nearest: k_proj"),
        (LoraConfig(exclude_layers="lm_hed"),
         "exclude_layers lm_hed: the model has no such module; the nearest: lm_head"),
        (LoraConfig(layers_to_transform=(1, 5)),
         "layers_to_transform: layers 5 are not there: the model has 0-1"),
        (LoraConfig(layer_groups=(LayerGroup((0,), 2, 4.0, ("q_proj", "vproj")),)),
         "layer_groups: target_modules vproj: the model has no such module; the nearest: v_proj"),
        (IA3Config(target_modules="all-linear", feedforward_modules=["down_proj", "upproj"]),
         "feedforward_modules upproj: the model has no such module; the nearest: up_proj"),
    ],
)  # fmt: skip
def test_a_misspelt_name_beside_others_is_refused(model, config, message):
    with pytest.raises(LoraMsError) as caught:
        inject(model, config)
    assert str(caught.value) == message
    assert not adapted_layers(model)


def test_a_pattern_of_layers_that_fits_no_list(model):
    config = LoraConfig(layers_to_transform=(1,), layers_pattern=("blocks", "h"))
    with pytest.raises(LoraMsError, match="^layers_pattern blocks, h fits no list of layers of the model"):
        config.check_listed([name for name, _ in model.cells_and_names()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), got 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout must be in [0, 1), got -0.1"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(LoraMsError) as caught:
        LoraConfig(**changes)
    assert str(caught.value) == message


def test_the_report_counts(model):
    """q: A 2 x 8 and B 8 x 2; v: A 2 x 8 and B 4 x 2; twice."""
    before = sum(p.size for p in model.get_parameters())
    found = inject(model, LoraConfig(2, 4.0, target_modules=["q_proj", "v_proj"]))
    assert found.modules == tuple(adapted_layers(model)) and set(found.modules) == paths("qv")
    assert (found.trainable, found.total) == (2 * (16 + 16 + 16 + 8), before + 112)
    assert before == 1416
    assert found.line() == "LoRA on 4 modules: 112 of 1,528 parameters train (7.33%)"


def test_report_without_an_adapter(model):
    assert report(model).line() == "no adapter: 1,416 of 1,416 parameters train (100.00%)"


def test_only_adapter_factors_train_and_bear_their_paths(model):
    inject(model, LoraConfig(2, 4.0, target_modules=["q_proj", "v_proj"]))
    trainable = {p.name for p in model.get_parameters() if p.requires_grad}
    assert trainable == {f"{path}.lora_{factor}" for path in paths("qv") for factor in "ab"}
    names = [p.name for p in model.get_parameters()]
    assert len(names) == len(set(names))
    assert dict(model.parameters_and_names()).keys() == set(names)


def test_settings_reach_every_layer(model):
    inject(model, LoraConfig(3, 5.0, 0.25, "all-linear"))
    layers = adapted_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        assert type(layer) is LoRADense
        assert (layer.lora_rank, layer.lora_alpha) == (3, 5.0)
        assert float(layer.scaling.asnumpy()) == np.float32(5.0 / 3) and not layer.scaling.requires_grad
        assert layer.lora_dropout.probability == 0.25


def test_merging_puts_plain_layers_and_names_back(model):
    names = {name: p.shape for name, p in model.parameters_and_names()}
    inject(model, LoraConfig(2, 4.0, target_modules="all-linear"))
    assert merge(model) is model
    assert not adapted_layers(model)
    assert {name: p.shape for name, p in model.parameters_and_names()} == names
    assert {p.name for p in model.get_parameters()} == set(names)
    merge(model)  # a second time: nothing to do
    assert {p.name for p in model.get_parameters()} == set(names)


def trainable(model) -> set[str]:
    return {p.name for p in model.get_parameters() if p.requires_grad}


def test_freezing(model):
    inject(model, LoraConfig(2, 4.0, target_modules=["q_proj", "v_proj"]))
    freeze(model)
    assert len(trainable(model)) == 8
    freeze(model, ["*layers.0*"], ["*v_proj.lora_b"])
    left = {f"{path}.lora_{factor}" for path in paths("qv", "1") for factor in "ab"}
    assert trainable(model) == left | {"model.layers.0.self_attn.v_proj.lora_b"}


def test_freezing_nothing_or_everything_is_an_error(model):
    with pytest.raises(LoraMsError) as caught:
        freeze(model, ["*lora_c"])
    first = ", ".join(name for name, _ in list(model.parameters_and_names())[:3])
    assert str(caught.value) == f"freeze pattern '*lora_c' fits no parameter; the first are: {first}"
    with pytest.raises(LoraMsError) as caught:
        freeze(model, ["*"])
    assert str(caught.value) == "nothing is left to train: freeze_include covers every trainable parameter"
