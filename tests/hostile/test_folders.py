"""Folders of models and tokenizers."""

import json
import os
from pathlib import Path

import pytest

from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import model_config, open_model

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def change(file, **values):
    found = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (found | values).items() if value is not KeyError}))


@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", ["224", [1], {}, True, 0.5, 0, -1, 2**31, 10**30], ids=repr)
def test_sizes_out_of_bounds(refused, tiny, key, value):
    change(tiny / "config.json", **{key: value})
    line = refused("estimate", "--load_checkpoint", "m")
    assert line.startswith(f"m/config.json: {key} expects ")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": KeyError}, "'num_hidden_layers' is missing"),
        ({"rms_norm_eps": 0}, "rms_norm_eps expects more than 0, got 0"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps expects a number, got 'a'"),
        ({"rope_theta": "a"}, "rope_theta expects a number, got 'a'"),
        ({"rope_theta": float("nan")}, "rope_theta expects "),
        ({"rope_theta": -1}, "rope_theta expects more than 0, got -1"),
        ({"rope_scaling": [1, 2]}, "rope_scaling expects an object, got [1, 2]"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": "x"}}, "the sizes"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope_type ['x'] is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e300}}, "factor 1e+300 is out of range"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta expects a number above 0, got 'x'"),
        ({"architectures": {"a": 1}}, "architectures expects a list, got {'a': 1}"),
        ({"architectures": [["x"]]}, "architectures.0 expects text, got ['x']"),
        ({"architectures": ["\x1b[31mX"]}, r"architecture \x1b[31mX is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings expects true or false, got 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>': give a token id"),
        ({"eos_token_id": [-1]}, "eos_token_id [-1]: give a token id"),
        ({"hidden_act": 5}, "hidden_act expects text, got 5"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 num_attention_heads cannot share 2"),
        ({"num_attention_heads": 4096, "num_key_value_heads": 1, "head_dim": None}, "cannot be rotated"),
        ({"model_type": 5}, "model_type expects text, got 5"),
    ],
    ids=str,
)
def test_settings_of_a_model(refused, tiny, values, wanted):
    change(tiny / "config.json", **values)
    assert wanted in refused("estimate", "--load_checkpoint", "m")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "not readable as JSON"),
        ("[]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": 1}}', "Extra data"),
        ("\xff\xfe", "is not UTF-8"),
    ],
    ids=lambda text: text[:12],
)
def test_json_of_a_model(refused, tiny, text, wanted):
    (tiny / "config.json").write_bytes(text.encode("latin-1"))
    line = refused("estimate", "--load_checkpoint", "m")
    assert line.startswith("m/config.json: ") and wanted in line


def test_files_that_are_none(refused, tiny):
    (tiny / "config.json").unlink()
    os.mkfifo(tiny / "config.json")
    assert refused("estimate", "--load_checkpoint", "m") == "m/config.json: not a regular file"
    (tiny / "config.json").unlink()
    (tiny / "config.json").symlink_to("/dev/zero")
    assert "leads out of the folder" in refused("estimate", "--load_checkpoint", "m")
    (tiny / "config.json").unlink()
    (tiny / "config.json").mkdir()
    assert refused("estimate", "--load_checkpoint", "m") == "m/config.json: not a regular file"


def test_a_file_of_settings_that_is_too_large(refused, tiny):
    with open(tiny / "config.json", "r+") as file:
        file.truncate(11 * 2**20)
    line = refused("estimate", "--load_checkpoint", "m")
    assert line == "m/config.json: larger than 10 MB, which no file of its kind is"


def test_sizes_are_compared_before_anything_is_built(refused, tiny):
    change(tiny / "config.json", num_hidden_layers=1000, hidden_size=2**17, intermediate_size=2**20)
    line = refused("predict", "--load_checkpoint", "m", "--predict_data", "x", "--max_new_tokens", 1)
    assert "tensors do not fit the model" in line


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"temperature": "hot"}, "temperature expects a number, got 'hot'"),
        ({"top_k": -1}, "top_k expects 0 or more, got -1"),
        ({"top_p": 2}, "top_p expects 1.0 or less, got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty expects more than 0, got 0"),
        ({"do_sample": "yes"}, "do_sample expects true or false, got 'yes'"),
        ({"eos_token_id": [[1]]}, "eos_token_id [[1]]: give a token id or a list of them"),
    ],
    ids=str,
)
def test_generation_settings(refused, tiny, settings, wanted):
    (tiny / "generation_config.json").write_text(json.dumps(settings))
    line = refused("estimate", "--load_checkpoint", "m")
    assert line.startswith("m/generation_config.json: ") and wanted in line


@pytest.mark.parametrize(
    ("weight_map", "wanted"),
    [
        ({"a": 5}, "weight_map.a expects text, got 5"),
        ({}, "weight_map expects 1 or more"),
        ([], "weight_map expects an object"),
        (None, "weight_map expects an object"),
        ({"a": "../outside.safetensors"}, "leads out of the folder"),
        ({"a": "/etc/hostname"}, "leads out of the folder"),
        ({"a": "x/../../outside.safetensors"}, "leads out of the folder"),
        ({"a": "link.safetensors"}, "leads out of the folder"),
        ({"a": "none.safetensors"}, "no such file"),
        ({"a": "a\0b"}, "is no file of it"),
        ({"a": "circle.safetensors"}, "'circle.safetensors' is no file of it"),
        ({"a": "."}, "not a regular file"),
        ({"a": "config.json"}, "not readable as safetensors"),
    ],
    ids=str,
)
def test_an_index(tiny, weight_map, wanted, tmp_path):
    (tiny / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (tiny / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (tiny / "circle.safetensors").symlink_to("circle.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(LoraMsError) as error:
        open_model(Path("m"), model_config(Path("m")))
    assert str(error.value).startswith("m") and wanted in str(error.value)


def test_links_inside_the_folder_and_into_the_hubs_cache_are_read(tiny, tmp_path):
    (tiny / "config.json").rename(tiny / "sizes.json")
    (tiny / "config.json").symlink_to("sizes.json")
    assert model_config(tiny)["hidden_size"] == 224
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tiny / "sizes.json").rename(blobs / "5e")
    (snapshot / "config.json").symlink_to("../../blobs/5e")
    assert model_config(snapshot)["hidden_size"] == 224


TOKENIZERS = [
    [],
    {"eos_token": 5},
    {"eos_token": ["</s>"]},
    {"tokenizer_class": 5},
    {"tokenizer_class": "Zz"},
    {"tokenizer_class": "../x"},
    {"added_tokens_decoder": {"x": 1}},
    {"added_tokens_decoder": {"5": 1}},
    {"added_tokens_decoder": {"99999999999": {"content": "x"}}},
    {"added_tokens_decoder": []},
    {"chat_template": 5},
    {"chat_template": [{"name": "default"}]},
    {"chat_template": {"default": 5}},
    {"model_max_length": "x"},
    {"extra_special_tokens": 5},
    {"extra_special_tokens": [5]},
    {"additional_special_tokens": 5},
    {"init_inputs": ["/etc/hostname"]},
    {"fast_tokenizer_files": ["../tokenizer.5.json"]},
    {"gguf_file": "/etc/hostname"},
]


@pytest.mark.parametrize("settings", TOKENIZERS, ids=str)
def test_tokenizer_settings(refused, tiny, rows, settings):
    (tiny / "tokenizer_config.json").write_text(json.dumps(settings))
    line = refused("preview", "--load_checkpoint", "m", "--train_dataset_dir", rows, "--row", 1)
    assert line.startswith("m")


def broken(found: dict, part: str, value: object) -> dict:
    *sections, name = part.split(".")
    place = found
    for section in sections:
        place = place[section]
    place[name] = value
    return found


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model.merges", [["x", "y"]]),
        ("model.merges", 5),
        ("model.vocab", []),
        ("model.vocab", {"a": -1}),
        ("model.type", "Zz"),
        ("model", None),
        ("added_tokens", [{"id": "x"}]),
        ("added_tokens", 5),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}]}),
        ("decoder", {"type": "Zz"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "x"}),
    ],
    ids=str,
)
def test_tokenizer_json(refused, tiny, rows, part, value):
    file = tiny / "tokenizer.json"
    file.write_text(json.dumps(broken(json.loads(file.read_text()), part, value)))
    line = refused("preview", "--load_checkpoint", "m", "--train_dataset_dir", rows, "--row", 1)
    assert line.startswith("m: not readable as a tokenizer (")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b'{"a":' + b"[" * 10**5, b"\0" * 100], ids=lambda c: repr(c[:6])
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files(refused, tiny, rows, name, content):
    (tiny / name).write_bytes(content)
    assert refused("preview", "--load_checkpoint", "m", "--train_dataset_dir", rows, "--row", 1).startswith("m")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_tokenizer_files_outside(refused, tiny, rows, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (tiny / name).unlink(missing_ok=True)
    (tiny / name).symlink_to(tmp_path / "secret")
    line = refused("preview", "--load_checkpoint", "m", "--train_dataset_dir", rows, "--row", 1)
    assert line.startswith(f"m: {name} leads out of the folder, to ")


EVIL = "open('EXECUTED', 'w')\nclass C:\n    pass\n"


@pytest.mark.parametrize("tokenizer_class", ["Zz", "C", "Qwen2Tokenizer", None])
@pytest.mark.parametrize(
    "auto_map", [["evil.C", "evil.C"], {"AutoTokenizer": ["evil.C", "evil.C"]}, {"AutoConfig": "evil.C"}], ids=str
)
def test_no_code_of_a_folder_runs(tiny, adapter, rows, tmp_path, monkeypatch, capsys, tokenizer_class, auto_map):
    """Not even where the answer to every question is yes."""
    import io

    from lora_ms.cli.main import main

    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for folder in (tiny, adapter):
        (folder / "evil.py").write_text(EVIL)
        tokens = {"auto_map": auto_map, "tokenizer_class": tokenizer_class}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
        sizes = json.loads((tiny / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(sizes | {"auto_map": {"AutoConfig": "evil.C"}, "model_type": "x"})
        )
    main(["preview", "--load_checkpoint", "m", "--train_dataset_dir", str(rows), "--row", "1"])
    main(["check-adapter", "--load_adapter", "a", "--load_checkpoint", "base"])
    main(
        ["predict", "--load_checkpoint", "base", "--load_adapter", "a", "--predict_data", "x", "--max_new_tokens", "1"]
    )
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("EXECUTED"))
