"""Quantised folders that are broken, hostile, or of another kind: one line each, before memory is taken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import model_config, open_model
from lora_ms.quant.settings import Quantisation, read_quantisation, skipping_all_but

KEY = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"
TYPES = {"U8": np.uint8, "F32": np.float32, "BF16": np.uint16}


@pytest.fixture
def folder(reference, tmp_path) -> Path:
    return shutil.copytree(reference / "nf4" / "double", tmp_path / "model")


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces tensors, by what follows ``KEY``; None removes one. A state is given as JSON's value."""
    entries = storage.open_dir(folder)
    values = {
        name: (e.dtype, storage.read_raw(e).copy().view(TYPES[e.dtype]).reshape(e.shape)) for name, e in entries.items()
    }
    for part, value in changes.items():
        name = STATE if part == "state" else KEY + {"weight": ""}.get(part, f".{part}")
        if value is None:
            del values[name]
        elif part == "state":
            values[name] = ("U8", np.frombuffer(json.dumps(value).encode(), np.uint8))
        else:
            values[name] = ({1: "U8", 4: "F32"}[value.itemsize], value)
    planned = {
        name: storage.Planned(dtype, value.shape, lambda value=value: [value])
        for name, (dtype, value) in values.items()
    }
    storage.write_blocks(folder / "model.safetensors", planned)


def state_of(folder: Path) -> dict:
    return json.loads(storage.read_raw(storage.open_dir(folder)[STATE]).tobytes())


def refused(folder: Path) -> str:
    with pytest.raises(LoraMsError) as error:
        for weight in open_model(folder, model_config(folder)).quantised.values():
            weight.read()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_there_is_read(folder):
    found = open_model(folder, model_config(folder))
    assert found.entries[KEY].shape == (64, 64) and len(found.quantised) == 14
    assert found.entries["model.norm.weight"].dtype == "BF16"
    rewrite(folder)
    assert open_model(folder, model_config(folder)).quantised[KEY].read().shape == (64, 64)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"absmax": np.zeros(63, np.uint8)}, f"{KEY}.absmax is U8 of 63 bytes, should be U8 of 64 for [64, 64]"),
        ({"absmax": np.zeros(64, np.float32)}, f"{KEY}.absmax is F32 of 256 bytes, should be U8 of 64 for [64, 64]"),
        ({"weight": np.zeros((7, 1), np.uint8)}, f"{KEY} is U8 of 7 bytes, should be U8 of 2,048 for [64, 64]"),
        ({"nested_absmax": None}, f"{KEY}.nested_absmax is missing: the folder is not complete"),
        ({"quant_map": np.zeros(16, np.float32)}, f"{KEY}.quant_map holds other numbers than NF4's"),
        ({"nested_absmax": np.array([np.nan], np.float32)}, f"{KEY}: an absmax is negative or not finite"),
        ({"nested_quant_map": np.full(256, np.inf, np.float32)}, f"{KEY}: an absmax is negative or not finite"),
    ],
)
def test_parts_that_do_not_fit(folder, changes, line):
    rewrite(folder, **changes)
    assert refused(folder).endswith(line)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"shape": [64, 2**40]}, "shape [64, 1099511627776]: expects two sizes"),
        ({"shape": [64, 128]}, "is U8 of 2,048 bytes, should be U8 of 4,096 for [64, 128]"),
        ({"shape": [4096]}, "shape [4096]: expects two sizes"),
        ({"shape": [True, 4096]}, "shape [True, 4096]: expects two sizes"),
        ({"blocksize": 48}, "blocksize 48 is not supported: 64 is"),
        ({"nested_blocksize": 64}, "nested_blocksize 64 is not supported: 256 is"),
        ({"quant_type": "fp4"}, "quant_type 'fp4' is not supported: nf4 is"),
        ({"dtype": "int8"}, "dtype 'int8' is none of float32, float16, bfloat16"),
        ({"nested_offset": "1"}, "nested_offset '1' is no number"),
        ({"nested_offset": float("nan")}, "nested_offset nan is no number"),
    ],
)
def test_states_that_are_not_ours(folder, changes, line):
    rewrite(folder, state={**state_of(folder), **changes})
    assert refused(folder).endswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [(b"[" * 9000, "is not valid JSON"), (b" " * 20_000, "is no JSON text of at most"), (b"7", "object")],
)
def test_states_that_are_no_json(folder, text, line):
    rewrite(folder)
    entries = storage.open_dir(folder)
    planned = {
        name: storage.Planned(e.dtype, e.shape, lambda e=e: [storage.read_raw(e).view(TYPES[e.dtype])])
        for name, e in entries.items()
    }
    planned[STATE] = storage.Planned("U8", (len(text),), lambda: [np.frombuffer(text, np.uint8)])
    storage.write_blocks(folder / "other.safetensors", planned)
    (folder / "other.safetensors").replace(folder / "model.safetensors")
    assert line in refused(folder)


def test_an_absmax_below_zero(reference, tmp_path):
    folder = shutil.copytree(reference / "nf4" / "plain", tmp_path / "model")
    rewrite(folder, absmax=np.full(64, -1, np.float32))
    assert refused(folder).endswith(f"{KEY}: an absmax is negative or not finite")


def test_a_tied_head_in_four_bits(reference, tmp_path):
    """Two quantised tensors of one name's role cannot be compared: a line, and no traceback."""
    folder = shutil.copytree(reference / "nf4" / "plain", tmp_path / "model")
    entries = storage.open_dir(folder)
    values = {name: (e.dtype, e.shape, np.array(storage.read_raw(e))) for name, e in entries.items()}
    for name in [name for name in values if name.startswith(KEY)]:
        for copy in ("lm_head.weight", "model.embed_tokens.weight"):
            values[copy + name.removeprefix(KEY)] = values[name]
    planned = {
        name: storage.Planned(dtype, shape, lambda value=value: [value])
        for name, (dtype, shape, value) in values.items()
    }
    storage.write_blocks(folder / "other", planned)
    (folder / "other").replace(folder / "model.safetensors")
    assert "type NF4 is not supported" in refused(folder)


# --- settings


def test_settings_are_written_as_they_are_read():
    for found in (Quantisation(), Quantisation(True), Quantisation(False, ("lm_head", "model.layers.1"))):
        assert read_quantisation(found.to_config()) == found
        assert read_quantisation(found.name()).double == found.double


def test_the_type_of_the_products_is_said_where_it_is_another():
    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "torch.bfloat16"}
    found = read_quantisation(asked)
    assert found.compute_dtype == "bfloat16" == found.to_config()["bnb_4bit_compute_dtype"]
    assert read_quantisation(found.to_config()) == found and found.notices("bfloat16") == []
    (line,) = found.notices("float32")
    assert line.startswith("bnb_4bit_compute_dtype bfloat16 has no effect: products are computed as compute_dtype says")
    assert read_quantisation({**asked, "bnb_4bit_compute_dtype": "float32"}).notices("bfloat16") == []
    with pytest.raises(
        ValueError, match="bnb_4bit_compute_dtype expects one of float32, float16, bfloat16, got 'int8'"
    ):
        read_quantisation({**asked, "bnb_4bit_compute_dtype": "int8"})


def test_which_modules_stay_whole():
    """transformers' rule: the beginning of a path up to a dot, an expression, or the end of a path; the head always."""
    path = "model.layers.11.self_attn.q_proj"
    assert Quantisation().quantises(path) and not Quantisation().quantises("lm_head")
    for pattern, quantised in {
        "model.layers.1": True,
        "model.layers.11": False,
        "model.layers.11.self_attn.q": True,
        "q_proj": False,
        "model.layers.1[0-3].self_attn": False,
        "layers.11": True,
    }.items():
        assert Quantisation(skip=(pattern,)).quantises(path) is quantised, pattern
    chosen = Quantisation(skip=skipping_all_but(range(1, 3), 12))
    layers = [layer for layer in range(12) if chosen.quantises(f"model.layers.{layer}.mlp.up_proj")]
    assert layers == [1, 2]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("int4", "'int4' is none of nf4, nf4-double, and no mapping of transformers' keys"),
        (7, "7 is none of nf4, nf4-double"),
        ({"load_in_4bit": 1}, "load_in_4bit expects True or False, got 1"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4' is not supported: nf4 is"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": "x"}, "expects a list of names"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["("]}, "no regular expression"),
        ({"load_in_4bits": True}, "unknown key 'load_in_4bits'; the nearest is load_in_4bit"),
    ],
)
def test_settings_refused(value, line):
    with pytest.raises(ValueError, match=".") as error:
        read_quantisation(value)
    assert line in str(error.value)


def test_a_newer_transformers_may_have_more_keys():
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_new": 1, "quant_method": "bitsandbytes"}
    assert read_quantisation(settings, strict=False) == Quantisation()
