"""Models whose folder is GPTQ's or AWQ's: they compute, train and merge as a model of the same numbers in float32."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

import lora_ms
from lora_ms import storage
from lora_ms.adapters.inject import adapter_cells, inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.cli.main import main
from lora_ms.hf_folder import open_model
from lora_ms.models.hub import load_directory, quantised_layers
from lora_ms.quant.folder import LINEAR

pytestmark = pytest.mark.usefixtures("graph_mode")
GROUP = 32
IDS = Tensor(np.random.default_rng(0).integers(4, 128, (2, 6)).astype(np.int32))
KINDS = {
    "gptq": {"quant_method": "gptq", "desc_act": False},
    "gptq_act_order": {"quant_method": "gptq", "desc_act": True, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
}


def parts_of(kind: str, outputs: int, inputs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random codes and zeros of a weight, with scales that make it as large as weights are."""
    groups = inputs // GROUP
    shapes = {"qweight": (inputs, outputs // 8) if kind == "awq" else (inputs // 8, outputs)}
    shapes["qzeros"] = (groups, outputs // 8)
    found = {name: rng.integers(-(2**31), 2**31, shape).astype(np.int32) for name, shape in shapes.items()}
    found["scales"] = rng.uniform(0.01, 0.03, (groups, outputs)).astype(np.float16)
    if kind != "awq":
        index = np.repeat(np.arange(groups), GROUP).astype(np.int32)
        found["g_idx"] = rng.permutation(index) if kind == "gptq_act_order" else index
    return found


@pytest.fixture(scope="module")
def made(reference, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """``made(kind)``: the folders of ``write_folders``, once for each kind."""
    return cache(lambda kind: write_folders(kind, reference / "models" / "qwen2", tmp_path_factory.mktemp(kind)))


def write_folders(kind: str, source: Path, parent: Path) -> tuple[Path, Path]:
    """The model in ``source`` with random weights in its layers: in four bits, and the same numbers in float32."""
    quantised, whole = parent / "quantised", parent / "whole"
    rng = np.random.default_rng(3)
    tensors = {}
    for name, entry in storage.open_dir(source).items():
        if LINEAR.fullmatch(name):
            parts = parts_of(kind, *entry.shape, rng)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        else:
            tensors[name] = storage.read(entry, np.float32)
    config = json.loads((source / "config.json").read_text())
    for folder in (quantised, whole):
        folder.mkdir()
    save_file(tensors, quantised / "model.safetensors")
    settings = {"bits": 4, "group_size": GROUP, **KINDS[kind]}
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    stored = open_model(quantised, {"quantization_config": settings, "tie_word_embeddings": True}).quantised
    decoded = {name: weight.numbers() for name, weight in stored.items()}
    plain = {name: value for name, value in tensors.items() if value.dtype == np.float32}
    save_file({**plain, **decoded}, whole / "model.safetensors")
    (whole / "config.json").write_text(json.dumps(config))
    return quantised, whole


@pytest.fixture
def eager(graph_mode):
    """A model that runs once is not worth a graph."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.mark.parametrize(("kind", "use_dora"), [("gptq", False), ("gptq_act_order", True), ("awq", False)])
def test_as_the_same_numbers(made, operators, eager, kind, use_dora):
    found = []
    for folder in made(kind):
        model = load_directory(folder, operators=operators).set_train(False)
        ms.set_seed(0)
        inject(model, LoraConfig(2, 3.0, target_modules=("q_proj", "down_proj"), use_dora=use_dora))
        rng = np.random.default_rng(1)
        for cell in adapter_cells(model).values():
            for parameter in cell.tensors().values():
                noise = rng.standard_normal(parameter.shape, np.float32) * np.float32(0.1)
                parameter.set_data(Tensor(parameter.asnumpy() + noise))
        found.append(model(IDS).asnumpy())
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)


def test_trained_and_merged(made, golden, tmp_path, capsys):
    folders = made("gptq_act_order")
    values = golden("trace_qwen2")
    rows = zip(*(values[key].reshape(-1, 16)[:8].tolist() for key in ("input_ids", "labels")), strict=True)
    lengths = values["lengths"].ravel()
    lines = [{"input_ids": ids[:n], "labels": labels[:n]} for (ids, labels), n in zip(rows, lengths, strict=False)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--train_dataset_dir", str(data), "--max_steps", "3", "--learning_rate", "0.01", "--batch_size", "4"]
    given += ["--seq_length", "16", "--pet_config.lora_dropout", "0.1", "--pet_config.target_modules", "all-linear"]
    losses = []
    for name, folder in zip(("four", "whole"), folders, strict=True):
        output = tmp_path / name
        assert main(["finetune", *given, "--load_checkpoint", str(folder), "--output_dir", str(output)]) == 0
        records = (output / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["loss"] for record in records])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert not (tmp_path / "four" / "adapter" / "base_quantization.json").exists()
    merge = ["merge", "--load_adapter", str(tmp_path / "four" / "adapter"), "--output_dir", str(tmp_path / "m")]
    assert main(merge) == 2
    assert "trained on weights of four bits" in capsys.readouterr().err
    assert main([*merge, "--onto", "dequantized", "--dtype", "float32"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("its logits differ"))
    assert float(line.split(" and ")[1].split()[0]) < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_merged_into_the_whole_model(made, reference, tmp_path, capsys):
    """Which is another than the adapter was trained on: that is asked, and said."""
    own, whole = made("gptq")
    adapter = tmp_path / "adapter"
    shutil.copytree(reference / "adapters" / "qwen2", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(own)}))
    merge = ["merge", "--load_adapter", str(adapter), "--load_checkpoint", str(whole), "--output_dir"]
    merge.append(str(tmp_path / "m"))
    assert main(merge) == 2
    assert "the adapter was trained on weights of four bits (GPTQ), and merged" in capsys.readouterr().err
    assert main([*merge, "--onto", "dequantized"]) == 2
    assert f"{whole} is whole, and the adapter was trained on GPTQ: give that" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    # as if they were others than those of the training
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    tensors = load_file(whole / "model.safetensors")
    save_file({name: value * np.float32(1.2) for name, value in tensors.items()}, moved / "model.safetensors")
    merge[merge.index(str(whole))] = str(moved)
    assert main([*merge, "--onto", "original"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("its logits differ"))
    assert float(line.split(" and ")[1].split()[0]) > 0.01


def test_every_layer_is_quantised(made):
    folders = made("awq")
    assert len(quantised_layers(load_directory(folders[0]))) == 14
    assert not quantised_layers(load_directory(folders[1]))


def test_not_saved_as_it_is(made, tmp_path):
    model = lora_ms.AutoModelForCausalLM.from_pretrained(made("gptq")[0])
    tokens = model.generate([[5, 6, 7]], max_new_tokens=3)
    assert tokens.shape == (1, 6)
    with pytest.raises(lora_ms.LoraMsError, match="is in four bits that are read only"):
        model.save_pretrained(tmp_path / "x")


def test_biases_of_zeros_that_the_architecture_has(made, operators, tmp_path):
    """They are read; those that AutoGPTQ puts beside all other layers are not."""
    source = made("gptq")[0]
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        tensors[name.replace("qweight", "bias")] = np.zeros(tensors[name].shape[1], np.float16)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_directory(tmp_path, operators=operators)
    biases = {name: p.asnumpy() for name, p in model.parameters_and_names() if name.endswith(".bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj"}
    assert not any(value.any() for value in biases.values())
