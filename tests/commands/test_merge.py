"""``lora-ms merge``: PEFT's logits from the merged directory of every kind of adapter; types, shards, and no halves."""

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from lora_ms import saving, storage
from lora_ms.adapters.methods import METHODS
from lora_ms.cli.main import main
from lora_ms.models import hub

REFERENCE = Path(__file__).parents[1] / "reference"
VARIANTS = sorted(path.name for path in (REFERENCE / "variants").iterdir() if path.is_dir())
NO_MERGE = {
    "llama3_lora_bias": "the layers have no bias",
    "qwen2_pissa_niter_4": "what its random start took out is lost",
    **{
        name: "virtual tokens are no weights"
        for name in VARIANTS
        if {"prompt", "ptuning", "prefix"} & {*name.split("_")}
    },
}
UNTIED = {
    "llama3_embed",
    "llama3_modules_to_save_embed",
    "qwen2_embed",
    "qwen2_lm_head",
    "qwen2_modules_to_save_embed",
    "qwen2_modules_to_save_head",
}


def paths_of(variant: str) -> tuple[Path, Path]:
    return REFERENCE / "models" / variant.split("_")[0], REFERENCE / "variants" / variant


def merge(base: Path, adapter: Path, output: Path, *more: object) -> Path:
    """The merged directory, made by the command."""
    words = ["merge", "--load_checkpoint", base, "--load_adapter", adapter, "--output_dir", output, *more]
    assert main([str(word) for word in words]) == 0
    return output


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def header_of(file: Path) -> dict:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


@pytest.fixture(scope="module")
def logits_of(graph_mode):
    """``logits_of(directory, input_ids)``; one graph for each set of weights' names and sizes."""
    models = {}

    def logits(folder: Path, input_ids: np.ndarray) -> np.ndarray:
        sizes, _ = hub.read_config(folder)
        key = repr(sizes)
        if key not in models:
            models[key] = hub.load_directory(folder).set_train(False)
        hub.restore(models[key], folder)
        return models[key](Tensor(input_ids)).asnumpy()

    return logits


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NO_MERGE])
def test_every_kind_of_adapter_merges_to_pefts_logits(logits_of, golden, tmp_path, variant):
    base, adapter = paths_of(variant)
    values = golden(f"variants/{variant}")
    out = merge(base, adapter, tmp_path / "m", "--dtype", "float32")
    found = logits_of(out, values["input_ids"])
    for name in ("logits", "merged_logits"):
        if name in values:
            np.testing.assert_allclose(found, values[name], rtol=0, atol=1e-4)
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (tied and variant not in UNTIED)


def test_the_list_of_variants_is_whole():
    assert len(VARIANTS) >= 58 and set(NO_MERGE) | UNTIED <= set(VARIANTS)


@pytest.mark.parametrize("variant", ["qwen2_dora", "qwen2_regex_target"])
def test_what_the_adapter_leaves_is_copied_bit_by_bit(raw_tensors, tmp_path, variant):
    """In the model's own type, bfloat16 here, the other tensors are the model's, and no tensor comes or goes."""
    base, adapter = paths_of(variant)
    out = merge(base, adapter, tmp_path / "m")
    before, after = raw_tensors(base), raw_tensors(out)
    assert sorted(before) == sorted(after)
    keys = [key.removeprefix("base_model.model.") for key in load_file(adapter / "adapter_model.safetensors")]
    touched = {key.split(".lora_")[0] + ".weight" for key in keys}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == touched
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())


@pytest.mark.parametrize(("name", "key"), [("llama3", "torch_dtype"), ("qwen2", "dtype")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types(raw_tensors, tmp_path, name, key, dtype):
    base, adapter = paths_of(f"{name}_rslora")
    exact = raw_tensors(merge(base, adapter, tmp_path / "exact", "--dtype", "float32"))
    out = merge(base, adapter, tmp_path / "m", "--dtype", dtype)
    header = header_of(out / "model.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {info["dtype"] for info in header.values()} == {{"float16": "F16", "bfloat16": "BF16"}.get(dtype, "F32")}
    stored, bits = raw_tensors(out), {"float16": 11, "bfloat16": 8, "float32": 24}[dtype]
    for tensor, value in exact.items():
        _, exponent = np.frexp(value)
        half_step = np.ldexp(0.5, np.maximum(exponent, -13 if dtype == "float16" else -125) - bits)
        assert (abs(stored[tensor] - value) <= half_step).all(), tensor
    hf = json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == hf | {key: dtype}


def test_shards(raw_tensors, tmp_path):
    """Files of at most the given size of tensors, in an index; together what one file holds."""
    base, adapter = paths_of("qwen2_all_linear")
    whole = raw_tensors(merge(base, adapter, tmp_path / "one"))
    assert not (tmp_path / "one" / storage.INDEX).exists()
    out = merge(base, adapter, tmp_path / "m", "--max_shard_size", "40KB")
    index = json.loads((out / storage.INDEX).read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) == 4
    found, total = {}, 0
    for file in files:
        header = header_of(out / file)
        header.pop("__metadata__")
        size = sum(info["data_offsets"][1] - info["data_offsets"][0] for info in header.values())
        assert size <= 40_000
        total += size
        found |= dict.fromkeys(header, file)
    assert index == {"metadata": {"total_size": total}, "weight_map": found}
    parts = raw_tensors(out)
    assert sorted(parts) == sorted(whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path):
    out = merge(*paths_of("qwen2_rslora"), tmp_path / "m", "--max_shard_size", "1000")
    index = json.loads((out / storage.INDEX).read_text())["weight_map"]
    assert len(set(index.values())) < len(index)  # norms and biases share files
    assert [n for n, file in index.items() if file == index["model.embed_tokens.weight"]] == [
        "model.embed_tokens.weight"
    ]


def test_head_and_embedding_come_apart(raw_tensors, tmp_path):
    base, adapter = paths_of("llama3_modules_to_save_embed")
    before, after = raw_tensors(base), raw_tensors(merge(base, adapter, tmp_path / "m"))
    np.testing.assert_array_equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert sorted(after) == sorted([*before, "lm_head.weight"])


@pytest.mark.parametrize("variant", ["qwen2_modules_to_save_tying", "qwen2_lm_head_tying"])
@pytest.mark.parametrize("same", [True, False])
def test_two_changes_of_one_tensor_stay_one_where_they_are_equal(raw_tensors, tmp_path, variant, same):
    base, source = paths_of(variant)
    adapter = shutil.copytree(source, tmp_path / "adapter")
    stored = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.lm_head.{'weight' if 'save' in variant else 'lora_B.weight'}"
    stored[key] = stored[key].copy()
    stored[key][3] *= 1 if same else 2
    save_file(stored, adapter / "adapter_model.safetensors")
    after = raw_tensors(merge(base, adapter, tmp_path / "m", "--dtype", "float32"))
    assert ("lm_head.weight" in after) == (not same)
    if not same:
        differ = (after["lm_head.weight"] != after["model.embed_tokens.weight"]).any(1)
        assert differ[3] and not np.allclose(after["lm_head.weight"][3], after["model.embed_tokens.weight"][3])
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is same


def test_a_tied_models_copy_of_its_head_goes_unless_they_come_apart(reference, raw_tensors, tmp_path):
    """(A head that differs is no copy: see the tests of model folders.)"""
    shutil.copytree(reference / "models" / "llama3", tmp_path / "base")
    stored = raw_tensors(tmp_path / "base")
    copy = {"lm_head.weight": stored["model.embed_tokens.weight"]}
    save_file({**stored, **copy}, tmp_path / "base" / "model.safetensors")
    out = merge(tmp_path / "base", reference / "variants" / "llama3_rslora", tmp_path / "m")
    assert sorted(raw_tensors(out)) == sorted(stored)
    out = merge(tmp_path / "base", reference / "variants" / "llama3_embed", tmp_path / "n")
    np.testing.assert_array_equal(raw_tensors(out)["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_fast_pissa_that_was_not_converted_is_refused(tmp_path, capsys):
    base, adapter = paths_of("qwen2_pissa_niter_4")
    words = ["merge", "--load_checkpoint", base, "--load_adapter", adapter, "--output_dir", tmp_path / "m"]
    assert main([str(word) for word in words]) == 2
    assert "pissa_niter_4 took out of the weights was random and is not in the file" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_tokenizer_template_and_generation_settings_go_along(text_model, reference, tmp_path, capsys):
    """The adapter's tokenizer files stand in for the model's: both never mix."""
    adapter = tmp_path / "adapter"
    shutil.copytree(reference / "adapters" / "qwen2", adapter)
    base = tmp_path / "base"
    shutil.copytree(text_model, base)
    (base / "generation_config.json").write_text('{"top_k": 5}')
    (base / "vocab.json").write_text("{}")
    out = merge(base, adapter, tmp_path / "one")
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_text() == '{"top_k": 5}'
    assert f"try it: lora-ms chat --load_checkpoint {out}" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    out = merge(base, adapter, tmp_path / "two")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (out / "vocab.json").exists()
    assert sorted(tree(out)) == sorted(
        ["chat_template.jinja", "config.json", "generation_config.json", "lora-ms.sha256", "model.safetensors",
         "tokenizer.json", "tokenizer_config.json"]
    )  # fmt: skip


def test_what_is_printed(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference / "models" / "qwen2", "base")
    shutil.copytree(reference / "variants" / "qwen2_lm_head", "adapter")
    merge(Path("base"), Path("adapter"), Path("out"), "--max_shard_size", "100KB")
    sizes = [round(file.stat().st_size / 1000) for file in sorted(Path("out").glob("*.safetensors"))]
    assert capsys.readouterr().out == (
        "merging 3 modules of adapter into base: 27 tensors, 157 KB\n"
        "the head and the embedding come apart: tie_word_embeddings becomes false\n"
        f"  model-00001-of-00002.safetensors  {sizes[0]} KB\n"
        f"  model-00002-of-00002.safetensors  {sizes[1]} KB\n"
        "merged model: out\n"
        "no tokenizer came along: copy one into the folder, and lora-ms chat can use it\n"
    )


def test_the_adapter_names_its_model(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(reference)  # where models/qwen2, the name in the file, is a folder
    words = ["merge", "--load_adapter", "variants/qwen2_rslora", "--output_dir", str(tmp_path / "m")]
    assert main(words) == 0
    other = merge(*paths_of("qwen2_rslora"), tmp_path / "n")
    assert tree(tmp_path / "m") == tree(other)


# one process of its own each: a model of 96 MB in 48 tensors, with LoRA on all


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    values = np.random.default_rng(0).integers(0, 2**15, (1024, 1024), dtype=np.uint16)
    values[(values & 0x7F80) > 0x3F80] = 0x3C00  # as bfloat16: no large numbers
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(48)]
    planned = {f"{n}.weight": storage.Planned("BF16", (1024, 1024), lambda: [values]) for n in names}
    assert len(list(storage.write_model(folder / "base", planned))) == 1
    storage.write_json(folder / "base" / "config.json", {"tie_word_embeddings": False, "torch_dtype": "bfloat16"})
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = np.full((8, 1024), 0.01, np.float32)
        factors[f"base_model.model.{name}.lora_B.weight"] = np.full((1024, 8), 0.01, np.float32)
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    storage.write_json(folder / "adapter" / "adapter_config.json", config)
    return folder


def words_for(large: Path, output: Path, shard_size: str) -> list[str]:
    folders = ["--load_checkpoint", str(large / "base"), "--load_adapter", str(large / "adapter")]
    return ["merge", *folders, "--output_dir", str(output), "--max_shard_size", shard_size]


def test_memory_stays_below_one_shard(large, tmp_path, python, python_env):
    """By the process's largest resident size, above that of the libraries; MindSpore is not imported.

    Read from /proc: getrusage's figure begins with that of the process that started this one.
    """
    script = (
        "import re, sys, numpy, lora_ms.commands.merge; from lora_ms.cli.main import main\n"
        "used = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = used(); status = main(sys.argv[1:])\n"
        "print('grown', used() - before, status, 'mindspore' in sys.modules)"
    )
    command = [python, "-c", script, *words_for(large, tmp_path / "m", "40MB")]
    done = subprocess.run(command, env=python_env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    _, grown, status, imported = done.stdout.splitlines()[-1].split()
    assert (status, imported) == ("0", "False")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3
    assert int(grown) < 40e6


def test_killed_in_the_middle(large, tmp_path, python, python_env):
    """Nothing stands at the output then, and the next run clears what the killed one left beside it."""
    out = tmp_path / "m"
    command = [python, "-m", "lora_ms.cli", *words_for(large, out, "2MB")]
    with subprocess.Popen(command, env=python_env, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if "model-00003-of-" in line:
                child.kill()
                break
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    assert subprocess.run(command, env=python_env, capture_output=True).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert len(list(out.glob("*.safetensors"))) == 48


def test_a_disk_that_is_full(large, tmp_path, python, python_env):
    """A limit on the size of a file stands for it: the error is the same kind."""
    command = [python, "-m", "lora_ms.cli", *words_for(large, tmp_path / "a" / "m", "80MB")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))  # noqa: E731
    done = subprocess.run(command, env=python_env, capture_output=True, text=True, preexec_fn=limit)
    assert (done.returncode, done.stderr) == (2, f"error: cannot write {tmp_path / 'a' / 'm'}: File too large\n")
    assert tree(tmp_path) == {}


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    base, adapter = paths_of("qwen2_rslora")
    words = ["--load_checkpoint", str(base), "--load_adapter", str(adapter), "--output_dir", str(tmp_path / "m")]
    assert main(["merge", *words]) == 2
    assert capsys.readouterr().err == (f"error: cannot write {tmp_path / 'm'}: 140 KB are needed, 100 KB are free\n")
    assert tree(tmp_path) == {}


# faults: one line, status 2, nothing written


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys, reference):
    """``refused(*more)``: the error of ``lora-ms merge`` with good arguments and ``more``, which override them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference / "models" / "qwen2", "base")
    shutil.copytree(reference / "adapters" / "qwen2", "adapter")
    good = ["--load_checkpoint", "base", "--load_adapter", "adapter", "--output_dir", "out"]

    def run(*more) -> str:
        before = tree(tmp_path)
        status = main(["merge", *good, *map(str, more)])
        error = capsys.readouterr().err
        assert tree(tmp_path) == before
        assert (status, error[:7], error.count("\n"), error[-1]) == (2, "error: ", 1, "\n")
        return error[7:-1]

    return run


def change(file: str, **keys) -> None:
    path = Path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_folders_that_are_not_there(refused):
    assert refused("--load_adapter", "none") == (
        "load_adapter: none does not exist; give the folder that holds adapter_config.json"
    )
    assert refused("--load_adapter", "base") == "base: no adapter here: adapter_config.json is missing"
    assert refused("--load_checkpoint", "none") == (
        "load_checkpoint: none does not exist; give a Hugging Face directory"
    )
    assert refused("--load_checkpoint", "adapter") == "adapter/config.json: no such file"
    assert refused("--load_checkpoint", "base/config.json") == (
        "load_checkpoint: base/config.json is a file; give a Hugging Face directory"
    )


def test_a_model_that_only_a_hub_knows(refused, capsys):
    change("adapter/adapter_config.json", base_model_name_or_path="org/model")
    assert main(["merge", "--load_adapter", "adapter", "--output_dir", "out"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: which model? give --load_checkpoint with the adapter's own; org/model is no path here, and https://"
    )


@pytest.mark.parametrize(
    ("named", "why"),
    [("/org/model", "the adapter's own, /org/model, is no directory here"), (None, "the adapter names none")],
)
def test_no_model_at_all(refused, tmp_path, capsys, named, why):
    change("adapter/adapter_config.json", base_model_name_or_path=named)
    before = tree(tmp_path)
    assert main(["merge", "--load_adapter", "adapter", "--output_dir", "out"]) == 2
    assert capsys.readouterr().err == (
        f"error: which model? {why}: give --load_checkpoint with its Hugging Face directory\n"
    )
    assert tree(tmp_path) == before


def test_a_quantised_model(refused):
    change("base/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused() == ("base is quantised (gptq): merge into the model that it was made of, then quantise the result")


def test_outputs_that_are_taken(refused, tmp_path):
    assert refused("--output_dir", "base") == "output_dir base is the model itself: give another folder"
    os.symlink("base", "link")
    assert refused("--output_dir", "link", "--overwrite", "True") == (
        "output_dir link is the model itself: give another folder"
    )
    assert refused("--output_dir", "adapter", "--overwrite", "True") == (
        "output_dir adapter holds an adapter, which would be loaded on top: give another folder"
    )
    shutil.copytree("base", "old")
    assert refused("--output_dir", "old") == ("output_dir old holds a model: give another folder, or --overwrite True")
    Path("file").write_text("")
    assert refused("--output_dir", "file") == f"cannot write {tmp_path / 'file'}: Not a directory"
    assert refused("--output_dir", "file/m") == f"cannot write {tmp_path / 'file' / 'm'}: File exists"


def test_overwriting_leaves_nothing_of_the_old_model(reference, tmp_path):
    """Shards and their index would be taken for the new model's; what else is there stays."""
    out = tmp_path / "out"
    shutil.copytree(reference / "models" / "qwen2", out)  # two shards and an index
    (out / "notes.txt").write_text("mine")
    merge(*paths_of("qwen2_rslora"), out, "--overwrite", "True")
    assert sorted(tree(out)) == ["config.json", "lora-ms.sha256", "model.safetensors", "notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_files_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    merge(*paths_of("qwen2_rslora"), tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["config.json", "lora-ms.sha256", "model.safetensors", "notes.txt"]


def test_wrong_values(refused):
    assert refused("--dtype", "int8") == "dtype 'int8' is none of float16, bfloat16, float32, auto"
    for size in ("big", "5XB", "0GB", "-1GB"):
        assert refused(f"--max_shard_size={size}") == (
            f"max_shard_size expects a size such as 5GB or 500MB, got {size!r}"
        )


def test_an_adapter_of_another_model(refused, reference):
    adapter = reference / "adapters" / "qwen3"
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_B.weight"
    faults = [
        f"{name.format(layer, projection)} is {there}, should be {here}"
        for layer in (0, 1)
        for projection, there, here in (("q_proj", (96, 4), (64, 4)), ("v_proj", (48, 4), (32, 4)))
    ]
    assert (
        refused("--load_adapter", adapter) == f"{adapter}: made for another model: {'; '.join(faults[:3])} and 1 more"
    )


def test_tensors_missing_or_without_a_place(refused):
    stored = load_file("adapter/adapter_model.safetensors")
    key = "base_model.model.model.layers.{}.self_attn.q_proj.{}"
    del stored[key.format(0, "lora_B.weight")]
    stored |= {key.format(7, "lora_A.weight"): np.zeros((4, 64), np.float32), "odd": np.zeros(1, np.float32)}
    save_file(stored, "adapter/adapter_model.safetensors")
    assert refused() == (
        f"adapter: made for another model: {key.format(7, 'lora_A.weight')} (4, 64) has no place in the model; "
        f"odd (1,) has no place in the model; {key.format(0, 'lora_B.weight')} is missing"
    )
    save_file({}, "adapter/adapter_model.safetensors")
    assert refused() == "adapter: made for another model: it holds no LoRA tensor"


def test_ranks_that_contradict_the_settings(refused):
    change("adapter/adapter_config.json", r=8)
    message = refused()
    assert message.startswith("adapter: made for another model: base_model.model.model.layers.0.mlp.down_proj.lora_A")
    assert message.count("should be (8, ") == 2 and message.count(", 8)") == 1  # of twelve, the first three
    assert message.endswith(" and 9 more")


def test_a_copy_of_the_embedding_that_is_another(refused, reference):
    """PEFT stores the base weight beside an adapter on the embedding: it says whose adapter it is."""
    shutil.rmtree("adapter")
    shutil.copytree(reference / "variants" / "qwen2_embed", "adapter")
    stored = load_file("adapter/adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    stored[key] = stored[key] + 1
    save_file(stored, "adapter/adapter_model.safetensors")
    assert refused() == f"adapter: made for another model: {key} is another than the model's"


def test_numbers_that_are_not_finite(refused):
    stored = load_file("adapter/adapter_model.safetensors")
    key = sorted(stored)[3]
    stored[key][1, 2] = np.inf
    save_file(stored, "adapter/adapter_model.safetensors")
    assert refused() == f"adapter: {key} holds NaN or infinity"


def test_merged_numbers_that_are_not_finite(refused, tmp_path):
    stored = load_file("adapter/adapter_model.safetensors")
    for key in stored:
        stored[key][:] = 1e30
    save_file(stored, "adapter/adapter_model.safetensors")
    weight = "model.layers.0.mlp.down_proj.weight"
    assert refused() == f"the merged {weight} holds NaN or infinity; nothing was written"
    for key in stored:
        stored[key][:] = 200
    save_file(stored, "adapter/adapter_model.safetensors")
    assert refused("--dtype", "float16") == (
        f"{weight} is out of float16's range: merge with --dtype bfloat16 or float32"
    )
    out = merge(Path("base"), Path("adapter"), Path("out"), "--dtype", "float16", "--safe_merge", "False")
    assert np.isinf(load_file(out / "model.safetensors")[weight]).any()


def test_files_that_are_broken(refused):
    shard = Path("base/model-00002-of-00002.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert refused().startswith(f"{shard}: truncated: ")
    shard.write_bytes(data)
    file = Path("adapter/adapter_model.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:100])
    assert refused() == f"{file}: not readable as safetensors (the header reaches beyond the end of the file)"
    file.unlink()
    assert refused() == f"{file}: no such file"
    (file.parent / "adapter_model.bin").write_bytes(b"")
    assert refused() == "adapter: adapter_model.bin is not read: save the adapter as adapter_model.safetensors"
    Path("adapter/adapter_config.json").write_text("{")
    assert refused().startswith("adapter/adapter_config.json: not readable as JSON (")


def test_an_adapter_of_another_kind(refused):
    change("adapter/adapter_config.json", peft_type="LOHA")
    supported = ", ".join(method.PEFT_TYPE for method in METHODS.values())
    assert refused() == (f"adapter/adapter_config.json: peft_type 'LOHA' is not supported; supported: {supported}")


def test_biases_where_the_model_has_none(refused, reference):
    adapter = reference / "variants" / "llama3_lora_bias"
    assert refused("--load_checkpoint", reference / "models" / "llama3", "--load_adapter", adapter) == (
        f"{adapter}: lora_bias cannot be merged into layers that have no bias: "
        "model.layers.0.self_attn.q_proj and 3 others"
    )


LIVE = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
for folder, npz in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), (folder, info)
    values = np.load(npz)
    wanted = values["merged_logits"] if "merged_logits" in values else values["logits"]
    with torch.no_grad():
        logits = model(torch.from_numpy(values["input_ids"]).long()).logits.numpy()
    print(abs(logits - wanted).max())
"""


@pytest.mark.peft
@pytest.mark.slow
def test_transformers_loads_the_merged_directory_and_gives_pefts_merged_logits(python_env, tmp_path):
    torch_python = os.environ.get("LORA_MS_TORCH_PYTHON")
    if not torch_python:
        pytest.skip("LORA_MS_TORCH_PYTHON names no Python with torch and PEFT")
    variants = ["llama3_embed", "llama3_dora", "qwen2_lora_bias", "qwen2_lm_head_tying", "qwen2_modules_to_save_head",
                "qwen2_pissa", "qwen3_embed_dora", "qwen3_modules_to_save_norms", "qwen3_adalora"]  # fmt: skip
    words = []
    for variant in variants:
        more = ("--dtype", "float32", "--max_shard_size", "60KB")
        words += [merge(*paths_of(variant), tmp_path / variant, *more), REFERENCE / "variants" / f"{variant}.npz"]
    command = [torch_python, "-c", LIVE, *map(str, words)]
    child = subprocess.run(command, env={**python_env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    gaps = [float(line) for line in child.stdout.splitlines()]
    assert len(gaps) == len(variants) and max(gaps) < 1e-4, dict(zip(variants, gaps, strict=False))
