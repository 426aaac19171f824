"""config.json in both layouts, and what is refused in it."""

import json
import shutil

import pytest

from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import load_directory, read_config

ALL = {
    "vocab_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPECTED = {
    "llama2": DecoderConfig(
        **ALL,
        hidden_size=48,
        num_key_value_heads=4,
        head_dim=12,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        eos_token_ids=(2,),
    ),
    "llama3": DecoderConfig(
        **ALL,
        hidden_size=64,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=SCALING,
        tie_word_embeddings=True,
        eos_token_ids=(2, 3),
    ),
    "qwen2": DecoderConfig(
        **ALL,
        hidden_size=64,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        attention_bias=True,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
    ),
    "qwen3": DecoderConfig(
        **ALL,
        hidden_size=64,
        num_key_value_heads=2,
        head_dim=24,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm=True,
        eos_token_ids=(2,),
    ),
    "deepseek_r1_qwen": DecoderConfig(
        **ALL,
        hidden_size=48,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        attention_bias=True,
        eos_token_ids=(2,),
    ),
    "smollm3": DecoderConfig(
        **ALL,
        hidden_size=48,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        unrotated_layers=(1,),
        tie_word_embeddings=True,
        eos_token_ids=(2,),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_of_every_reference_model(reference, name):
    config, hf = read_config(reference / "models" / name)
    assert config == EXPECTED[name]
    assert hf == json.loads((reference / "models" / name / "config.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_both_layouts_say_the_same(reference, tmp_path, name):
    """Rotary settings moved between the layouts of before and since transformers 5."""
    hf = json.loads((reference / "models" / name / "config.json").read_text())
    if "rope_parameters" in hf:
        rope = hf.pop("rope_parameters")
        hf["rope_theta"] = rope.pop("rope_theta")
        hf["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    else:
        scaling = hf.pop("rope_scaling", None) or {"rope_type": "default"}
        hf["rope_parameters"] = {"rope_theta": hf.pop("rope_theta"), **scaling}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert read_config(tmp_path)[0] == EXPECTED[name]


@pytest.fixture
def edited(reference, tmp_path):
    """A copy of a reference model whose config.json has ``changes``; None takes a key out."""

    def edit(name: str, **changes):
        path = tmp_path / name
        shutil.copytree(reference / "models" / name, path)
        hf = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({key: value for key, value in hf.items() if value is not None}))
        return path

    return edit


def error_of(path):
    with pytest.raises(LoraMsError) as caught:
        load_directory(path)
    return str(caught.value)


def test_an_unknown_architecture_is_refused(edited):
    path = edited("llama2", architectures=["GPT2LMHeadModel"])
    assert error_of(path) == (
        f"{path}: architecture GPT2LMHeadModel is not supported; "
        "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM"
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
         "config.json: rope_type 'longrope' is not supported; supported: default, linear, dynamic, yarn, llama3"),
        ("llama2", {"rope_scaling": {"type": "su", "factor": 4.0}},
         "config.json: rope_type 'su' is not supported; supported: default, linear, dynamic, yarn, llama3"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]},
         "config.json: layer_types has sliding_attention, but use_sliding_window is not true or sliding_window is "
         "null: set both, or take layer_types out"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
         "config.json: layer_types ['full_attention'] is not supported; supported: full_attention or "
         "sliding_attention for each of the 2 layers"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]},
         "config.json: layer_types ['full_attention', 'chunked_attention'] is not supported; supported: "
         "full_attention or sliding_attention for each of the 2 layers"),
        ("qwen3", {"layer_types": "full_attention"},
         "config.json: layer_types full_attention is not supported; supported: full_attention or sliding_attention "
         "for each of the 2 layers"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": -8, "layer_types": None, "max_window_layers": 0},
         "config.json: sliding_window -8 is no number of tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": "8"},
         "config.json: sliding_window '8' is no number of tokens"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "all", "layer_types": None},
         "config.json: max_window_layers 'all' is no number of layers"),
        ("llama2", {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
         "config.json: sliding_window 0 is no number of tokens"),
        ("qwen3", {"attention_bias": True}, "config.json: attention_bias true is not supported for Qwen3"),
        ("llama2", {"attention_bias": True}, "config.json: attention_bias true is not supported for Llama"),
        ("llama2", {"mlp_bias": True}, "config.json: mlp_bias true is not supported for Llama"),
        ("smollm3", {"attention_bias": True}, "config.json: attention_bias true is not supported for SmolLM3"),
        ("smollm3", {"mlp_bias": True}, "config.json: mlp_bias true is not supported for SmolLM3"),
        ("smollm3", {"no_rope_layers": [0]}, "config.json: no_rope_layers [0] is not 0 or 1 for each of the 2 layers"),
        ("smollm3", {"no_rope_layers": [1, 2]},
         "config.json: no_rope_layers [1, 2] is not 0 or 1 for each of the 2 layers"),
        ("llama2", {"hidden_act": "gelu"}, "config.json: hidden_act 'gelu' is not supported; supported: silu"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(edited, name, changes, message):
    assert error_of(edited(name, **changes)) == message


@pytest.mark.parametrize(
    ("changes", "unrotated", "windowed"),
    [
        ({}, (3,), ()),
        ({"no_rope_layer_interval": 2}, (1, 3), ()),
        ({"no_rope_layers": [0, 1, 1, 1, 0]}, (0,), ()),  # more than there are layers
        ({"use_sliding_window": True}, (3,), ()),  # of no size
        ({"use_sliding_window": True, "sliding_window": 8}, (3,), (3,)),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 4}, (3,), ()),
    ],
)  # fmt: skip
def test_what_smollm3_leaves_out(edited, changes, unrotated, windowed):
    absent = dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "layer_types", "rope_theta"))
    absent |= dict.fromkeys(("num_key_value_heads", "max_position_embeddings"))
    config, _ = read_config(edited("smollm3", num_hidden_layers=4, **{**absent, **changes}))
    assert (config.unrotated_layers, config.sliding_layers) == (unrotated, windowed)
    assert (config.rope_theta, config.num_key_value_heads, config.max_position_embeddings) == (2e6, 4, 32768)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads", "intermediate_size"])
def test_a_missing_key_is_named(edited, key):
    path = edited("llama2", **{key: None})
    assert error_of(path) == f"{path / 'config.json'}: '{key}' is missing"


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
         "low_freq_factor"),
    ],
)  # fmt: skip
def test_a_missing_key_of_the_rope_scaling_is_named(edited, scaling, key):
    assert key in error_of(edited("llama2", rope_scaling=scaling))


def test_config_json_that_is_missing_or_no_json(edited):
    path = edited("llama2")
    (path / "config.json").write_text("{")
    assert error_of(path).startswith(f"{path / 'config.json'}: not readable as JSON (")
    (path / "config.json").unlink()
    assert error_of(path) == f"{path / 'config.json'}: no such file"
