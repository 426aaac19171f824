"""Weights and adapters under MindFormers' names: round trips keep every bit, layouts are MindFormers' own."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from numpy.testing import assert_array_equal

from lora_ms import storage
from lora_ms.adapters.peft_files import CONFIG, PREFIX, WEIGHTS
from lora_ms.bridge.files import in_memory, read_file
from lora_ms.bridge.layout import Heads, inverse
from lora_ms.cli.main import main
from lora_ms.commands import convert, convert_adapter
from lora_ms.errors import LoraMsError
from lora_ms.models.mindformers_names import hugging_face_name, mindformers_name

LAYERS = 2
RANK = 4


def words(path) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor.words) for name, tensor in read_file(path).items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert_array_equal(found[name], value, name)


@pytest.fixture(scope="module")
def model(reference):
    return reference / "models" / "qwen2"


@pytest.fixture(scope="module")
def sizes(model):
    hf = json.loads((model / "config.json").read_text())
    head = hf["hidden_size"] // hf["num_attention_heads"]
    return {
        "q": hf["hidden_size"],
        "kv": hf["num_key_value_heads"] * head,
        "hidden": hf["hidden_size"],
        "mlp": hf["intermediate_size"],
    }


@pytest.fixture(scope="module")
def shared_a(model, sizes, tmp_path_factory):
    """An adapter whose q, k and v share an A, as do gate and up: what joint matrices can hold."""
    folder, rng = tmp_path_factory.mktemp("shared"), np.random.default_rng(0)
    out = {"q": sizes["q"], "k": sizes["kv"], "v": sizes["kv"], "gate": sizes["mlp"], "up": sizes["mlp"]}
    tensors = {}
    for layer in range(LAYERS):
        for place, leaves in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            a = rng.standard_normal((RANK, sizes["hidden"])).astype(np.float32)
            for leaf in leaves:
                name = f"{PREFIX}model.layers.{layer}.{place}.{leaf}_proj"
                tensors[f"{name}.lora_A.weight"] = a
                tensors[f"{name}.lora_B.weight"] = rng.standard_normal((out[leaf], RANK)).astype(np.float32)
    storage.write_tensors(folder / WEIGHTS, tensors)
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "target_modules": targets}
    storage.write_json(folder / CONFIG, {**config, "base_model_name_or_path": str(model)})
    return folder


@pytest.mark.parametrize("naming", ["mindpet", "mcore", "v2"])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_an_adapter_there_and_back(reference, model, tmp_path, naming, suffix):
    source, file = reference / "adapters" / "qwen2_all_linear", tmp_path / f"lora{suffix}"
    convert_adapter.run(str(source), str(file), naming=naming)
    convert_adapter.run(str(file), str(tmp_path / "back"), lora_alpha=6, load_checkpoint=str(model))
    assert_same(words(tmp_path / "back"), words(source))
    config = json.loads((tmp_path / "back" / CONFIG).read_text())
    expected = json.loads((source / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (expected["r"], 6)
    assert config["target_modules"] == sorted({name.rpartition(".")[2] for name in expected["target_modules"]})


@pytest.mark.parametrize(
    ("naming", "name"),
    [
        ("mindpet", "model.layers.1.attention.wq.mindpet_delta_lora_a"),
        ("mcore", "decoder.layers.1.self_attention.linear_q.lora_A.weight"),
        ("v2", "decoder.layers.1.self_attention.linear_q.lora_a"),
    ],
)
def test_names_that_are_written(reference, tmp_path, naming, name):
    source = reference / "adapters" / "qwen2"
    convert_adapter.run(str(source), str(tmp_path / "lora.safetensors"), naming=naming)
    found = words(tmp_path / "lora.safetensors")
    assert_array_equal(found[name], words(source)[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"])


@pytest.mark.parametrize("naming", ["mindpet", "mcore", "v2"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_joint_matrices_there_and_back(shared_a, model, tmp_path, naming, contiguous):
    file, base = tmp_path / "lora.safetensors", str(model)
    convert_adapter.run(str(shared_a), str(file), naming=naming, concat=True, contiguous=contiguous)
    assert len(words(file)) == LAYERS * 2 * 2  # A and B of two joint matrices
    convert_adapter.run(str(file), str(tmp_path / "p"), contiguous=contiguous, lora_alpha=12, load_checkpoint=base)
    assert_same(words(tmp_path / "p"), words(shared_a))


def test_an_adapter_inside_a_whole_checkpoint(reference, model, tmp_path):
    """Base weights and optimiser states beside the factors are left out."""
    source = reference / "adapters" / "qwen2"
    convert_adapter.run(str(source), str(tmp_path / "lora.ckpt"))
    convert.run(str(model), str(tmp_path / "base.ckpt"))
    loaded = {**ms.load_checkpoint(str(tmp_path / "base.ckpt")), **ms.load_checkpoint(str(tmp_path / "lora.ckpt"))}
    values = [{"name": name, "data": Tensor(value.asnumpy())} for name, value in loaded.items()]
    values += [{"name": f"adam_m.{v['name']}", "data": v["data"]} for v in values if "lora" in v["name"]]
    ms.save_checkpoint([*values, {"name": "global_step", "data": Tensor(7)}], str(tmp_path / "all.ckpt"))
    convert_adapter.run(str(tmp_path / "all.ckpt"), str(tmp_path / "back"), lora_alpha=8)
    assert_same(words(tmp_path / "back"), words(source))


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2", "qwen3", "deepseek_r1_qwen"])
@pytest.mark.parametrize("style", ["legacy", "mcore"])
def test_weights_there_and_back(reference, tmp_path, family, style):
    source, back = reference / "models" / family, tmp_path / "hf"
    for concat, target in ((False, "m.ckpt"), (True, "sharded")):
        convert.run(str(source), str(tmp_path / target), naming=style, concat=concat, max_shard_size="40KB")
        convert.run(str(tmp_path / target), str(back), load_checkpoint=str(source), overwrite=True)
        assert_same(words(back), words(source))
        for file in source.glob("*.json"):
            if "index" not in file.name:
                assert json.loads((back / file.name).read_text()) == json.loads(file.read_text())


def test_a_folder_of_files_has_an_index(model, tmp_path):
    convert.run(str(model), str(tmp_path / "mf"), max_shard_size="40KB")
    index = json.loads((tmp_path / "mf" / "param_name_map.json").read_text())
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert name in words(tmp_path / "mf" / file)


def test_types(model, tmp_path):
    """bfloat16 in a .ckpt, too."""
    for suffix in (".ckpt", ".safetensors"):
        convert.run(str(model), str(tmp_path / f"m{suffix}"), dtype="bfloat16")
        convert.run(str(tmp_path / f"m{suffix}"), str(tmp_path / suffix[1:]), load_checkpoint=str(model))
        for name, tensor in read_file(tmp_path / suffix[1:]).items():
            original = storage.read(storage.open_dir(model)[name], np.float32)
            assert tensor.dtype == "BF16"
            assert_array_equal(tensor.words, storage.encoded(original, "BF16"), name)
        assert json.loads((tmp_path / suffix[1:] / "config.json").read_text())["dtype"] == "bfloat16"


def test_orders_are_the_documented_ones():
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=1)
    # q0 q1 share k0 v0, q2 q3 share k1 v1
    assert heads.order("x.qkv_proj", 8).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert heads.order("x.gate_up_proj", 6).tolist() == [0, 3, 1, 4, 2, 5]
    assert heads.order("x.qkv_proj", 8)[inverse(heads.order("x.qkv_proj", 8))].tolist() == list(range(8))
    with pytest.raises(LoraMsError, match="has 9 rows; 4 heads and 2 key heads of 1 make 8"):
        heads.order("x.qkv_proj", 9)


def test_names_both_ways(reference):
    for family in ("qwen2", "qwen3"):
        for name in storage.open_dir(reference / "models" / family):
            for style in ("legacy", "mcore"):
                assert hugging_face_name(mindformers_name(name, style)) == name
    assert hugging_face_name("adam_m.model.layers.0.attention.wq.weight") == "adam_m.model.layers.0.attention.wq.weight"
    assert mindformers_name("model.vision.weight") is None


def refusal(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and "\n" not in printed
    return printed


def test_refusals_of_adapters(reference, shared_a, model, tmp_path, capsys):
    command, adapter = "convert-adapter", reference / "adapters" / "qwen2_all_linear"
    file, target = tmp_path / "x.safetensors", tmp_path / "new"
    line = refusal(
        capsys, command, "--input", adapter, "--output", file, "--concat", "True", "--load_checkpoint", model
    )
    assert "have an A each" in line and "--concat False" in line
    assert "must end in .ckpt or .safetensors" in refusal(capsys, command, "--input", adapter, "--output", target)
    assert "does not exist" in refusal(capsys, command, "--input", tmp_path / "no", "--output", file)
    convert_adapter.run(str(shared_a), str(file), concat=True)
    line = refusal(capsys, command, "--input", file, "--output", target, "--lora_alpha", 4)
    assert "several matrices in one: give --load_checkpoint" in line
    assert "give --lora_alpha" in refusal(capsys, command, "--input", file, "--output", target)
    other = reference / "models" / "llama2"
    flags = ("--lora_alpha", 4, "--load_checkpoint", other)
    assert "give the right model" in refusal(capsys, command, "--input", file, "--output", target, *flags)
    assert not target.exists()
    dora = reference / "variants" / "qwen2_dora"
    assert "DoRA" in refusal(capsys, command, "--input", dora, "--output", tmp_path / "y.ckpt")
    convert.run(str(model), str(tmp_path / "base.safetensors"))
    line = refusal(capsys, command, "--input", tmp_path / "base.safetensors", "--output", target, "--lora_alpha", 4)
    assert "holds no LoRA tensor" in line


def test_adapters_replace_others_only_when_asked_to(reference, tmp_path, capsys):
    source, file, back = reference / "adapters" / "qwen2", tmp_path / "x.safetensors", tmp_path / "back"
    convert_adapter.run(str(source), str(file))
    convert_adapter.run(str(file), str(back), lora_alpha=8)
    there, folder = ("--input", source, "--output", file), ("--input", file, "--output", back, "--lora_alpha", 8)
    assert "x.safetensors is there already" in refusal(capsys, "convert-adapter", *there)
    assert "back holds an adapter" in refusal(capsys, "convert-adapter", *folder)
    assert "back must end in .ckpt" in refusal(capsys, "convert-adapter", "--input", source, "--output", back)
    rows = tmp_path / "rows.json"
    rows.touch()
    folder = (*folder[:3], rows, *folder[4:], "--overwrite", True)
    assert "rows.json: it is a file; give a folder" in refusal(capsys, "convert-adapter", *folder)
    convert_adapter.run(str(source), str(file), overwrite=True)
    convert_adapter.run(str(file), str(back), lora_alpha=8, overwrite=True)


def test_ranks_that_differ_are_refused(reference, tmp_path, capsys):
    source = tmp_path / "adapter"
    shutil.copytree(reference / "adapters" / "qwen2", source)
    config = json.loads((source / CONFIG).read_text())
    storage.write_json(source / CONFIG, {**config, "alpha_pattern": {"q_proj": 32}})
    line = refusal(capsys, "convert-adapter", "--input", source, "--output", tmp_path / "x.ckpt")
    assert "its modules differ in rank or alpha: 4 and 8, 4 and 32" in line


def test_refusals_of_weights(reference, model, tmp_path, capsys):
    command, file = "convert", tmp_path / "m.safetensors"
    convert.run(str(model), str(file))
    assert "give --load_checkpoint" in refusal(capsys, command, "--input", file, "--output", tmp_path / "hf")
    flags = ("--load_checkpoint", reference / "models" / "llama3")
    line = refusal(capsys, command, "--input", file, "--output", tmp_path / "hf", *flags)
    assert "do not fit the model" in line
    assert "is there already" in refusal(capsys, command, "--input", model, "--output", file)
    convert_adapter.run(str(reference / "adapters" / "qwen2"), str(tmp_path / "lora.ckpt"))
    flags = ("--load_checkpoint", model)
    line = refusal(capsys, command, "--input", tmp_path / "lora.ckpt", "--output", tmp_path / "hf", *flags)
    assert "holds no weight" in line
    assert not (tmp_path / "hf").exists()


def test_a_tensor_in_memory_is_what_is_written(model):
    from lora_ms.bridge.files import planned

    for name, tensor in read_file(model).items():
        assert_array_equal(in_memory(planned([tensor])), tensor.words, name)
