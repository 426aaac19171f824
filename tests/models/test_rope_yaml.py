"""MindFormers' keys of the rotary scalings: extend_method and scaling_factor."""

import math

import pytest

from lora_ms.config.model import ModelSizes
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.nn.rope import rotation_of
from lora_ms.recipes.model import check_sizes, decoder_config

SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "max_position_embedding": 256}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_slow": 1, "beta_fast": 32, "mscale": 1.0,
        "mscale_all_dim": 0.0}  # fmt: skip


def sizes_of(**keys) -> DecoderConfig:
    return decoder_config(ModelSizes(**SIZES, **keys))


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"extend_method": "PI", "scaling_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"extend_method": "linear", "scaling_factor": {"factor": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
        ({"extend_method": "DYNAMIC_NTK", "scaling_factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}),
        ({"extend_method": "None", "scaling_factor": 4.0}, None),
        ({"extend_method": "YARN", "scaling_factor": {"factor": 4.0, "original_max_position_embedding": 64}},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ({"extend_method": "YARN", "scaling_factor": YARN},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
          "attention_factor": 0.1 * math.log(4) + 1}),
        # MindFormers' ratio of the two, not the paper's factor
        ({"extend_method": "YARN", "scaling_factor": {**YARN, "mscale": 0.5}},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
          "attention_factor": 0.05 * math.log(4) + 1}),
    ],
)  # fmt: skip
def test_scalings(keys, scaling):
    found = sizes_of(**keys)
    assert found.rope_scaling == scaling and found.rope_theta == 10000.0


def test_ntk_is_a_larger_theta():
    found = sizes_of(extend_method="NTK", scaling_factor=8.0, theta=10000.0)
    assert (found.rope_theta, found.rope_scaling) == (80000.0, None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"extend_method": "YARN", "scaling_factor": {"original_max_position_embeddings": 64}},
            "YARN|yarn needs factor",
        ),
        ({"extend_method": "YARN", "scaling_factor": {**YARN, "beta": 3}}, "beta is unknown to extend_method YARN"),
        ({"extend_method": "YARN", "scaling_factor": {**YARN, "mscale": "1"}}, "mscale '1' is out of range"),
        ({"extend_method": "LLAMA3", "scaling_factor": {"factor": 8.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"extend_method": "PI", "scaling_factor": {"factor": -1.0}}, "factor -1.0 is out of range"),
        ({"extend_method": "NTK", "scaling_factor": 8.0}, "NTK needs theta"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(LoraMsError, match=message):
        sizes_of(**keys)


def test_a_yaml_that_spells_out_the_defaults_is_the_same_model(tmp_path):
    """config.json of Qwen2.5's long context says only the factor and the original length."""
    hugging_face = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    found = sizes_of(extend_method="YARN", scaling_factor=YARN)
    assert rotation_of(16, 1e4, hugging_face, 256).attention_factor == found.rope_scaling["attention_factor"]
    there = DecoderConfig(**{**found.__dict__, "rope_scaling": hugging_face})
    check_sizes(ModelSizes(**SIZES, extend_method="YARN", scaling_factor=YARN), there, tmp_path)
    for other in ({**YARN, "factor": 8.0}, {**YARN, "beta_fast": 1.5}, {**YARN, "mscale_all_dim": 1.0}):
        with pytest.raises(LoraMsError, match="extend_method: .* in the YAML, .* in config.json"):
            check_sizes(ModelSizes(**SIZES, extend_method="YARN", scaling_factor=other), there, tmp_path)
