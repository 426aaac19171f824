"""What a user can get wrong: each is one line on the error stream and status 2, and nothing is written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from lora_ms.cli.main import main

TEXT = {"instruction": "Who are you?", "output": "Tiny."}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the bytes of the files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys, model, rows_file):
    """``refused(*more)``: the error of ``lora-ms finetune`` with good arguments and ``more``, which override them."""
    monkeypatch.chdir(tmp_path)
    good = ["--load_checkpoint", model, "--train_dataset_dir", rows_file, "--seq_length", "16", "--output_dir", "out"]

    def run(*more) -> str:
        before = tree(tmp_path)
        status = main(["finetune", *map(str, good), *map(str, more)])
        error = capsys.readouterr().err
        assert tree(tmp_path) == before
        assert (status, error[:7], error.count("\n"), error[-1]) == (2, "error: ", 1, "\n")
        return error[7:-1]

    return run


def test_missing_files(refused, tmp_path):
    assert refused("--config", "none.yaml") == "cannot read config none.yaml: No such file or directory"
    assert refused("--train_dataset_dir", "none.jsonl") == (
        "train_dataset_dir: none.jsonl: no such file or folder; check the path"
    )
    assert refused("--train_dataset_dir", "x" * 300) == (
        f"train_dataset_dir: {'x' * 80}: File name too long; check the path"
    )
    assert refused("--load_checkpoint", "none") == (
        "load_checkpoint: none does not exist; give a Hugging Face directory or a .ckpt file"
    )
    assert refused("--load_adapter", "none") == (
        "load_adapter: none does not exist; give the folder that holds adapter_config.json"
    )
    (tmp_path / "adapter.txt").touch()
    assert refused("--load_adapter", "adapter.txt") == (
        "load_adapter: adapter.txt is not a folder; give the folder that holds adapter_config.json"
    )


@pytest.mark.parametrize(("key", "value"), [("path", "none.jsonl"), ("data_files", "[none.jsonl]")])
def test_missing_rows_are_named_by_the_key_that_was_given(refused, key, value):
    key = f"train_dataset.data_loader.{key}"
    assert refused("--train_dataset_dir", "", "--options", f"{key}={value}") == (
        f"{key}: none.jsonl: no such file or folder; check the path"
    )


def test_rows_behind_a_folder_that_may_not_be_entered(refused, monkeypatch):
    real = os.stat

    def stat(path, *more, **keys):
        if str(path) == "closed/rows.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *more, **keys)

    monkeypatch.setattr(os, "stat", stat)
    assert refused("--train_dataset_dir", "closed/rows.jsonl") == (
        "train_dataset_dir: closed/rows.jsonl: Permission denied; check the path"
    )


def test_a_checkpoint_that_is_no_folder(refused, model, tmp_path):
    (tmp_path / "notes.md").write_text("")
    assert refused("--load_checkpoint", "notes.md") == (
        "load_checkpoint: notes.md is neither a folder nor a .ckpt or .safetensors file"
    )
    for name, content in (("pytorch_model.bin", b""), ("lightning.ckpt", b"PK\x03\x04x"), ("old.ckpt", b"\x80\x02x")):
        (tmp_path / name).write_bytes(content)
        assert refused("--load_checkpoint", name) == (
            f"{name}: a file of PyTorch's, which can hold code, and is not read: save the model as safetensors "
            "(transformers: model.save_pretrained(DIR))"
        )
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert refused("--load_checkpoint", "m.gguf") == (
        "load_checkpoint: m.gguf is a GGUF: lora-ms convert m.gguf --output_dir DIR, and give DIR"
    )
    file = next(model.glob("*.safetensors"))
    assert refused("--load_checkpoint", file) == (
        f"load_checkpoint: {file} is a file of a Hugging Face folder; give the folder, {model}"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["adapters", "combine", "--adapters", "A", "A", "--weights", "1", "1", "--output_dir", "file"],
        ["convert-adapter", "--input", "A", "--output", "file/x.safetensors"],
        ["eval", "--load_checkpoint", "M", "--prompts_file", "rows.jsonl", "--output_dir", "file"],
    ],
    ids=lambda words: words[0],
)
def test_other_commands_whose_output_cannot_be_written(words, model, reference, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "rows.jsonl").write_text(json.dumps(TEXT))
    places = {"A": str(reference / "combined" / "qwen2" / "a"), "M": str(model)}
    before = tree(tmp_path)
    assert main([places.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert (error[:7], error.count("\n")) == ("error: ", 1) and "file" in error and "cannot" in error
    assert tree(tmp_path) == before


def test_a_folder_without_weights(refused, model, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(model / "config.json", tmp_path / "model")
    assert refused("--load_checkpoint", "model") == (
        "model: holds no model.safetensors and no model.safetensors.index.json"
    )


def test_yaml_that_does_not_parse(refused, tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: 0\nmodel: {model_config: [\n")
    assert refused("--config", "bad.yaml") == (
        "bad.yaml is not valid YAML: expected the node content, but found '<stream end>' (line 3, column 1)"
    )


def test_unknown_key(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("pet_config: {lora_rnak: 4}\n")
    assert refused("--config", "run.yaml") == (
        "run.yaml with the command line: unknown key model.model_config.pet_config.lora_rnak; "
        "did you mean model.model_config.pet_config.lora_rank?"
    )


def test_wrong_type(refused):
    assert refused("--runner_config.epochs", "two") == (
        "configuration: runner_config.epochs expects a whole number, got 'two'"
    )


def test_rank_of_zero(refused):
    assert refused("--pet_config.lora_rank", "0") == (
        "configuration: model.model_config.pet_config.lora_rank expects 1 or more, got 0"
    )


def test_target_modules_without_a_match(refused):
    assert refused("--pet_config.target_modules", "query|value") == (
        "target_modules 'query|value' matches no layer; "
        "could match: down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, "
        "or all-linear"
    )


@pytest.mark.parametrize(("name", "text"), [("empty.jsonl", ""), ("empty.json", "[]")])
def test_empty_dataset(refused, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert refused("--train_dataset_dir", name) == f"{name}: there are no rows; give at least one"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("target_modules", "[v_porj]", "target_modules v_porj: the model has no such module; the nearest: v_proj"),
        ("target_modules", "none", "target_modules 'none' matches no layer; could match: "),
        ("modules_to_save", "[lm_hed]", "modules_to_save lm_hed: the model has no such module; the nearest: lm_head"),
        ("layers_to_transform", "[7]", "layers_to_transform: layers 7 are not there: the model has 0-"),
    ],
)
def test_modules_that_are_not_there_are_found_before_rows_are_read(refused, tmp_path, key, value, line):
    (tmp_path / "rows.jsonl").write_text("no row")
    said = refused("--train_dataset_dir", "rows.jsonl", "--options", f"pet_config.{key}={value}")
    assert said.startswith(line)


def test_row_without_an_answer(refused, tmp_path):
    lines = [TEXT, {**TEXT, "output": " "}, TEXT, {"instruction": "And you?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert refused("--train_dataset_dir", "rows.jsonl") == (
        'rows.jsonl:2: no answer: "output" is empty; rows.jsonl:4: no answer: "output" is missing; '
        "write the answer or remove the row"
    )


def test_text_rows_without_a_tokenizer(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TEXT))
    assert refused("--train_dataset_dir", "rows.jsonl") == (
        "rows.jsonl:1: a text row needs a tokenizer; give one, or rows of input_ids and labels"
    )


def test_tokens_of_another_model(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 128], "prompt_len": 1}\n')
    assert refused("--train_dataset_dir", "rows.jsonl") == (
        "rows.jsonl:1: token id 128 does not exist in a vocabulary of 128; "
        "is the tokenizer, or the tokenised data, another model's?"
    )


def test_rows_all_cut_away(refused, token_rows):
    lengths = [len(row["input_ids"]) for row in token_rows]
    shortest = min(lengths)
    assert refused("--seq_length", "4") == (
        "all 8 rows are longer than seq_length 4 "
        f"(shortest: {shortest} tokens, rows.jsonl:{lengths.index(shortest) + 1}); raise seq_length"
    )


def test_text_rows_all_cut_away(refused, tmp_path, text_model):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TEXT))
    assert refused("--load_checkpoint", text_model, "--train_dataset_dir", "rows.jsonl") == (
        "the only row is longer than seq_length 16 (shortest: 38 tokens, rows.jsonl:1); raise seq_length"
    )


def test_missing_and_misshaped_tensors(refused, tmp_path, model, raw_tensors):
    tensors = raw_tensors(model)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:63]
    (tmp_path / "model").mkdir()
    shutil.copy(model / "config.json", tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert refused("--load_checkpoint", "model") == (
        "model: 2 tensors do not fit the model: missing model.layers.1.mlp.up_proj.weight (96, 64); "
        "model.norm.weight is (63,), should be (64,)"
    )


def test_truncated_weights(refused, tmp_path, model):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refused("--load_checkpoint", "model").startswith(f"{Path('model') / file.name}: truncated: ")


def test_unsupported_architecture(refused, tmp_path, model):
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert refused("--load_checkpoint", "model") == (
        "model: architecture GPT2LMHeadModel is not supported; "
        "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM"
    )


def test_yaml_of_another_model(refused):
    assert refused("--model.model_config.num_layers", "4", "--model.model_config.n_kv_heads", "4").endswith(
        "qwen2: the YAML's model_config describes another model: "
        "num_layers: 4 in the YAML, 2 in config.json; n_kv_heads: 4 in the YAML, 2 in config.json; leave out what "
        "config.json says"
    )


def test_adapter_of_another_model(refused, reference):
    adapter = reference / "adapters" / "qwen3"
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_B.weight"
    found = "; ".join(
        f"{name.format(layer, projection)} is {there}, should be {here}"
        for layer, projection, there, here in (
            (0, "q_proj", (96, 4), (64, 4)),
            (0, "v_proj", (48, 4), (32, 4)),
            (1, "q_proj", (96, 4), (64, 4)),
        )
    )
    assert refused("--load_adapter", adapter) == f"{adapter}: made for another model: {found} and 1 more"


def test_adapter_that_pet_config_contradicts(refused, reference):
    adapter = reference / "adapters" / "qwen2"
    given = ("lora_rank", 16, "lora_alpha", 16, "target_modules", "'.*wq|.*wk|.*wv|.*wo'")
    flags = [f"--pet_config.{word}" if isinstance(word, str) and "_" in word else word for word in given]
    assert refused("--load_adapter", adapter, *flags) == (
        f"load_adapter {adapter}: lora_rank: 16 in pet_config, 4 in the adapter; "
        "lora_alpha: 16 in pet_config, 8 in the adapter; "
        "target_modules: 8 modules by pet_config, 6 in the adapter"
    )


def test_output_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file"
    assert refused("--output_dir", "file") == f"output_dir file cannot be written: {place} is not a folder"
    assert refused("--output_dir", "file/a/b") == f"output_dir file/a/b cannot be written: {place} is not a folder"


def test_a_good_run_before_a_bad_one_is_left_alone(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.log").write_text("a good run\n")
    assert refused("--pet_config.target_modules", "none").startswith("target_modules 'none' matches no layer")
