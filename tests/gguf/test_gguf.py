"""GGUF: what we write is read by llama.cpp's own package and comes back to the same numbers; so does what it writes.

The refusals are lines: a file cut short, wrong counts, an unknown type, what llama.cpp has no place for.
"""

import json
import re
import shutil
import struct
from pathlib import Path

import jinja2
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from lora_ms import saving
from lora_ms.cli.main import main
from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.gguf.files import halved, interleaved
from lora_ms.gguf.modelfile import TemplateFault, go_template, turns_of
from lora_ms.gguf.vocabulary import merges_of
from lora_ms.models import hub

gguf = pytest.importorskip("gguf")
MODELS = ("llama2", "llama3", "qwen2", "qwen3")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ("Hello, world! 12345", "  two  spaces\n\nand\ttabs", "<|im_start|>user\nhi<|im_end|>")


def save_tokenizer(folder: Path, template: str = CHATML) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", "ĉ", *map(chr, range(33, 127)), "he", "ll"]
    backend = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, [("h", "e"), ("l", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=pieces[2], pad_token=pieces[0], additional_special_tokens=[pieces[1]]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.fixture
def folder_of(reference, tmp_path):
    """``folder_of("qwen2")``: a copy of that reference model, with a tokenizer."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(reference / "models" / name, folder)
        save_tokenizer(folder)
        return folder

    return copy


@pytest.fixture
def exported(folder_of, tmp_path):
    """``exported("qwen2", …)``: the folder with its model.gguf and Modelfile."""

    def export(name: str, *more: str) -> Path:
        output = tmp_path / f"{name}_gguf"
        base = str(folder_of(name))
        assert main(["export", "gguf", "--load_checkpoint", base, "--output_dir", str(output), *more]) == 0
        return output

    return export


def convert(source: Path, target: Path, *more: str) -> Path:
    assert main(["convert", str(source), "--output_dir", str(target), *more]) == 0
    return target


def refused(capsys, *argv: object) -> str:
    """The line of an error."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
def test_a_model_there_and_back(exported, golden, tmp_path, graph_mode, name, dtype, tolerance):
    there = exported(name, "--dtype", dtype)
    reader = gguf.GGUFReader(there / "model.gguf")
    assert reader.fields["general.architecture"].contents() == ("llama" if name.startswith("llama") else name)
    back = convert(there / "model.gguf", tmp_path / "back")
    values = golden(f"logits_{name}")
    logits = hub.load_directory(back)(Tensor(values["input_ids"])).asnumpy()
    wanted = hub.load_directory(tmp_path / name)(Tensor(values["input_ids"])).asnumpy()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=tolerance)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (back, tmp_path / name))
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "max_position_embeddings"):
        assert config[key] == before[key], key
    assert hub.read_config(back)[0] == hub.read_config(tmp_path / name)[0] or name == "llama3"
    ours, theirs = load_tokenizer(tmp_path / name), load_tokenizer(back)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert theirs.chat_template == CHATML and theirs.eos_token == "<|im_end|>"


def test_rows_in_llama_cpps_order():
    """Two heads of four channels: rotary pairs (i, i + 2) of a head become (2i, 2i + 1)."""
    rows = np.arange(8)[:, None]
    assert interleaved(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(halved(interleaved(rows, 2), 2), rows)


def test_norms_are_float32_and_matrices_as_asked(exported):
    reader = gguf.GGUFReader(exported("qwen2", "--dtype", "bfloat16") / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "BF16"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_quantised_types(exported, raw_tensors, tmp_path, kind):
    """Read as the package dequantises: the numbers of an own call of it, in float16."""
    source = gguf.GGUFReader(exported("qwen2", "--dtype", "float32") / "model.gguf")
    quantised = gguf.GGMLQuantizationType[kind]
    wanted = {}
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "qwen2")
    for field in source.fields.values():
        if field.name.startswith(("qwen2.", "tokenizer.")):
            writer.add_key_value(
                field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in source.tensors:
        data = np.array(tensor.data)
        if data.ndim == 2 and data.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(data, quantised)
            writer.add_tensor(tensor.name, packed, raw_dtype=quantised)
            wanted[tensor.name] = gguf.quants.dequantize(packed, quantised)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "token_embd.weight" in wanted and "blk.0.attn_q.weight" in wanted
    stored = raw_tensors(convert(tmp_path / "q.gguf", tmp_path / "back"))
    for theirs, ours in (("token_embd", "model.embed_tokens"), ("blk.0.attn_q", "model.layers.0.self_attn.q_proj")):
        expected = wanted[f"{theirs}.weight"].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(stored[f"{ours}.weight"], expected)


# --- adapters


def adapter_numbers(file: Path, name: str, heads: tuple[int, int]) -> dict[str, np.ndarray]:
    """The updates of a file by llama.cpp's own rule: alpha / rank times B A, rows in Hugging Face's order."""
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    updates = {}
    for key in tensors:
        if not key.endswith(".lora_a"):
            continue
        module = key.removesuffix(".lora_a")
        a, b = tensors[key], tensors[f"{module}.lora_b"]
        update = alpha / len(a) * (b.astype(np.float64) @ a)
        if name.startswith("llama") and ("attn_q" in module or "attn_k" in module):
            update = halved(update, heads["attn_k" in module])
        updates[module.removesuffix(".weight")] = update
    return updates


LEAVES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
LEAVES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3.0}, "lora_alpha": 7.0}], ids=str
)
def test_an_adapters_numbers(folder_of, reference, tmp_path, name, changes):
    adapter = tmp_path / "adapter"
    shutil.copytree(reference / "adapters" / name, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    base, output = folder_of(name), tmp_path / "out"
    argv = ["export", "gguf", "--load_adapter", adapter, "--load_checkpoint", base, "--output_dir", output]
    assert main([str(word) for word in argv]) == 0
    sizes = hub.read_config(base)[0]
    found = adapter_numbers(output / "adapter.gguf", name, (sizes.num_attention_heads, sizes.num_key_value_heads))
    stored = load_file(adapter / "adapter_model.safetensors")
    wanted = {}
    for key, a in stored.items():
        if key.endswith(".lora_A.weight"):
            parts = key.split(".")
            leaf = parts[-3]
            alpha = settings.get("alpha_pattern", {}).get(leaf, settings["lora_alpha"])
            scaling = alpha / len(a) ** (0.5 if settings.get("use_rslora") else 1)
            b = stored[key.replace("lora_A", "lora_B")]
            wanted[f"blk.{parts[parts.index('layers') + 1]}.{LEAVES[leaf]}"] = scaling * (b.astype(np.float64) @ a)
    assert found.keys() == wanted.keys() and wanted
    for key, update in wanted.items():
        np.testing.assert_allclose(found[key], update, rtol=1e-6, atol=2e-8, err_msg=key)


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("qwen2_dora", "llama.cpp's adapters are plain LoRA, and this one is not (DoRA)"),
        ("qwen2_modules_to_save_head", "this one is not (modules_to_save: lm_head)"),
        ("qwen2_embed", "have no place for model.embed_tokens of this model"),
    ],
)
def test_adapters_that_have_no_place(folder_of, reference, tmp_path, capsys, variant, why):
    adapter = reference / "variants" / variant
    if not adapter.is_dir():
        pytest.fail(f"{variant} is gone")
    argv = ["export", "gguf", "--load_adapter", adapter, "--load_checkpoint", folder_of("qwen2")]
    line = refused(capsys, *argv, "--output_dir", tmp_path / "out")
    assert why in line and line.endswith("merge it, and export the merged model")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_its_model(folder_of, reference, tmp_path):
    argv = ["--load_adapter", reference / "adapters" / "qwen2", "--load_checkpoint", folder_of("qwen2")]
    argv += ["--output_dir", tmp_path / "out", "--with_base", "True"]
    assert main(["export", "gguf", *map(str, argv)]) == 0
    assert sorted(file.name for file in (tmp_path / "out").glob("*.gguf")) == ["adapter.gguf", "model.gguf"]
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\nADAPTER ./adapter.gguf\n")


# --- the Modelfile


def test_a_modelfile(exported):
    assert (exported("qwen2") / "Modelfile").read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_template_with_a_system_message_of_its_own(folder_of, tmp_path):
    folder = folder_of("qwen2")
    opening = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    save_tokenizer(folder, opening + CHATML)
    assert main(["export", "gguf", "--load_checkpoint", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    assert (
        'TEMPLATE """{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}'
        "{{ range .Messages }}" in (tmp_path / "out" / "Modelfile").read_text()
    )


def test_a_template_that_go_cannot_say(folder_of, tmp_path, capsys):
    folder = folder_of("qwen2")
    numbered = "{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}"
    save_tokenizer(folder, numbered)
    assert main(["export", "gguf", "--load_checkpoint", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    assert "no template in Modelfile: its text is more than one turn after another" in capsys.readouterr().out
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text().replace("no TEMPLATE", "")


@pytest.mark.parametrize("refuses", ["messages[0].role == 'system'", "true"])
def test_a_template_that_refuses(folder_of, tmp_path, capsys, refuses):
    """Mistral's, for one, take no system message: the rest is a template all the same."""
    folder = folder_of("qwen2")
    save_tokenizer(folder, "{% if " + refuses + " %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML)
    assert main(["export", "gguf", "--load_checkpoint", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    text, out = (tmp_path / "out" / "Modelfile").read_text(), capsys.readouterr().out
    if refuses == "true":
        assert "no template in Modelfile: it refuses a plain conversation (roles must alternate)" in out
        assert 'TEMPLATE "' not in text
    else:
        assert 'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user' in text


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<' + m.role + '>' + m.content + '</s>' %}"
    "{{ bos_token + text if loop.first else text }}{% endfor %}"
)


def written_by_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of the few forms that we write."""
    first = messages[0]["role"]
    template = re.sub(
        r'{{ if ne \(index .Messages 0\).Role "system" }}(.*?){{ end }}', r"\1" if first != "system" else "", template
    )
    start, head, rest = re.split(r"{{ (range .*?) }}", template)
    loop, _, prompt = rest.rpartition("{{ end }}")
    assert head in ("range .Messages", "range $i, $_ := .Messages")
    text = start
    for number, message in enumerate(messages):
        turn = re.sub(r"{{ if \$i }}(.*?){{ end }}", r"\1" if number else "", loop)
        branch = re.search(
            rf'if eq .Role "{message["role"]}" }}}}(.*?){{{{ (?:else|end)', turn.replace("{{ .Content }}", "\0")
        )
        text += branch[1].replace("\0", message["content"])
    return text + prompt


@pytest.mark.parametrize("jinja", [MISTRAL, LLAMA2, LLAMA3])
@pytest.mark.parametrize("bos", ["<s>", ""])
def test_the_begin_token_is_there_once(jinja, bos):
    """llama.cpp puts it at the beginning, where the tokenizer does; before later questions it is the template's."""
    environment = jinja2.Environment()

    def refuse(text):
        raise TemplateFault(text)

    def render(messages, prompt):
        given = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>", "raise_exception": refuse}
        return environment.from_string(jinja).render(given, add_generation_prompt=prompt)

    template = go_template(turns_of(render), bos)
    alternating = [
        {"role": role, "content": role[0] * 3} for role in ("user", "assistant", "user", "assistant", "user")
    ]
    trials = [alternating[:n] for n in (1, 3, 5)]
    trials += [[{"role": "system", "content": "Be kind."}, *trial] for trial in trials if jinja is LLAMA3]
    for messages in trials:
        assert bos + written_by_go(template, messages) == render(messages, True)


# --- refusals


def test_an_export_beside_what_it_is_made_of(folder_of, reference, tmp_path, capsys):
    """The folder of an adapter, or of a model, that we wrote keeps all that it holds."""
    adapter, base = tmp_path / "adapter", folder_of("qwen2")
    with saving.new_folder(adapter) as part:
        shutil.copytree(reference / "adapters" / "qwen2", part, dirs_exist_ok=True)
    with saving.new_folder(base) as part:
        shutil.copytree(base, part, dirs_exist_ok=True)
    before = {folder: set(saving.files_of(folder)) for folder in (adapter, base)}
    of_adapter = ["--load_adapter", str(adapter), "--load_checkpoint", str(base)]
    for folder, source in ((adapter, of_adapter), (base, ["--load_checkpoint", str(base)])):
        assert main(["export", "gguf", *source, "--output_dir", str(folder)]) == 0
        assert set(saving.files_of(folder)) > before[folder] and saving.is_intact(folder)
    line = refused(capsys, "convert", base / "model.gguf", "--output_dir", base, "--overwrite", "True")
    assert "model.gguf, which would be gone" in line
    assert main(["export", "gguf", *of_adapter, "--output_dir", str(base), "--overwrite", "True"]) == 0
    assert (base / "model.gguf").is_file() and "Ollama needs the model" not in capsys.readouterr().out


def test_a_file_that_is_cut(exported, tmp_path, capsys):
    data = (exported("qwen2") / "model.gguf").read_bytes()
    for length in (3, 20, 300, 3000, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        line = refused(capsys, "convert", tmp_path / "cut.gguf", "--output_dir", tmp_path / "back")
        assert line.startswith(f"error: {tmp_path / 'cut.gguf'}: "), line
        assert not (tmp_path / "back").exists()


def test_counts_that_are_wrong(exported, tmp_path, capsys):
    data = bytearray((exported("qwen2") / "model.gguf").read_bytes())
    tensors, pairs = struct.unpack("<QQ", data[8:24])
    for counts in ((tensors + 1, pairs), (tensors, pairs + 1), (2**63, pairs), (tensors, 2**63), (tensors - 1, pairs)):
        data[8:24] = struct.pack("<QQ", *counts)
        (tmp_path / "wrong.gguf").write_bytes(data)
        line = refused(capsys, "convert", tmp_path / "wrong.gguf", "--output_dir", tmp_path / "back")
        assert str(tmp_path / "wrong.gguf") in line and "this should not happen" not in line, line


def test_a_type_that_is_unknown(exported, tmp_path, capsys):
    data = (exported("qwen2", "--dtype", "float32") / "model.gguf").read_bytes()
    name = b"blk.0.attn_q.weight"
    place = data.index(name) + len(name) + 4 + 16  # after the number of axes and the two axes
    for kind in (4096, 4):  # never given, and given up
        (tmp_path / "odd.gguf").write_bytes(data[:place] + struct.pack("<I", kind) + data[place + 4 :])
        line = refused(capsys, "convert", tmp_path / "odd.gguf", "--output_dir", tmp_path / "back")
        assert "not readable as GGUF" in line and "is the download complete?" in line


def test_other_files(tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    line = refused(capsys, "convert", tmp_path / "x.gguf", "--output_dir", tmp_path / "back")
    assert line == f"error: {tmp_path / 'x.gguf'}: no GGUF file: it does not begin with the letters GGUF"
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    line = refused(capsys, "convert", tmp_path / "mamba.gguf", "--output_dir", tmp_path / "back")
    assert line.endswith("architecture 'mamba' is not supported; supported: llama, qwen2, qwen3")


def test_a_tokenizer_that_llama_cpp_does_not_know(root, tmp_path, capsys):
    argv = ["export", "gguf", "--load_checkpoint", root / "examples/tiny/model", "--output_dir", tmp_path / "out"]
    assert "cuts a text in a way that llama.cpp has no name for (Split, ByteLevel)" in refused(capsys, *argv)


def test_numbers_out_of_float16s_range(folder_of, tmp_path, capsys):
    folder = folder_of("llama2")
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("v_proj.weight"))
    tensors[name][0, 0] = 1e6
    save_file(tensors, file)
    argv = ["export", "gguf", "--load_checkpoint", folder, "--output_dir", tmp_path / "out", "--dtype"]
    assert f"{name} is not finite in float16" in refused(capsys, *argv, "float16")
    assert not (tmp_path / "out").exists()


def test_without_the_package(monkeypatch, tmp_path, capsys):
    import sys

    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    line = refused(capsys, "convert", tmp_path / "x.gguf", "--output_dir", tmp_path / "back")
    assert line == "error: GGUF files need the package gguf: pip install gguf (or lora_ms[gguf])"


# --- SentencePiece


def test_merges_follow_from_scores():
    """Pieces a b c ab bc abc: abc can be made in two ways, and ab, of the better score, is made first."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    assert merges_of(vocab, [0, 0, 0, -1, -2, -3]) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
