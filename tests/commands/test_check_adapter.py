"""``lora-ms check-adapter``: a good adapter's table, and the line that each fault and each limit of vLLM gets."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_ms.cli.main import main
from lora_ms.recipes import download
from lora_ms.runtime import host
from lora_ms.text import counted, status_lines

Q = "base_model.model.model.layers.{}.self_attn.q_proj.{}"


class Table(dict):
    """Check -> (status, text), as printed; ``status`` of the command; ``last``, the line below."""


@pytest.fixture
def adapter(reference, tmp_path):
    """A copy of the reference adapter of Qwen2, to be spoiled."""
    return shutil.copytree(reference / "adapters" / "qwen2", tmp_path / "adapter")


@pytest.fixture
def checked(capsys):
    """``checked(adapter, base=None)``: the table that is printed, read back from its columns."""

    def run(adapter, base=None) -> Table:
        words = ["check-adapter", "--load_adapter", str(adapter)]
        status = main(words + ([] if base is None else ["--load_checkpoint", str(base)]))
        *lines, last = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        table, name = Table(), None
        for line in lines:
            first, column, text = line[:16].strip(), line[16:25].strip(), line[25:]
            if first:
                assert first not in table
                name = first
                table[name] = (column, text)
            else:
                table[name] = (table[name][0], f"{table[name][1]} {text}")
        table.status, table.last = status, last
        faults = sum(status == "fault" for status, _ in table.values())
        warnings = sum(status == "warning" for status, _ in table.values())
        assert last.endswith(f": {counted(faults, 'fault')}, {counted(warnings, 'warning')}")
        assert status == (2 if faults else 0)
        return table

    return run


def change(adapter, **keys) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def change_tensors(adapter, change_one) -> None:
    """Writes the tensors again as ``change_one(key, value)`` returns them; None leaves one out."""
    file = adapter / "adapter_model.safetensors"
    changed = {key: change_one(key, value) for key, value in load_file(file).items()}
    save_file({key: np.ascontiguousarray(value) for key, value in changed.items() if value is not None}, file)


def test_a_good_adapter(graph_mode, checked, adapter, text_model, golden):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (text_model / name).is_file():
            shutil.copy(text_model / name, adapter)
    change(adapter, base_model_name_or_path="Qwen/Qwen2-0.5B")
    table = checked(adapter, text_model)
    moved, text = table.pop("logits")
    assert table == {
        "settings": ("ok", "LoRA, rank 4, alpha 8, scaling 2"),
        "keys": ("ok", "12 tensors, LoRA on 6 modules: down_proj, q_proj, v_proj"),
        "ranks": ("ok", "4 everywhere, as adapter_config.json says"),
        "B not zero": ("ok", "all 6 modules change something"),
        "base model": ("ok", "Qwen/Qwen2-0.5B, by its name on the hub"),
        "shapes": ("ok", table["shapes"][1]),
        "chat template": ("ok", "with the adapter, the same as the model's"),
        "vLLM: rank": ("ok", "4 is within the default of 16"),
        "vLLM: kind": ("ok", "nothing that vLLM would refuse or ignore"),
    }
    assert table["shapes"][1].replace(" ", "") == f"every tensor has its place in {text_model}".replace(" ", "")
    assert moved == "ok" and text.startswith("differ from the model's by up to ")
    assert table.last == f"{adapter}: 0 faults, 0 warnings"


def test_the_difference_of_the_logits_is_the_largest(graph_mode, checked, adapter, model):
    """Against both models' logits on the fixed prompt: without a tokenizer the ids 3 to 18."""
    from mindspore import Tensor

    from lora_ms.adapters.peft_format import load_adapter
    from lora_ms.models.hub import load_directory

    ids = Tensor(np.arange(3, 19, dtype=np.int32)[None])
    net = load_directory(model).set_train(False)
    before = net(ids).asnumpy()
    load_adapter(net, adapter)
    after = net.set_train(False)(ids).asnumpy()
    share = (before.argmax(-1) != after.argmax(-1)).mean()
    assert checked(adapter, model)["logits"] == (
        "ok",
        f"differ from the model's by up to {abs(after - before).max():.3g}; {share:.0%} of the likeliest tokens change",
    )


def test_an_adapter_that_does_next_to_nothing(graph_mode, checked, adapter, model):
    change_tensors(adapter, lambda key, value: value * np.float32(1e-5 if "lora_B" in key else 1))
    table = checked(adapter, model)
    assert table["logits"][0] == "warning" and table["B not zero"][0] == "ok"


def test_logits_are_left_out_where_memory_is_short(checked, adapter, model, monkeypatch):
    monkeypatch.setattr(host, "available", lambda: 0.1)
    assert checked(adapter, model)["logits"] == (
        "warning",
        "not compared: 351 KB of memory are needed, 105 KB are free",
    )


def test_the_model_is_found_by_the_adapters_own_name(graph_mode, checked, reference, adapter, monkeypatch):
    monkeypatch.chdir(reference)  # models/qwen2 is a folder here
    table = checked(adapter)
    assert table["base model"] == ("ok", "models/qwen2, which is here")
    assert table["shapes"] == ("ok", "every tensor has its place in models/qwen2")
    assert table["logits"][0] == "ok"


def test_without_the_model(checked, adapter):
    table = checked(adapter)
    assert table["shapes"] == ("warning", "not compared: give --load_checkpoint with the model's folder")
    assert "logits" not in table and table.status == 0


@pytest.mark.parametrize(
    ("named", "status", "text"),
    [
        (None, "warning", "the adapter names no model: whoever loads it must know which (base_model_name_or_path)"),
        ("/no/such/model", "warning", "/no/such/model is neither here nor a name on the hub"),
        ("org/model-7B", "ok", "org/model-7B, by its name on the hub"),
    ],
)
def test_the_models_name(checked, adapter, named, status, text):
    change(adapter, base_model_name_or_path=named)
    assert checked(adapter)["base model"] == (status, text)


@pytest.mark.parametrize(
    ("keys", "name", "text"),
    [
        ({"peft_type": "LOHA"}, "settings", "peft_type 'LOHA' is not supported; supported: LORA"),
        ({"fan_in_fan_out": True}, "settings", "not supported: fan_in_fan_out: True"),
        ({"lora_alpha": 0}, "settings", "lora_alpha must be above 0, got 0"),
        ({"rank_pattern": {"k_proj": 2}}, "patterns", "rank_pattern 'k_proj' matches none of the adapter's modules"),
        ({"r": 8}, "ranks", "model.layers.0.mlp.down_proj: rank 4 by its tensors, 8 by adapter_config.json,"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 3}},
            "ranks",
            "model.layers.1.self_attn.q_proj: rank 4 by its tensors, 3 by adapter_config.json",
        ),
    ],
)
def test_settings_that_are_wrong(checked, adapter, keys, name, text):
    change(adapter, **keys)
    status, found = checked(adapter)[name]
    assert status == "fault" and text.replace(" ", "") in found.replace(" ", "")


@pytest.mark.parametrize(
    ("change_one", "name", "status", "text"),
    [
        (lambda k, v: v * 0 if "lora_B" in k else v, "B not zero", "fault", "every B is zero: LoRA changes nothing"),
        (
            lambda k, v: v * 0 if k == Q.format(1, "lora_B.weight") else v,
            "B not zero",
            "warning",
            "1 of 6 modules change nothing: model.layers.1.self_attn.q_proj",
        ),
        (
            lambda k, v: None if k == Q.format(0, "lora_A.weight") else v,
            "ranks",
            "fault",
            "model.layers.0.self_attn.q_proj: A and B are no pair",
        ),
        (lambda k, v: v * np.float32(np.nan) if k == Q.format(0, "lora_A.weight") else v, "tensors", "fault", "NaN"),
        (lambda k, v: None, "keys", "fault", "it holds no LoRA tensor"),
    ],
)
def test_tensors_that_are_wrong(checked, adapter, change_one, name, status, text):
    change_tensors(adapter, change_one)
    found = checked(adapter)[name]
    assert found[0] == status and text in found[1]


def test_names_that_peft_does_not_read(checked, adapter):
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({key.removeprefix("base_model.model."): v for key, v in stored.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    assert checked(adapter)["keys"] == (
        "fault",
        "12 without the prefix base_model.model., which PEFT expects: model.layers.0.mlp.down_proj.lora_A.weight, "
        "model.layers.0.mlp.down_proj.lora_B.weight, model.layers.0.self_attn.q_proj.lora_A.weight and 9 more",
    )
    save_file({**stored, "weird": np.zeros(2, np.float32)}, adapter / "adapter_model.safetensors")
    assert checked(adapter)["keys"] == ("fault", "1 tensor of no known name: weird")


def test_another_models_adapter(checked, reference):
    table = checked(reference / "adapters" / "qwen3", reference / "models" / "qwen2")
    status, text = table["shapes"]
    assert status == "fault" and text.endswith("should be (64, 4) and 1 more") and "base_model." not in text
    assert "logits" not in table and table.status == 2


def test_a_file_cut_short(checked, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    status, text = checked(adapter)["tensors"]
    assert status == "fault" and "truncated" in text


def test_a_model_that_is_broken(checked, adapter, tmp_path):
    (tmp_path / "base").mkdir()
    status, text = checked(adapter, tmp_path / "base")["shapes"]
    assert status == "fault" and "config.json: no such file" in text


def test_templates(checked, adapter, text_model, monkeypatch):
    monkeypatch.setattr(host, "available", lambda: 0.0)
    assert checked(adapter)["chat template"] == ("warning", "none with the adapter: use the one of training")
    bare = checked(adapter, adapter.parent / "adapter")["chat template"]
    assert bare == ("warning", "none with the adapter, nor with the model: use the one of training")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert checked(adapter)["chat template"] == ("ok", "with the adapter")
    assert checked(adapter, text_model)["chat template"] == (
        "warning",
        "the adapter's differs from the model's: give it to vLLM by --chat-template",
    )


@pytest.mark.parametrize(
    ("variant", "name", "text"),
    [
        ("qwen2_dora", "vLLM: kind", "vLLM does not serve DoRA; merge it instead: lora-ms merge"),
        ("qwen2_adalora", "vLLM: kind", "vLLM does not serve AdaLoRA; merge it instead: lora-ms merge"),
        (
            "qwen2_modules_to_save_head",
            "vLLM: kind",
            "vLLM does not serve modules_to_save ['lm_head']; merge it instead: lora-ms merge",
        ),
        (
            "qwen2_trainable_tokens",
            "vLLM: kind",
            "vLLM does not serve trainable_token_indices; merge it instead: lora-ms merge",
        ),
        ("qwen2_bias_all", "vLLM: kind", "vLLM does not serve trained biases; merge it instead: lora-ms merge"),
        ("qwen2_lora_bias", "vLLM: kind", "vLLM does not serve trained biases; merge it instead: lora-ms merge"),
        (
            "qwen2_rank_alpha_pattern",
            "vLLM: numbers",
            "vLLM does not read rank_pattern, alpha_pattern and computes wrongly; merge it instead: lora-ms merge",
        ),
        (
            "qwen2_pissa",
            "vLLM: numbers",
            "vLLM does not read init_lora_weights pissa and computes wrongly; merge it instead: lora-ms merge",
        ),
    ],
)
def test_what_vllm_would_say(checked, reference, variant, name, text):
    table = checked(reference / "variants" / variant)
    assert table[name] == ("warning", text)
    assert table.status == 0


@pytest.mark.parametrize(
    ("rank", "status", "text"),
    [
        (16, "ok", "16 is within the default of 16"),
        (17, "warning", "17 is over the default of 16: start it with --max-lora-rank 32"),
        (64, "warning", "64 is over the default of 16: start it with --max-lora-rank 64"),
        (600, "warning", "vLLM takes ranks up to 512, not 600; merge it instead: lora-ms merge"),
    ],
)
def test_ranks_that_vllm_takes(checked, adapter, rank, status, text):
    change(adapter, r=rank)
    change_tensors(adapter, lambda key, v: np.resize(v, (rank, v.shape[1]) if "lora_A" in key else (len(v), rank)))
    table = checked(adapter)
    assert table["vLLM: rank"] == (status, text) and table["ranks"][0] == "ok"


@pytest.mark.parametrize("variant", ["llama3_lora_bias", "qwen2_lm_head_tying", "qwen3_embed_dora", "llama3_adalora"])
def test_no_kind_of_adapter_is_called_faulty(graph_mode, checked, reference, variant):
    table = checked(reference / "variants" / variant, reference / "models" / variant.split("_")[0])
    assert table.status == 0 and table["logits"][0] == "ok"


def test_folders_that_are_not_there(capsys, adapter):
    assert main(["check-adapter", "--load_adapter", "none"]) == 2
    assert main(["check-adapter", "--load_adapter", str(adapter), "--load_checkpoint", "none"]) == 2
    assert capsys.readouterr() == (
        "",
        "error: load_adapter: none does not exist; give the folder that holds adapter_config.json\n"
        "error: load_checkpoint: none is not a folder; give the model's Hugging Face directory\n",
    )


def test_no_adapter_in_the_folder(checked, tmp_path):
    table = checked(tmp_path)
    assert table == {"settings": ("fault", table["settings"][1])}
    assert table["settings"][1].endswith("no adapter here: adapter_config.json is missing")


def test_lines_are_wrapped_into_their_column():
    found = status_lines("some check", "warning", "word " * 20, name_width=16)
    assert found == [
        "some check      warning  " + ("word " * 11).strip(),
        " " * 25 + ("word " * 9).strip(),
    ]


def test_without_the_model_mindspore_is_not_imported(reference, root):
    script = "import sys; from lora_ms.cli.main import main; main(sys.argv[1:]); sys.exit('mindspore' in sys.modules)"
    words = ["check-adapter", "--load_adapter", str(reference / "adapters" / "qwen2")]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_model_is_found_in_the_hubs_cache(graph_mode, checked, adapter, model, tmp_path, monkeypatch):
    """Where transformers, say, has put it; no hub is asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(download, "fetch", lambda *args: pytest.fail("asked"))
    commit, stored = 40 * "1", tmp_path / "hub" / "models--org--model-7B"
    shutil.copytree(model, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    change(adapter, base_model_name_or_path="org/model-7B")
    table = checked(adapter)
    assert table["base model"] == ("ok", "org/model-7B, by its name on the hub")
    assert table["shapes"][0] == "ok" and table["shapes"][1].replace(" ", "").endswith(f"/snapshots/{commit}")
    assert table["logits"][0] == "ok"
    change(adapter, base_model_name_or_path="org/other-7B")
    assert checked(adapter)["shapes"][0] == "warning"
