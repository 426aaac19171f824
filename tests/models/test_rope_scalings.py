"""Every rotary scaling against transformers' logits and greedy tokens, past the length that the model was made for."""

import json
import shutil

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Generator
from lora_ms.models.hub import load_directory, read_config
from lora_ms.models.rope_settings import rope
from lora_ms.nn.rope import row_lengths

NAMES = ("llama2", "qwen2", "qwen3")
ORIGINAL = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": ORIGINAL},
    "yarn": YARN,
    "yarn_betas": {**YARN, "beta_fast": 4, "beta_slow": 0.05, "truncate": False},
    "yarn_attention": {**YARN, "attention_factor": 1.3, "beta_fast": 4, "beta_slow": 0.25},
    "yarn_mscale": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.7},
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture
def scaled(reference, tmp_path):
    """A reference model under another scaling, in the layout of before transformers 5 (rope_scaling) or since."""

    def make(name: str, kind: str, newer: bool = False):
        path = tmp_path / name
        shutil.copytree(reference / "models" / name, path)
        hf = json.loads((path / "config.json").read_text())
        theta = hf.pop("rope_theta", None) or hf["rope_parameters"]["rope_theta"]
        hf = {key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_scaling")}
        hf["max_position_embeddings"] = ORIGINAL if kind == "dynamic" else 4 * ORIGINAL
        hf |= {"rope_parameters": {"rope_theta": theta, **ROPES[kind]}} if newer else {
            "rope_theta": theta, "rope_scaling": ROPES[kind]}  # fmt: skip
        (path / "config.json").write_text(json.dumps(hf))
        return path

    return make


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_past_the_original_length(native, scaled, golden, name, kind):
    values = golden(f"rope_{name}")
    model = load_directory(scaled(name, kind, newer=name == "qwen2"), operators=native)
    logits = model(Tensor(values["input_ids"])).asnumpy()[0, values["positions"]]
    np.testing.assert_allclose(logits, values[f"{kind}/logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in NAMES for kind in ("dynamic", "yarn_betas")]
    + [("llama2", "linear"), ("qwen2", "yarn_mscale"), ("qwen3", "yarn_attention"), ("qwen3", "llama3")],
)
def test_generation_past_the_original_length(native, scaled, golden, name, kind):
    """Both prompts in one batch: one crosses the original length while it is answered, the other begins past it."""
    values = golden(f"rope_{name}")
    ids = values["input_ids"][0].tolist()
    new = Generator(load_directory(scaled(name, kind), operators=native)).generate([ids[:24], ids[:40]], 16)
    np.testing.assert_array_equal(new, [values[f"{kind}/crossing"], values[f"{kind}/beyond"]])


@pytest.mark.parametrize("kind", ["dynamic", "yarn_attention"])
def test_both_sets_of_operators(operators, scaled, golden, kind):
    values = golden("rope_qwen3")
    model = load_directory(scaled("qwen3", kind), operators=operators)
    logits = model(Tensor(values["input_ids"])).asnumpy()[0, values["positions"]]
    np.testing.assert_allclose(logits, values[f"{kind}/logits"], rtol=0, atol=1e-4)


def test_a_row_is_scaled_by_its_own_length(scaled):
    """Dynamic NTK: in one line, in a padded batch or alone, a row has the same logits."""
    model = load_directory(scaled("qwen3", "dynamic"))
    rows = [np.random.default_rng(length).integers(4, 128, length).astype(np.int32) for length in (20, 50, 80)]
    alone = [model(Tensor(row[None])).asnumpy()[0] for row in rows]
    assert np.abs(alone[2][:20] - model(Tensor(rows[2][None, :20])).asnumpy()[0]).max() > 0.1  # so the length counts
    positions = np.concatenate([np.arange(len(row)) for row in rows]).astype(np.int32)
    hidden = model.hidden_states(Tensor(np.concatenate(rows)[None]), Tensor(positions[None]))
    packed = model.project(hidden, model.head_weight()).asnumpy()
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=0, atol=1e-4)
    for side in ("left", "right"):
        ids, mask = np.zeros((3, 80), np.int32), np.zeros((3, 80), np.int32)
        for i, row in enumerate(rows):
            where = slice(80 - len(row), 80) if side == "left" else slice(0, len(row))
            ids[i, where], mask[i, where] = row, 1
        logits = model(Tensor(ids), Tensor(mask)).asnumpy()
        np.testing.assert_allclose(logits[mask == 1], np.concatenate(alone), rtol=0, atol=1e-4)


def test_lengths_of_rows_in_a_line():
    positions = Tensor(np.array([0, 1, 2, 0, 0, 1, 0, 1, 2, 3], np.int32))
    assert row_lengths(positions).asnumpy().tolist() == [3, 3, 3, 1, 2, 2, 4, 4, 4, 4]


LONGEST = {
    "linear": 4 * 128, "dynamic": 4 * ORIGINAL, "llama3": 128, "yarn": 128, "yarn_betas": 128,
    "yarn_attention": 128, "yarn_mscale": 128,
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_how_long_a_text_may_be(scaled, kind):
    assert read_config(scaled("llama2", kind))[0].longest == LONGEST[kind]


def error_of(**hf) -> str:
    with pytest.raises(LoraMsError) as caught:
        rope(hf)
    return str(caught.value)


LINEAR, DEFAULT = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("hf", "found"),
    [
        ({}, (10000.0, None)),
        ({"rope_theta": 5e5}, (5e5, None)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
         (5e5, {"rope_type": "linear", "factor": 2})),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e6}}, (1e6, LINEAR)),
        # a config.json that transformers 5 wrote, and to which its reader added what the model card says
        ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, (10000.0, LINEAR)),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 1e6}, "rope_scaling": {**LINEAR, "rope_theta": 1e6}},
         (1e6, LINEAR)),
        ({"rope_parameters": DEFAULT, "rope_scaling": None}, (10000.0, None)),
        ({"rope_parameters": {}, "rope_scaling": LINEAR, "rope_theta": 7.0}, (7.0, LINEAR)),
        # the original length: the whole model's, or max_position_embeddings where nothing says it
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
         (10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
          "original_max_position_embeddings": 16},
         (10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})),
        ({"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 64},
          "max_position_embeddings": 128},
         (10000.0, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64})),
        ({"rope_scaling": {**YARN, "finetuned": True, "attention_factor": None}}, (10000.0, YARN)),
    ],
)  # fmt: skip
def test_settings_that_stand_side_by_side(hf, found):
    assert rope(hf) == found


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"rope_parameters": {**DEFAULT, "rope_theta": 1e6}, "rope_scaling": LINEAR},
         "rope_theta would be 10000 in place of 1e+06: write the scaling into rope_parameters"),
        ({"rope_parameters": {**YARN, "rope_theta": 1e4}, "rope_scaling": LINEAR},
         "rope_scaling is linear and rope_parameters yarn: take one of them out"),
        ({"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}},
         "one set of numbers for all layers is"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}},
         "rope_type 'longrope' is not supported; supported: default, linear, dynamic, yarn, llama3"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_type 'mrope' is not supported"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type dynamic needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_type linear: factor '4' is out of range"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_type linear: factor 0 is out of range"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_type yarn: truncate 1 is out of range"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
    ],
)  # fmt: skip
def test_what_is_refused(hf, message):
    assert message in error_of(**hf)
