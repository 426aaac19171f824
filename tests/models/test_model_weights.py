"""Weights: exact from every stored type, strict about names, and written as they were read."""

import gc
import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from lora_ms import storage
from lora_ms.adapters.merge import merge
from lora_ms.adapters.peft_format import load_adapter
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM
from lora_ms.models.hub import (
    hugging_face_name,
    load_checkpoint,
    load_directory,
    new_model,
    read_config,
    restore,
    save_directory,
)

NAMES = ["llama2", "llama3", "qwen2", "qwen3", "deepseek_r1_qwen", "smollm3"]
pytestmark = pytest.mark.usefixtures("graph_mode")


def weights(model: CausalLM) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy() for name, parameter in model.parameters_and_names()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def write_model(path, config_of, tensors) -> None:
    path.mkdir(parents=True)
    shutil.copy(config_of / "config.json", path)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path / "model.safetensors")


def error_of(path) -> str:
    with pytest.raises(LoraMsError) as caught:
        load_directory(path)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_the_file_in_float32_and_float16(reference, raw_tensors, name):
    """llama3 and qwen2 hold bfloat16, qwen2 in two files; qwen3 float16; the others float32."""
    stored = raw_tensors(reference / "models" / name)
    assert_same(weights(load_directory(reference / "models" / name)), stored)
    half = {key: value.astype(np.float16) for key, value in stored.items()}
    assert_same(weights(load_directory(reference / "models" / name, ms.float16)), half)


def write_one(file, dtype: str, data: bytes, count: int) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [count], "data_offsets": [0, len(data)]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_every_bfloat16_is_read_exactly(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)
    write_one(tmp_path / "x", "BF16", bits.tobytes(), len(bits))
    found = storage.read(storage.read_header(tmp_path / "x")["x"], np.float32)
    # sign, 8 bits of exponent, 7 of fraction
    exponent, fraction = ((bits >> 7) & 255).astype(np.int32), (bits & 127) / 128
    value = np.where(exponent == 0, np.ldexp(fraction, -126), np.ldexp(1 + fraction, exponent - 127))
    value = np.where(exponent == 255, np.where(fraction == 0, np.inf, np.nan), value)
    np.testing.assert_array_equal(found, np.where(bits >> 15, -value, value).astype(np.float32))
    assert found.dtype == np.float32


@pytest.mark.parametrize(("name", "stored"), [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)])
def test_other_types_are_read_as_numpy_converts_them(tmp_path, name, stored):
    values = np.random.default_rng(0).standard_normal(50).astype(stored)
    write_one(tmp_path / "x", name, values.tobytes(), 50)
    entry = storage.read_header(tmp_path / "x")["x"]
    for target in (np.float32, np.float16):
        found = storage.read(entry, target)
        assert found.dtype == target and found.flags.writeable
        np.testing.assert_array_equal(found, values.astype(target))


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    """Every bfloat16 comes back, and what lies between two goes to the nearer one or, halfway, to the even one."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    finite = (bits & 0x7F80) != 0x7F80
    words = bits[finite].astype(np.uint16)

    def float_of(pattern: np.ndarray) -> np.ndarray:
        return pattern.astype(np.uint32).view(np.float32)

    low = bits[finite] << 16
    following = (words + 1).astype(np.uint16)
    even = np.where(words % 2 == 0, words, following)
    for added, wanted in (
        (0, words),
        (1, words),
        (0x7FFF, words),
        (0x8000, even),
        (0x8001, following),
        (0xFFFF, following),
    ):
        np.testing.assert_array_equal(storage.encoded(float_of(low + np.uint32(added)), "BF16"), wanted)
    special = np.array([np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    found = storage.encoded(special, "BF16")
    assert found.tolist()[:2] == [0x7F80, 0xFF80] and found[3] == 0x7F80
    assert found[2] & 0x7F80 == 0x7F80 and found[2] & 0x7F
    assert storage.encoded(np.zeros((2, 3), np.float32), "BF16").shape == (2, 3)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("4KB", 4000), ("123", 123)],
)
def test_sizes(text, size):
    assert storage.parse_size(text) == size


def test_a_tensor_in_blocks_is_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 50)
    tensors = {"x": np.arange(23 * 7, dtype=np.float32).reshape(23, 7), "row": np.arange(120, dtype=np.float32)}
    tensors |= {"one": np.float32(3).reshape(()), "none": np.zeros((0, 4), np.float32)}
    planned = {
        name: storage.Planned("F32", value.shape, lambda value=value: [value]) for name, value in tensors.items()
    }
    storage.write_blocks(tmp_path / "x", planned)
    assert_same(load_file(tmp_path / "x"), tensors)
    for name, entry in storage.read_header(tmp_path / "x").items():
        blocks = list(storage.read_blocks(entry))
        assert (
            all(block.size <= 50 for block in blocks) and len(blocks) == {"x": 4, "row": 3, "one": 1, "none": 0}[name]
        )
        words = list(storage.read_words(entry))
        assert all(block.size <= 50 for block in words)
        for parts in (blocks, words):
            joined = np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0, np.float32)
            np.testing.assert_array_equal(joined, tensors[name].ravel())


def test_a_type_that_is_no_weight_is_refused(tmp_path):
    write_one(tmp_path / "x", "I64", bytes(16), 2)
    with pytest.raises(LoraMsError) as caught:
        storage.read(storage.read_header(tmp_path / "x")["x"], np.float32)
    assert str(caught.value) == f"{tmp_path / 'x'}: type I64 is not supported; supported: F32, F16, BF16, F64"


def test_a_tied_model_may_carry_a_copy_of_its_head(reference, raw_tensors, tmp_path):
    source = reference / "models" / "llama3"
    stored = raw_tensors(source)
    extra = {
        "lm_head.weight": stored["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),  # as old Llama files have it
    }
    write_model(tmp_path / "m", source, stored | extra)
    assert_same(weights(load_directory(tmp_path / "m")), stored)


def test_missing_surplus_and_misshaped_tensors_stand_in_one_error(reference, raw_tensors, tmp_path):
    source = reference / "models" / "llama2"
    stored = raw_tensors(source)
    del stored["model.norm.weight"], stored["lm_head.weight"]
    stored["model.extra.weight"] = np.zeros((2, 3), np.float32)
    stored["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 96), np.float32)
    write_model(tmp_path / "m", source, stored)
    assert error_of(tmp_path / "m") == (
        f"{tmp_path / 'm'}: 4 tensors do not fit the model: missing model.norm.weight (48,); "
        "missing lm_head.weight (128, 48); surplus model.extra.weight (2, 3); "
        "model.layers.1.mlp.up_proj.weight is (48, 96), should be (96, 48)"
    )


def test_files_cut_short_are_refused(reference, tmp_path):
    shutil.copytree(reference / "models" / "llama2", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    last = next(n for n, i in header.items() if n != "__metadata__" and start + i["data_offsets"][1] == len(data))
    file.write_bytes(data[:-10])
    assert error_of(tmp_path / "m") == (
        f"{file}: truncated: {last} ends at byte {len(data):,} and the file at {len(data) - 10:,}"
    )
    reason = "the header reaches beyond the end of the file"
    for size in (0, 5, start - 1):
        file.write_bytes(data[:size])
        assert error_of(tmp_path / "m") == f"{file}: not readable as safetensors ({reason})"


def test_a_missing_file_or_shard_is_named(reference, tmp_path):
    shutil.copytree(reference / "models" / "qwen2", tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert error_of(tmp_path / "m") == f"{shard}: no such file"
    (tmp_path / "m" / storage.INDEX).unlink()
    assert error_of(tmp_path / "m") == f"{tmp_path / 'm'}: holds no model.safetensors and no {storage.INDEX}"


def test_a_folder_of_pickles_is_named(reference, tmp_path):
    shutil.copytree(reference / "models" / "qwen2", tmp_path / "m")
    for file in (tmp_path / "m").glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"PK")
    assert error_of(tmp_path / "m").startswith(
        f"{tmp_path / 'm' / 'pytorch_model.bin'}: a file of PyTorch's, which can hold code, and is not read: save"
    )


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_index_is_named(reference, tmp_path, text):
    shutil.copytree(reference / "models" / "qwen2", tmp_path / "m")
    (tmp_path / "m" / storage.INDEX).write_text(text)
    assert str(tmp_path / "m" / storage.INDEX) in error_of(tmp_path / "m")


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_directory_loads_as_it_was(reference, raw_tensors, tmp_path, name):
    model = load_directory(reference / "models" / name)
    save_directory(model, tmp_path / "m")
    stored = raw_tensors(reference / "models" / name)
    assert_same(load_file(tmp_path / "m" / "model.safetensors"), stored)
    header = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
    hf = json.loads((reference / "models" / name / "config.json").read_text())
    key = "dtype" if "dtype" in hf else "torch_dtype"
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == hf | {key: "float32"}
    again = load_directory(tmp_path / "m")
    assert_same(weights(again), stored)
    assert again.config == model.config
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json", "lora-ms.sha256", "model.safetensors"
    ]  # fmt: skip


def test_saving_in_shards_over_an_older_model(reference, raw_tensors, tmp_path):
    """Old shards go, what else is there stays, and the folder is whole whenever it can be loaded."""
    shutil.copytree(reference / "models" / "qwen2", tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    model = load_directory(reference / "models" / "qwen2")
    save_directory(model, tmp_path / "m", shard_size=100_000)
    stored = raw_tensors(reference / "models" / "qwen2")
    assert_same(raw_tensors(tmp_path / "m"), stored)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.joinpath("m").iterdir()) == sorted(
        ["config.json", "lora-ms.sha256", "tokenizer.json", storage.INDEX, *names]
    )
    index = json.loads((tmp_path / "m" / storage.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    assert {name: load_file(tmp_path / "m" / file)[name].shape for name, file in index["weight_map"].items()} == {
        name: value.shape for name, value in stored.items()
    }
    assert_same(weights(load_directory(tmp_path / "m")), stored)
    save_directory(model, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.joinpath("m").iterdir()) == [
        "config.json", "lora-ms.sha256", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["qwen2_lm_head", "llama3_embed"])
def test_a_head_that_has_come_apart_from_the_embedding_is_saved(reference, golden, tmp_path, variant):
    """Merging changes one of two tied modules: the model saved is untied, and computes the same."""
    model = load_directory(reference / "models" / variant.split("_")[0])
    load_adapter(model, reference / "variants" / variant)
    save_directory(merge(model), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    values = golden(f"variants/{variant}")
    again = load_directory(tmp_path).set_train(False)
    np.testing.assert_allclose(again(Tensor(values["input_ids"])).asnumpy(), values["logits"], rtol=0, atol=1e-4)


def test_what_a_directory_has_no_place_for_is_not_saved(reference, tmp_path):
    for variant, name, why in (
        ("qwen2_rslora", "model.layers.0.self_attn.q_proj.lora_a", "of an adapter: merge it first"),
        ("llama3_lora_bias", "model.layers.0.self_attn.q_proj.bias", "a bias that config.json cannot ask for"),
    ):
        model = load_directory(reference / "models" / variant.split("_")[0])
        load_adapter(model, reference / "variants" / variant)
        with pytest.raises(LoraMsError) as caught:
            save_directory(merge(model) if variant == "llama3_lora_bias" else model, tmp_path / "m")
        assert str(caught.value) == f"the model cannot be saved as it is: {name} is {why}"
        assert not (tmp_path / "m").exists()


def test_saving_in_float16(reference, raw_tensors, tmp_path):
    save_directory(load_directory(reference / "models" / "qwen3"), tmp_path, np.float16)
    stored = raw_tensors(reference / "models" / "qwen3")  # float16 already
    assert_same(load_file(tmp_path / "model.safetensors"), {n: v.astype(np.float16) for n, v in stored.items()})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "smollm3"])
def test_a_new_model_is_written_with_a_config_of_its_own(reference, tmp_path, name):
    config, _ = read_config(reference / "models" / name)
    model = new_model(config, ms.float32, seed=3)
    save_directory(model, tmp_path)
    found, hf = read_config(tmp_path)
    assert found == config
    architecture, kind = {
        "llama3": ("LlamaForCausalLM", "llama"),
        "qwen2": ("Qwen2ForCausalLM", "qwen2"),
        "qwen3": ("Qwen3ForCausalLM", "qwen3"),
        "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
    }[name]
    assert (hf["architectures"], hf["model_type"], hf["torch_dtype"]) == ([architecture], kind, "float32")
    assert_same(weights(load_directory(tmp_path)), weights(model))
    assert_same(weights(new_model(config, ms.float32, seed=3)), weights(model))
    matrix = model.model.layers[0].mlp.up_proj.weight.asnumpy()
    assert abs(matrix.std() - config.hidden_size**-0.5) < 0.005 and abs(matrix.mean()) < 0.005
    assert (model.model.norm.weight.asnumpy() == 1).all()


def test_restore_puts_the_weights_back(reference, raw_tensors):
    config, _ = read_config(reference / "models" / "qwen2")
    model = new_model(config, ms.float32, seed=0)
    restore(model, reference / "models" / "qwen2")
    assert_same(weights(model), raw_tensors(reference / "models" / "qwen2"))


MINDFORMERS = {
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "model.layers.0.attention.wq.weight": "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.attention.wk.bias": "model.layers.0.self_attn.k_proj.bias",
    "model.layers.11.attention.wv.weight": "model.layers.11.self_attn.v_proj.weight",
    "model.layers.0.attention.wo.weight": "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.feed_forward.w1.weight": "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.feed_forward.w2.weight": "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.feed_forward.w3.weight": "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
    "model.layers.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def test_mindformers_names():
    assert {name: hugging_face_name(name) for name in MINDFORMERS} == MINDFORMERS


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_mindspore_checkpoint_with_mindformers_names_loads(reference, raw_tensors, tmp_path, suffix):
    source = reference / "models" / "deepseek_r1_qwen"
    config, _ = read_config(source)
    stored = raw_tensors(source)
    words = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "model.norm.": "model.norm_out.",
             "embed_tokens.weight": "tok_embeddings.embedding_weight"}  # fmt: skip
    renamed = {}
    for name, value in stored.items():
        for old, new in words.items():
            name = name.replace(old, new)
        renamed[name] = value
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in renamed.items()], str(file))
    else:
        save_file(renamed, file)
    assert_same(weights(load_checkpoint(file, config)), stored)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_mindspore_checkpoint_that_is_none(reference, tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"no checkpoint")
    with pytest.raises(LoraMsError) as caught:
        load_checkpoint(file, read_config(reference / "models" / "llama2")[0])
    assert str(caught.value).startswith(f"{file}: not readable as ")
    # MindSpore leaves the file open; it is closed here, where the warning is ignored
    del caught
    gc.collect()
