"""Weights of four bits from end to end: quantised folders, training on them, and merging what was trained."""

import dataclasses
import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_ms
from lora_ms import saving
from lora_ms.cli.main import main
from lora_ms.models.hub import load_directory, new_model, quantised_layers, read_config, save_directory
from lora_ms.quant.settings import Quantisation, read_quantisation

RUN = (
    "--runner_config.batch_size 2 --max_steps 4 --learning_rate 0.005 --seq_length 16 "
    "--pet_config.target_modules q_proj|v_proj|down_proj --pet_config.lora_dropout 0.1"
)
SAVES = ("--options", "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 2}]")


def finetune(model: Path, rows: Path, output: Path, *words: str) -> dict[str, np.ndarray]:
    given = ["--load_checkpoint", str(model), "--train_dataset_dir", str(rows), "--output_dir", str(output)]
    assert main(["finetune", *given, *RUN.split(), *words]) == 0
    return load_file(output / "adapter" / "adapter_model.safetensors")


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    """The model as ``lora-ms quantize`` writes it, by kind."""
    path = tmp_path_factory.mktemp("quantised")
    for name, flags in (("nf4", []), ("nf4-double", ["--double"])):
        assert main(["quantize", "--load_checkpoint", str(model), "--output_dir", str(path / name), *flags]) == 0
    return {"nf4": path / "nf4", "nf4-double": path / "nf4-double"}


@pytest.fixture(scope="module")
def run(model, rows_file, tmp_path_factory) -> Path:
    """A run with the weights quantised as they are loaded."""
    path = tmp_path_factory.mktemp("run")
    finetune(model, rows_file, path, "--quantize", "nf4-double")
    return path


def test_a_quantised_folder_has_transformers_settings(folders, model, raw_tensors):
    for name, folder in folders.items():
        config = json.loads((folder / "config.json").read_text())
        settings = config.pop("quantization_config")
        assert config == json.loads((model / "config.json").read_text())
        assert settings["quant_method"] == "bitsandbytes" and settings["load_in_4bit"] is True
        assert settings["bnb_4bit_quant_type"] == "nf4"
        assert settings["bnb_4bit_use_double_quant"] is (name == "nf4-double")


def test_trained_on_a_folder_as_on_weights_quantised_at_load(folders, run, rows_file, tmp_path):
    found = finetune(folders["nf4-double"], rows_file, tmp_path)
    wanted = load_file(run / "adapter" / "adapter_model.safetensors")
    assert losses(tmp_path) == losses(run)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    settings = [json.loads((path / "adapter" / "base_quantization.json").read_text()) for path in (tmp_path, run)]
    assert settings[0] == settings[1] and settings[0]["bnb_4bit_use_double_quant"] is True


@pytest.mark.parametrize("words", [("--recompute_config.recompute", "True"), ("--train_dataset.packing", "False")])
def test_resumed_to_the_bit(model, rows_file, tmp_path, capsys, words):
    common = ["--quantize", "nf4", *SAVES, *words]
    wanted = finetune(model, rows_file, tmp_path / "whole", *common)
    finetune(model, rows_file, tmp_path / "parts", *common)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_4")
    found = finetune(model, rows_file, tmp_path / "parts", *common, "--resume_training", "True")
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    given = ["--load_checkpoint", str(model), "--train_dataset_dir", str(rows_file), "--resume_training", "True"]
    other = [word.replace("nf4", "nf4-double") for word in common]
    assert main(["finetune", *given, "--output_dir", str(tmp_path / "parts"), *RUN.split(), *other]) == 2
    assert "quantization: nf4 there, nf4-double here" in capsys.readouterr().err


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merged_onto_either(model, run, tmp_path, capsys, onto, raw_tensors):
    words = ["--load_adapter", str(run / "adapter"), "--output_dir", str(tmp_path / "m"), "--onto", onto]
    assert main(["merge", *words, "--dtype", "float32"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("its logits differ"))
    most = float(line.split(" and ")[1].split()[0])
    assert most < 1e-4 if onto == "dequantized" else most > 0.1
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    merged, whole = raw_tensors(tmp_path / "m"), raw_tensors(model)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    if onto == "dequantized":
        quantised = load_directory(model, quantisation=Quantisation(double=True))
        whole |= {f"{name}.weight": cell.numbers() for name, cell in quantised_layers(quantised).items()}
    np.testing.assert_array_equal(merged[untouched], whole[untouched])
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    path = "model.layers.1.mlp.down_proj"
    a, b = (factors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
    np.testing.assert_allclose(merged[f"{path}.weight"], whole[f"{path}.weight"] + b @ a, rtol=0, atol=1e-6)


def test_merged_from_a_quantised_folder(folders, run, tmp_path, capsys):
    words = ["--load_adapter", str(run / "adapter"), "--load_checkpoint", str(folders["nf4-double"])]
    assert main(["merge", *words, "--output_dir", str(tmp_path / "m"), "--onto", "dequantized"]) == 0
    assert "its logits differ" in capsys.readouterr().out
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            [],
            "the adapter was trained on weights of four bits (nf4-double), and merged into others it is anoth",
        ),
        (["--onto", "x"], "onto 'x': give original or dequantized"),
        (["--onto", "original", "--load_checkpoint", "nf4-double"], "{}/nf4-double is quantised: to merge --onto orig"),
        (
            ["--onto", "dequantized", "--load_checkpoint", "nf4"],
            "the adapter was trained on nf4-double, and {}/nf4 is nf4: give its own model",
        ),
    ],
)
def test_merging_refused(folders, run, tmp_path, capsys, words, line):
    words = [str(folders[word]) if word in folders else word for word in words]
    given = ["--load_adapter", str(run / "adapter"), "--output_dir", str(tmp_path / "m")]
    assert main(["merge", *given, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: " + line.format(folders["nf4"].parent)) and said.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_nothing_to_dequantise(model, reference, tmp_path, capsys):
    words = ["--load_adapter", str(reference / "adapters" / "qwen2"), "--load_checkpoint", str(model)]
    assert main(["merge", *words, "--output_dir", str(tmp_path / "m"), "--onto", "dequantized"]) == 2
    assert "--onto dequantized: neither" in capsys.readouterr().err


def test_checked_and_used(model, run, folders, capsys):
    adapter = ["--load_adapter", str(run / "adapter")]
    for base in (model, folders["nf4-double"]):
        assert main(["check-adapter", *adapter, "--load_checkpoint", str(base)]) == 0
        assert "every tensor has its place" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--quantize", "fp4"], "quantization_config: 'fp4' is none of nf4, nf4-double, and no mapping of"),
        (["--options", "X={load_in_4bit: True}"], "bnb_4bit_quant_type 'fp4' (transformers' default) is not supported"),
        (["--options", "X={load_in_8bit: True}"], "load_in_8bit is not supported: load_in_4bit with bnb_4bit_quant_"),
        (["--options", "X={bnb_4bit_quant_type: nf4}"], "load_in_4bit is missing: set it to True"),
        (["--options", "X={load_in_4bit: True, bnb_4bit_qant_type: nf4}"], "unknown key 'bnb_4bit_qant_type'; the nea"),
        (["--options", "X={quant_method: gptq, bits: 4}"], "unknown key 'bits'; the nearest is"),
        (["--quantize", "nf4", "--options", "pet_config=null"], "weights of four bits do not train: give pet_config"),
        (["--options", "pet_config=null", "--load_checkpoint", "nf4"], "weights of four bits do not train: give pet"),
        (["--quantize", "nf4", "--load_checkpoint", "nf4"], "is quantised already: leave quantization_config out, or "),
    ],
)
def test_settings_refused(model, rows_file, folders, tmp_path, capsys, words, line):
    words = [word.replace("X=", "model.model_config.quantization_config=") for word in words]
    words = [
        str(folders[word]) if word in folders and words[i - 1] != "--quantize" else word for i, word in enumerate(words)
    ]
    given = [
        "--load_checkpoint",
        str(model),
        "--train_dataset_dir",
        str(rows_file),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["finetune", *given, *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1, said


def test_quantising_twice_is_refused(folders, tmp_path, capsys):
    for kind, words, line in (
        ("nf4", [], "is quantised already"),
        ("nf4", ["--type", "fp4"], "type 'fp4' is not supp"),
    ):
        given = ["--load_checkpoint", str(folders[kind]), "--output_dir", str(tmp_path / "q")]
        assert main(["quantize", *given, *words]) == 2
        assert line in capsys.readouterr().err and not (tmp_path / "q").exists()


@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_models_that_are_not_run_here_are_refused_before_they_are_read(folders, run, tmp_path, capsys, command):
    """Mixtures of experts: their experts' weights would stay whole, and their logits are not computed."""
    base = tmp_path / "experts"
    base.mkdir()
    config = json.loads((folders["nf4-double"] / "config.json").read_text()) | {
        "architectures": ["Qwen3MoeForCausalLM"]
    }
    if command == "quantize":
        del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    shutil.copy(folders["nf4-double"] / "model.safetensors", base)
    words = [command, "--load_checkpoint", str(base), "--output_dir", str(tmp_path / "o")]
    if command == "merge":
        words += ["--load_adapter", str(run / "adapter"), "--onto", "dequantized"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{base}: architecture Qwen3MoeForCausalLM is not supported; supported: " in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_in_python(model, folders, tmp_path):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["model.layers.1"]}
    found = lora_ms.AutoModelForCausalLM.from_pretrained(model, quantization_config=settings)
    assert {name.split(".")[2] for name in quantised_layers(found)} == {"0"}
    ids = [[5, 6, 7, 8]]
    tokens = found.generate(ids, max_new_tokens=4)
    found.save_pretrained(tmp_path / "saved")
    again = lora_ms.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.generate(ids, max_new_tokens=4), tokens)
    skipped = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ]
    assert sorted(skipped)[0] == "lm_head" and all(name.startswith("model.layers.1.") for name in sorted(skipped)[1:])
    with pytest.raises(lora_ms.LoraMsError, match="weights of four bits do not train: give Trainer a PeftModel"):
        lora_ms.Trainer(found, lora_ms.TrainingArguments(output_dir=str(tmp_path)), [])
    peft = lora_ms.get_peft_model(found, lora_ms.LoraConfig(lora_rank=2, target_modules="all-linear"))
    merged = peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(lora_ms.LoraMsError, match="quantization_config: 'int8' is none of nf4, nf4-double"):
        lora_ms.AutoModelForCausalLM.from_pretrained(model, quantization_config="int8")


@pytest.fixture(scope="module")
def deep(reference, tmp_path_factory) -> Path:
    """32 small layers of random weights."""
    sizes = dataclasses.replace(read_config(reference / "models" / "llama2")[0], num_hidden_layers=32)
    sizes = dataclasses.replace(sizes, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    path = tmp_path_factory.mktemp("deep") / "model"
    save_directory(new_model(dataclasses.replace(sizes, intermediate_size=64), ms.float32, seed=1), path)
    return path


def test_layered(deep, root, rows_file, tmp_path, capsys):
    """Ranks and types are where the YAML of the 7B model says, in graphs that layers share, and the loss goes down."""
    sizes = ("hidden_size", "num_heads", "n_kv_heads", "intermediate_size", "vocab_size")
    given = {
        "--config": root / "configs" / "llama2" / "qlora_llama2_7b_layered.yaml",
        "--load_checkpoint": deep,
        "--train_dataset_dir": rows_file,
        "--output_dir": tmp_path,
        "--epochs": 6,
        "--batch_size": 8,
        "--gradient_accumulation_steps": 1,
        "--learning_rate": 0.01,
        "--seq_length": 16,
        "--model.model_config.compute_dtype": "float32",
        **{f"--model.model_config.{size}": "null" for size in sizes},
    }
    assert main(["finetune", *(str(word) for pair in given.items() for word in pair)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("in four bits"))
    assert "215,040 numbers of layers 11-31, " in line and "whole: " in line
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.05, found
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {int(name.split(".")[4]): len(value) for name, value in tensors.items() if "lora_A" in name}
    assert ranks == {layer: 64 if layer < 11 else 16 for layer in range(32)}
    record = json.loads((tmp_path / "adapter" / "base_quantization.json").read_text())
    settings = read_quantisation(record)
    assert settings.double
    types = {layer: settings.quantises(f"model.layers.{layer}.mlp.up_proj") for layer in range(32)}
    assert types == {layer: layer >= 11 for layer in range(32)}
    model = load_directory(deep, quantisation=settings)
    assert {int(name.split(".")[2]) for name in quantised_layers(model)} == set(range(11, 32))


def test_the_room_for_a_saved_model_is_what_is_written(model, tmp_path, monkeypatch):
    asked, new_folder = [], saving.new_folder

    def noted(folder, size, replaced):
        asked.append(size)
        return new_folder(folder, size, replaced)

    monkeypatch.setattr(saving, "new_folder", noted)
    for quantisation in (None, Quantisation(double=True)):
        save_directory(load_directory(model, quantisation=quantisation), tmp_path / "m")
        written = sum(entry.nbytes for entry in load_file(tmp_path / "m" / "model.safetensors").values())
        assert asked.pop() == written
