"""Ranks and alphas by module, layers left out, ranges of layers, whole modules: decided from names."""

from dataclasses import replace

import mindspore as ms
import pytest

from lora_ms.adapters.inject import adapted_layers, adapter_cells, inject, saved_layers
from lora_ms.adapters.matching import layer_index, ranges
from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.lora import LayerGroup, LoraConfig, LoraSpec
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import new_model

LEAVES = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "d": "mlp.down_proj"}
NAMES = [f"model.layers.{n}.{leaf}" for n in range(12) for leaf in LEAVES.values()]
NAMES += ["model.embed_tokens", "lm_head"]


def paths(letters: str, *layers: int) -> set[str]:
    """``paths("qv", 0, 3)``: the query and value projections of these two layers."""
    return {f"model.layers.{n}.{LEAVES[letter]}" for n in layers for letter in letters}


def chosen(**settings) -> dict[str, LoraSpec]:
    return LoraConfig(**{"target_modules": ("q_proj", "v_proj"), **settings}).specs(NAMES)


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"layers_to_transform": 1}, paths("qv", 1)),
        ({"layers_to_transform": (1, 11)}, paths("qv", 1, 11)),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, paths("qv", 0)),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, paths("qv", 0)),
        ({"layers_to_transform": [2], "target_modules": "q_proj"}, paths("q", 2)),
        # whole names, or their ends after a dot
        ({"exclude_modules": "v_proj"}, paths("qv", *range(12))),
        ({"exclude_modules": r".*\.v_proj"}, paths("q", *range(12))),
        ({"exclude_modules": ("v_proj",)}, paths("q", *range(12))),
        ({"exclude_modules": ["proj"]}, paths("qv", *range(12))),
        ({"exclude_modules": ["1.self_attn.v_proj"], "layers_to_transform": [1, 11]},
         paths("qv", 1, 11) - {"model.layers.1.self_attn.v_proj"}),
        ({"exclude_modules": r"model\.layers\.\d\..*"}, paths("qv", 10, 11)),
        # MindFormers' sub-strings
        ({"exclude_layers": "layers.1"}, paths("qv", 0, *range(2, 10))),
        # a module that is saved whole has no adapter besides
        ({"modules_to_save": ["v_proj"]}, paths("q", *range(12))),
    ],
)  # fmt: skip
def test_layers_left_out(settings, wanted):
    assert chosen(**settings).keys() == wanted


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.layers.7.mlp.down_proj", (), 7),
        ("layers.7.mlp.down_proj", (), 7),
        ("model.layers.10.mlp.experts.3.up_proj", (), 10),
        ("model.layers.10.mlp.experts.3.up_proj", ("experts",), 3),
        ("model.layers.10.mlp.experts.3.up_proj", ("blocks", "layers"), 10),
        ("model.mylayers.4.up_proj", ("layers",), None),
        ("lm_head", (), None),
        ("model.layers.7", (), None),
    ],
)
def test_layer_index(name, pattern, index):
    assert layer_index(name, pattern) == index


def test_the_first_pattern_that_fits_decides():
    """As in PEFT: a whole name, or its end after a dot, as a regular expression; the two patterns apart."""
    found = chosen(
        lora_rank=8,
        lora_alpha=16.0,
        rank_pattern={r"layers\.0\..*": 1, "q_proj": 2, r"layers\.\d+\.self_attn\.q_proj": 3, "1.self_attn.v_proj": 4},
        alpha_pattern={r"layers\.[01]\..*q_proj": 5, "q_proj": 6},
    )  # fmt: skip
    assert found["model.layers.0.self_attn.q_proj"] == LoraSpec(1, 5)
    assert found["model.layers.0.self_attn.v_proj"] == LoraSpec(1, 16)
    assert found["model.layers.1.self_attn.q_proj"] == LoraSpec(2, 5)
    assert found["model.layers.1.self_attn.v_proj"] == LoraSpec(4, 16)
    assert found["model.layers.11.self_attn.q_proj"] == LoraSpec(2, 6)
    assert found["model.layers.11.self_attn.v_proj"] == LoraSpec(8, 16)  # 11. does not end in .1.


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["o_proj", "proj", "down_proj", r"layers\.12\..*"])
def test_a_pattern_that_fits_no_adapter_is_an_error(key, pattern):
    assert error_of(chosen, **{key: {"q_proj": 4, pattern: 4}}) == (
        f"{key} {pattern!r} matches none of the 24 adapted modules"
    )


def group(*layers: int, rank: int = 4, alpha: float = 8.0, targets=None) -> LayerGroup:
    return LayerGroup(layers, rank, alpha, targets)


def test_layer_groups():
    found = chosen(
        layer_groups=(group(0, 1, rank=64, alpha=128.0), group(*range(5, 12), rank=16, targets=("down_proj",)))
    )
    assert found.keys() == paths("qv", 0, 1) | paths("d", *range(5, 12))
    assert {found[name] for name in paths("qv", 0, 1)} == {LoraSpec(64, 128.0)}
    assert {found[name] for name in paths("d", *range(5, 12))} == {LoraSpec(16, 8.0)}


def test_layers_in_no_group_are_known():
    config = LoraConfig(layer_groups=(group(0, 1), group(5, 7, 8, 9)))
    assert config.notes(NAMES, ()) == ["layers without an adapter: 2-4, 6, 10-11"]
    assert LoraConfig(lora_dropout=0.1).notes(NAMES, ()) == []
    assert (ranges([]), ranges([3]), ranges([4, 3, 1])) == ("", "3", "1, 3-4")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_dropout_of_a_part_of_the_weights_is_told(init):
    (note,) = LoraConfig(init_lora_weights=init, lora_dropout=0.1).notes(NAMES, ())
    assert f"lora_dropout 0.1 also drops inputs of what {init} takes from the weights" in note
    assert LoraConfig(init_lora_weights=init, lora_dropout=0.0).notes(NAMES, ()) == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((group(0, 1, 2, 3), group(2, 3, 5)), "layer_groups overlap in layers 2-3: give each module once"),
        ((group(0, targets=("q_proj",)), group(0, targets=("q_proj",))),
         "layer_groups overlap in layers 0: give each module once"),
        ((group(10, 11, 12, 13, 20),), "layer_groups: layers 12-13, 20 are not there: the model has 0-11"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit(groups, message):
    assert error_of(chosen, layer_groups=groups) == message


def test_one_layer_in_two_groups_for_different_targets():
    found = chosen(layer_groups=(group(0, targets=("q_proj",)), group(0, rank=2, targets=("v_proj", "down_proj"))))
    assert {name: spec.lora_rank for name, spec in found.items()} == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.self_attn.v_proj": 2,
        "model.layers.0.mlp.down_proj": 2,
    }


@pytest.mark.parametrize(
    "groups",
    [
        (group(0, targets=("q_proj",)), group(0, rank=2, targets=("q_proj", "v_proj"))),
        (group(0), group(0, rank=2, targets=("q_proj",))),
    ],
)
def test_two_groups_that_both_want_one_module_overlap(groups):
    assert error_of(chosen, layer_groups=groups) == "layer_groups overlap in layers 0: give each module once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj must be at least 1, got 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj must be above 0, got -1"),
        ({"bias": "some"}, "bias 'some' is none of none, all, lora_only"),
        ({"layer_groups": (LayerGroup((0,), 2, 2.0, bits="fp4"),)},
         "bits 'fp4' of layer_groups 0: give nf4, or leave it out"),
        ({"init_lora_weights": "kaiming"},
         "init_lora_weights 'kaiming' is none of True, gaussian, orthogonal, pissa, olora, loftq, eva, "
         "corda, lora_ga, pissa_niter_N"),
        ({"init_lora_weights": "pissa_niter_0"},
         "init_lora_weights 'pissa_niter_0' is none of True, gaussian, orthogonal, pissa, olora, loftq, eva, "
         "corda, lora_ga, pissa_niter_N"),
        ({"init_lora_weights": "orthogonal", "lora_rank": 3}, "init_lora_weights orthogonal expects even ranks, got 3"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 5}},
         "init_lora_weights orthogonal expects even ranks, got 5"),
        ({"init_lora_weights": "pissa", "use_dora": True},
         "init_lora_weights pissa does not support use_dora or lora_bias: leave them out"),
        ({"layer_groups": (group(0),), "rank_pattern": {"q_proj": 2}},
         "layer_groups replaces rank_pattern, alpha_pattern and layers_to_transform: leave these out, or it"),
        ({"trainable_token_indices": (1, 2, 1)}, "trainable_token_indices names token 1 twice: give each once"),
        ({"trainable_token_indices": 5},
         "trainable_token_indices expects token ids such as [5, 17], or a mapping such as {embed_tokens: [5], "
         "lm_head: [5, 17]}, got 5"),
        ({"trainable_token_indices": (-1,)},
         "trainable_token_indices expects token ids such as [5, 17], or a mapping such as {embed_tokens: [5], "
         "lm_head: [5, 17]}, got [-1]"),
        ({"layer_groups": (group(0),), "layers_to_transform": 0},
         "layer_groups replaces rank_pattern, alpha_pattern and layers_to_transform: leave these out, or it"),
    ],
)  # fmt: skip
def test_settings_out_of_range_or_at_odds(settings, message):
    assert error_of(LoraConfig, **settings) == message


def test_dora_and_a_bias_beside_b_exclude_each_other():
    """As in PEFT: the bias would be scaled with the rows, and no merged layer has such a one."""
    message = error_of(LoraConfig, use_dora=True, lora_bias=True)
    assert "use_dora" in message and "lora_bias" in message


@pytest.mark.parametrize("rank", [0, -2])
def test_a_layer_group_keeps_the_bounds_of_ranks(rank):
    message = error_of(LoraConfig, layer_groups=(group(0, rank=rank),))
    assert "lora_rank" in message and str(rank) in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_rank": 9}, "target_rank must be from 1 to lora_rank 8, got 9"),
        ({"target_rank": 0}, "target_rank must be at least 1, got 0"),
        ({"tinit": -1}, "tinit must be at least 0, got -1"),
        ({"delta_t": 0}, "delta_t must be at least 1, got 0"),
        ({"beta1": 1.0}, "beta1 must be between 0 and 1, got 1.0"),
    ],
)
def test_adalora_out_of_range_or_at_odds(settings, message):
    assert error_of(AdaLoraConfig, **settings) == message


def test_one_name_stands_for_a_list_of_one():
    config = LoraConfig(modules_to_save="lm_head", exclude_layers="mlp", layers_pattern="h", layers_to_transform=3)
    assert (config.modules_to_save, config.exclude_layers) == (("lm_head",), ("mlp",))
    assert (config.layers_pattern, config.layers_to_transform) == (("h",), (3,))
    assert LoraConfig(target_modules=["a", "b"]) == LoraConfig(target_modules=("a", "b"))


SIZES = DecoderConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
)


@pytest.fixture
def model(graph_mode) -> CausalLM:
    return new_model(SIZES, ms.float32, seed=0)


BLOCK = [f"model.layers.{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("lm_head", {"lm_head"}),
        ("embed_tokens", {"model.embed_tokens"}),
        ("model.norm", {"model.norm"}),
        ("input_layernorm", {f"{block}.input_layernorm" for block in BLOCK}),
        ("1.self_attn.q_norm", {"model.layers.1.self_attn.q_norm"}),
        ("mlp.down_proj", {f"{block}.mlp.down_proj" for block in BLOCK}),
        # PEFT compares ends without a dot between: every norm
        ("norm", {"model.norm"} | {f"{block}.{norm}" for block in BLOCK for norm in
         ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")}),
    ],
)  # fmt: skip
def test_modules_to_save(model, wanted, found):
    assert saved_layers(model, LoraConfig(modules_to_save=wanted)).keys() == found
    inject(model, LoraConfig(2, target_modules=("v_proj",), modules_to_save=wanted))
    assert adapter_cells(model).keys() - adapted_layers(model).keys() == found
    whole = {p.name for p in model.get_parameters() if p.requires_grad and "lora_" not in p.name}
    assert whole == {f"{name}.weight" for name in found}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("lm_heed", "modules_to_save 'lm_heed' fits no module of the model; the nearest: lm_head"),
        (
            "self_attn",
            "modules_to_save 'self_attn': model.layers.0.self_attn is no dense layer, norm, embedding or head",
        ),
    ],
)
def test_modules_to_save_that_cannot_be(model, wanted, message):
    before = {name: type(cell) for name, cell in model.cells_and_names()}
    assert error_of(inject, model, LoraConfig(2, modules_to_save=wanted)) == message
    assert {name: type(cell) for name, cell in model.cells_and_names()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": (24,)}, "trainable_token_indices names token 24: the model's vocabulary has 24"),
        ({"trainable_token_indices": {"q_proj": (1,)}},
         "trainable_token_indices 'q_proj' is no embedding or head; there are: model.embed_tokens, lm_head"),
        ({"trainable_token_indices": (1,), "modules_to_save": "embed_tokens"},
         "trainable_token_indices and target_modules or modules_to_save both train model.embed_tokens: leave one of "
         "them out"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_train(model, settings, message):
    assert error_of(inject, model, LoraConfig(2, **settings)) == message


def test_the_report_says_what_got_no_adapter(model):
    """Three layers, one in a group: q of rank 4 has A 4 x 8 and B 8 x 4."""
    found = inject(model, LoraConfig(target_modules="q_proj", layer_groups=(group(1),)))
    assert (found.modules, found.trainable) == (("model.layers.1.self_attn.q_proj",), 64)
    assert found.line().split("\n")[1:] == ["layers without an adapter: 0, 2"]


def test_the_report_speaks_of_dropout_that_the_head_does_not_get(model):
    config = LoraConfig(2, lora_dropout=0.1, target_modules=("lm_head",))
    assert inject(model, config).notes == ("lora_dropout does not reach the adapter on the head",)
    again = new_model(SIZES, ms.float32, seed=0)
    assert inject(again, replace(config, lora_dropout=0.0)).notes == ()
