"""Model folders as users have them: what transformers loads loads here to the same numbers, and nothing is dropped."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from lora_ms import storage
from lora_ms.cli import main as cli
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import EMBEDDING, HEAD, full_names, is_tied, open_model
from lora_ms.models.hub import load_checkpoint, load_directory, read_config, save_directory
from lora_ms.models.mindformers_names import mindformers_name
from lora_ms.text import listed

pytestmark = pytest.mark.usefixtures("graph_mode")
NOTICE = "lm_head.weight is not the embedding, although tie_word_embeddings is true: it is used as stored"


def write_weights(path, tensors) -> None:
    for file in path.glob("model*.safetensors*"):
        file.unlink()
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def change_json(file, **changes) -> None:
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.fixture
def folder(reference, raw_tensors, tmp_path):
    """A copy of the reference Qwen2, which is tied, in one float32 file; and its tensors, to be written again."""
    path = shutil.copytree(reference / "models" / "qwen2", tmp_path / "model")
    tensors = raw_tensors(path)
    write_weights(path, tensors)
    return path, tensors


def same_weights(model, tensors) -> None:
    found = {name: parameter.asnumpy() for name, parameter in model.parameters_and_names()}
    assert sorted(found) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def error_of(path) -> str:
    with pytest.raises(LoraMsError) as caught:
        load_directory(path)
    return str(caught.value)


# a head beside a tied embedding


def other_head(tensors):
    """A head whose logits are those of the embedding, one token further."""
    return {**tensors, HEAD: np.roll(tensors[EMBEDDING], 1, 0)}


def test_a_head_that_differs_is_the_head(folder, golden):
    path, tensors = folder
    write_weights(path, other_head(tensors))
    model = load_directory(path)
    assert model.notices == (f"{path}: {NOTICE}",)
    assert not model.config.tie_word_embeddings and not is_tied(path, read_config(path)[1])
    values = golden("logits_qwen2")
    logits = model(Tensor(values["input_ids"])).asnumpy()
    np.testing.assert_allclose(logits, np.roll(values["logits"], 1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["the same", "in another type", "in a second file"])
def test_a_copy_of_the_embedding_is_no_head(folder, kind):
    path, tensors = folder
    copy = tensors[EMBEDDING].astype(np.float64 if kind == "in another type" else np.float32)
    if kind == "in a second file":
        write_weights(path, tensors)
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        (path / "model.safetensors").rename(path / files[0])
        save_file({HEAD: copy}, path / files[1])
        weight_map = {name: files[0] for name in tensors} | {HEAD: files[1]}
        (path / storage.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        write_weights(path, {**tensors, HEAD: copy})
    model = load_directory(path)
    assert model.config.tie_word_embeddings and not model.notices
    same_weights(model, tensors)


def test_one_number_is_a_difference(folder):
    path, tensors = folder
    head = tensors[EMBEDDING].copy()
    head[-1, -1] += 1e-3
    write_weights(path, {**tensors, HEAD: head})
    model = load_directory(path)
    assert not model.config.tie_word_embeddings
    same_weights(model, {**tensors, HEAD: head})


def test_a_head_of_another_size_does_not_fit(folder):
    path, tensors = folder
    write_weights(path, {**tensors, HEAD: tensors[EMBEDDING][:100]})
    assert "lm_head.weight is (100, 64), should be (128, 64)" in error_of(path)


def test_a_head_alone_is_the_embedding(folder, golden):
    path, tensors = folder
    write_weights(path, {HEAD if name == EMBEDDING else name: value for name, value in tensors.items()})
    model = load_directory(path)
    assert model.config.tie_word_embeddings and not model.notices
    same_weights(model, tensors)


def test_an_untied_model_needs_its_head(folder):
    path, tensors = folder
    change_json(path / "config.json", tie_word_embeddings=False)
    assert "missing lm_head.weight (128, 64)" in error_of(path)


@pytest.mark.parametrize("kind", ["copy", "other", "alone"])
def test_the_same_of_a_mindspore_checkpoint(folder, tmp_path, kind):
    path, tensors = folder
    config = read_config(path)[0]
    head = {"copy": tensors[EMBEDDING], "other": other_head(tensors)[HEAD], "alone": tensors[EMBEDDING]}[kind]
    stored = {**tensors, HEAD: head}
    if kind == "alone":
        del stored[EMBEDDING]
    values = [{"name": mindformers_name(name), "data": Tensor(value)} for name, value in stored.items()]
    ms.save_checkpoint(values, str(tmp_path / "model.ckpt"))
    model = load_checkpoint(tmp_path / "model.ckpt", config)
    same_weights(model, stored if kind == "other" else tensors)
    assert model.config.tie_word_embeddings == (kind != "other") and len(model.notices) == (kind == "other")


def test_what_is_saved_again_is_untied(folder, tmp_path):
    path, tensors = folder
    write_weights(path, other_head(tensors))
    save_directory(load_directory(path), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    again = load_directory(tmp_path / "again")
    assert not again.notices
    same_weights(again, other_head(tensors))


def test_merging_keeps_the_head_and_unties(folder, reference, tmp_path, capsys):
    path, tensors = folder
    write_weights(path, other_head(tensors))
    words = ["--load_adapter", reference / "adapters" / "qwen2", "--output_dir", tmp_path / "merged"]
    assert cli.main([str(word) for word in ("merge", "--load_checkpoint", path, *words)]) == 0
    out = capsys.readouterr().out
    assert NOTICE in out and "tie_word_embeddings becomes false" in out
    np.testing.assert_array_equal(load_file(tmp_path / "merged" / "model.safetensors")[HEAD], other_head(tensors)[HEAD])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert not load_directory(tmp_path / "merged").notices


def test_an_adapter_on_the_head_is_merged_into_the_head_that_is_stored(folder, reference, golden, tmp_path):
    """Against the sum of what the model says with the other head and what the adapter adds to it."""
    path, tensors = folder
    write_weights(path, other_head(tensors))
    adapter = shutil.copytree(reference / "variants" / "qwen2_lm_head", tmp_path / "adapter")
    kept = load_file(adapter / "adapter_model.safetensors")  # but the copy of the head that it was trained beside
    kept = {name: value for name, value in kept.items() if "base_layer" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    words = ["--load_adapter", adapter, "--output_dir", tmp_path / "merged"]
    assert cli.main([str(word) for word in ("merge", "--load_checkpoint", path, *words)]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    settings, stored = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    a, b = (stored[f"base_model.model.lm_head.lora_{factor}.weight"] for factor in "AB")
    wanted = other_head(tensors)[HEAD] + settings["lora_alpha"] / settings["r"] * b @ a
    np.testing.assert_allclose(merged[HEAD], wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(merged[EMBEDDING], tensors[EMBEDDING])


@pytest.mark.parametrize("form", [".ckpt", ".safetensors"])
def test_converting_keeps_the_head_both_ways(folder, tmp_path, form):
    path, tensors = folder
    write_weights(path, other_head(tensors))
    there = tmp_path / f"there{form}"
    assert cli.main(["convert", "--input", str(path), "--output", str(there)]) == 0
    change_json(path / "config.json", tie_word_embeddings=True)
    back = ["convert", "--input", there, "--output", tmp_path / "back", "--load_checkpoint", path]
    assert cli.main([str(word) for word in back]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    same_weights(load_directory(tmp_path / "back"), other_head(tensors))


def test_estimate_counts_the_head(folder, capsys):
    path, tensors = folder
    counts = []
    for stored in (tensors, other_head(tensors)):
        write_weights(path, stored)
        assert cli.main(["estimate", "--load_checkpoint", str(path)]) == 0
        counts.append(int(capsys.readouterr().out.split(" parameters")[0].replace(",", "")))
    assert counts[1] - counts[0] == tensors[EMBEDDING].size


# names without their beginning


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_saved_without_its_head(folder, tied):
    path, tensors = folder
    if not tied:
        tensors = other_head(tensors)
        change_json(path / "config.json", tie_word_embeddings=False)
    write_weights(path, {name.removeprefix("model."): value for name, value in tensors.items()})
    same_weights(load_directory(path), tensors)


def test_some_names_without_their_beginning(folder, golden):
    path, tensors = folder
    odd = {name.removeprefix("model.") if "layers.1" in name else name: value for name, value in tensors.items()}
    write_weights(path, odd)
    same_weights(load_directory(path), tensors)


def test_one_tensor_under_both_names_is_named(folder):
    path, tensors = folder
    write_weights(path, {**tensors, "norm.weight": tensors["model.norm.weight"]})
    assert "surplus norm.weight" in error_of(path)


def test_what_merging_writes_has_whole_names(folder, reference, tmp_path):
    path, tensors = folder
    write_weights(path, {name.removeprefix("model."): value for name, value in tensors.items()})
    words = ["--load_adapter", reference / "adapters" / "qwen2", "--output_dir", tmp_path / "merged"]
    assert cli.main([str(word) for word in ("merge", "--load_checkpoint", path, *words)]) == 0
    assert sorted(load_file(tmp_path / "merged" / "model.safetensors")) == sorted(tensors)


def test_whole_names():
    entries = dict.fromkeys(["embed_tokens.weight", "layers.0.x", "norm.weight", "lm_head.weight", "normal.weight"])
    assert list(full_names(entries)) == [
        "model.embed_tokens.weight", "model.layers.0.x", "model.norm.weight", "lm_head.weight", "normal.weight"
    ]  # fmt: skip


# an index beside a single file


def write_shards(path, tensors, files=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")) -> None:
    names = sorted(tensors)
    weight_map = {name: files[i % len(files)] for i, name in enumerate(names)}
    for file in files:
        part = {name: np.ascontiguousarray(tensors[name]) for name in names if weight_map[name] == file}
        save_file(part, path / file, {"format": "pt"})
    (path / storage.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_older_shards_beside_a_newer_file_are_refused(folder):
    path, tensors = folder
    write_shards(path, {name: value / 2 for name, value in tensors.items()})
    assert error_of(path) == (
        f"{path}: holds model.safetensors and {storage.INDEX} with model-00001-of-00002.safetensors: which are the "
        "weights? Move the older ones away (transformers reads model.safetensors, vLLM the others)"
    )


def test_one_shard_that_is_left_is_refused(folder):
    path, tensors = folder
    write_shards(path, tensors)
    (path / "model-00001-of-00002.safetensors").unlink()
    assert "with model-00002-of-00002.safetensors: which are the weights?" in error_of(path)


def test_an_index_whose_shards_are_gone_is_of_no_weight(folder):
    path, tensors = folder
    write_shards(path, {name: value / 2 for name, value in tensors.items()})
    for file in path.glob("model-*.safetensors"):
        file.unlink()
    same_weights(load_directory(path), tensors)


def test_an_index_of_the_single_file(folder):
    path, tensors = folder
    write_shards(path, tensors, ["model.safetensors"])
    same_weights(load_directory(path), tensors)


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(folder):
    path, tensors = folder
    (path / "model.safetensors").unlink()
    write_shards(path, tensors)
    for file in sorted(path.glob("model-*.safetensors")):  # each holds spoiled copies of what is the other's
        held = load_file(file)
        spoiled = {name: np.zeros_like(value) for name, value in tensors.items() if name not in held}
        save_file({**held, **spoiled}, file, {"format": "pt"})
    same_weights(load_directory(path), tensors)


def test_no_weights_at_all(folder):
    path, _ = folder
    (path / "model.safetensors").unlink()
    assert error_of(path) == f"{path}: holds no model.safetensors and no {storage.INDEX}"
    assert is_tied(path, {"tie_word_embeddings": True})  # what config.json says
    assert is_tied(path, {"architectures": ["SmolLM3ForCausalLM"]})  # or what its family means by saying nothing
    assert not is_tied(path, {"architectures": ["LlamaForCausalLM"]})


# long lists


def test_a_list_of_tensors_is_cut(folder):
    path, tensors = folder
    write_weights(path, {f"other.{name}": value for name, value in tensors.items()})
    text = error_of(path)
    assert text.startswith(f"{path}: {2 * len(tensors)} tensors do not fit the model: missing model.embed_tokens")
    assert text.endswith(f" and {2 * len(tensors) - 10} more") and text.count(";") == 9 and len(text) < 1500


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "0"), (10, "0; 1; 2; 3; 4; 5; 6; 7; 8; 9"),
                        (11, "0; 1; 2; 3; 4; 5; 6; 7; 8; 9 and 1 more"),
                        (2345, "0; 1; 2; 3; 4; 5; 6; 7; 8; 9 and 2,335 more")]
)  # fmt: skip
def test_lists(count, text):
    assert listed([str(i) for i in range(count)]) == text


# end tokens


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        (2, None, (2,)),
        (2, {}, (2,)),
        (2, {"eos_token_id": 5}, (2, 5)),
        (2, {"eos_token_id": [5, 2, 7]}, (2, 5, 7)),
        (None, {"eos_token_id": [5]}, (5,)),
        ([2, 3], {"eos_token_id": None, "pad_token_id": 0}, (2, 3)),
        (None, None, ()),
    ],
)
def test_end_tokens_of_both_files(folder, config, generation, found):
    path, _ = folder
    change_json(path / "config.json", eos_token_id=config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(path)[0].eos_token_ids == found


@pytest.mark.parametrize("wrong", ["2", [2, "3"], 2.5, True, {"id": 2}])
def test_end_tokens_that_are_none(folder, wrong):
    path, _ = folder
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    assert error_of(path) == (
        f"{path / 'generation_config.json'}: eos_token_id {wrong!r}: give a token id or a list of them"
    )


def test_a_generation_config_that_is_no_json(folder):
    path, _ = folder
    (path / "generation_config.json").write_text("{")
    assert error_of(path).startswith(f"{path / 'generation_config.json'}: not readable as JSON (")


def test_generation_settings_go_where_the_weights_go(folder, reference, tmp_path):
    path, _ = folder
    settings = {"eos_token_id": [2, 5], "temperature": 0.7, "transformers_version": "4.51.0"}
    (path / "generation_config.json").write_text(json.dumps(settings))
    save_directory(load_directory(path), tmp_path / "saved")
    words = ["--load_adapter", reference / "adapters" / "qwen2", "--output_dir", tmp_path / "merged"]
    assert cli.main([str(word) for word in ("merge", "--load_checkpoint", path, *words)]) == 0
    for target in ("saved", "merged"):
        assert json.loads((tmp_path / target / "generation_config.json").read_text()) == settings
        assert read_config(tmp_path / target)[0].eos_token_ids == (2, 5)


def test_open_model_needs_no_weights_to_be_read(folder, monkeypatch):
    """But where the head must be compared with the embedding."""
    path, tensors = folder
    monkeypatch.setattr(storage, "read_words", lambda entry: pytest.fail("read"))
    assert open_model(path, {"tie_word_embeddings": True}).tied
    assert not open_model(path, {}).tied
