"""``pet_config`` from the command line to the files of a run, for more than plain LoRA."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_ms.cli.main import main
from lora_ms.config import load_config
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import read_config
from lora_ms.recipes.stored_adapter import check_adapter

RUN = """
runner_config: {batch_size: 2, epochs: 3}
lr_schedule: {type: ConstantWarmUpLR, learning_rate: 5.e-3}
callbacks: [{type: CheckpointMonitor, save_checkpoint_steps: 5}]
model: {model_config: {seq_length: 16}}
pet_config: {lora_dropout: 0.0, target_modules: 'q_proj|v_proj|down_proj'}
"""
EMBEDDING = "base_model.model.model.embed_tokens"
ADALORA = ("pet_type=adalora", "init_rank=4", "target_rank=2", "delta_t=2")


@pytest.fixture(scope="module")
def words(text_model, rows_file, tmp_path_factory) -> list[str]:
    """Arguments of a run of twelve steps of two rows."""
    config = tmp_path_factory.mktemp("config") / "run.yaml"
    config.write_text(RUN)
    return ["--config", str(config), "--load_checkpoint", str(text_model), "--train_dataset_dir", str(rows_file)]


def finetune(words, out: Path, *keys: str, status: int = 0) -> Path:
    """One run; ``keys`` are pet_config's."""
    flags = [part for key in keys for part in (f"--pet_config.{key.partition('=')[0]}", key.partition("=")[2])]
    assert main(["finetune", *words, *flags, "--output_dir", str(out)]) == status
    return out


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adalora(words, tmp_path_factory, graph_mode) -> Path:
    return finetune(words, tmp_path_factory.mktemp("adalora"), *ADALORA)


def test_an_adalora_run_ends_at_its_budget(adalora):
    lines = (adalora / "run.log").read_text().splitlines()
    assert (
        "AdaLoRA: rank 4 falls to 2 on average from step 3 on (tinit 1) to step 9 (tfinal 4) of 12, every 2 steps"
        in lines
    )
    assert any(line.startswith("ranks: ") and "2.00 on average, 12 in all" in line for line in lines)
    pattern = adapter_config(adalora / "adapter")["rank_pattern"]
    assert len(pattern) == 6 and sum(map(sum, pattern.values())) == 12
    stored = tensors(adalora / "adapter")
    for name, mask in pattern.items():
        assert stored[f"base_model.model.{name}"].shape == (sum(mask), 1)
    full = tensors(adalora / "checkpoints" / "step_5")
    assert {value.shape[0] for name, value in full.items() if name.endswith(("lora_A", "lora_E"))} == {4}
    assert adapter_config(adalora / "checkpoints" / "step_5")["rank_pattern"] is None


def test_plain_lora_beside_it_computes_the_same(adalora, text_model, golden):
    from mindspore import Tensor

    from lora_ms.adapters.peft_format import load_adapter
    from lora_ms.models.hub import load_directory

    input_ids, found = Tensor(golden("adapter_logits_qwen2")["input_ids"]), []
    for folder in ("adapter", "adapter_lora"):
        model = load_directory(text_model)
        load_adapter(model, adalora / folder)
        found.append(model.set_train(False)(input_ids).asnumpy())
    np.testing.assert_allclose(*found, rtol=0, atol=2e-5)
    assert adapter_config(adalora / "adapter_lora")["peft_type"] == "LORA"
    assert (adalora / "adapter_lora" / "tokenizer.json").is_file()
    assert np.abs(load_directory(text_model)(input_ids).asnumpy() - found[0]).max() > 1e-3


@pytest.mark.parametrize("step", [5, 10])
def test_an_adalora_run_goes_on_as_if_it_had_not_stopped(adalora, words, tmp_path, step):
    """From before the last cut, where cut ranks may come back, and from after it."""
    out = tmp_path / "out"
    shutil.copytree(adalora, out)
    for gone in (out / "adapter", out / "adapter_lora", *({5: [out / "checkpoints" / "step_10"]}.get(step, []))):
        shutil.rmtree(gone)
    finetune([*words, "--resume_training", "True"], out, *ADALORA)
    assert losses(out) == losses(adalora)
    for folder in ("adapter", "adapter_lora"):
        once, again = tensors(adalora / folder), tensors(out / folder)
        assert {name: v.tobytes() for name, v in again.items()} == {name: v.tobytes() for name, v in once.items()}
        assert adapter_config(out / folder) == adapter_config(adalora / folder)


def test_another_schedule_does_not_resume(adalora, words, tmp_path, capsys):
    shutil.copytree(adalora, tmp_path / "out")
    finetune([*words, "--resume_training", "True"], tmp_path / "out", *ADALORA, "tfinal=6", status=2)
    assert "made by a run with other settings: tfinal: 4 there, 6 here" in capsys.readouterr().err


def test_ranks_once_shared_out_stay(adalora, words, tmp_path):
    out = finetune([*words, "--load_adapter", str(adalora / "adapter")], tmp_path, "pet_type=adalora", "init_rank=4")
    assert "AdaLoRA: the ranks stay as they were shared out before" in (out / "run.log").read_text().splitlines()
    once, again = tensors(adalora / "adapter"), tensors(out / "adapter")
    assert {name: value.shape for name, value in again.items()} == {name: value.shape for name, value in once.items()}
    assert losses(out)[-1] < losses(adalora)[0]


def test_layer_groups_and_dora_reach_the_adapter(words, tmp_path):
    groups = "layer_groups=[{layers: 0, lora_rank: 6}, {layers: 1, lora_rank: 2, target_modules: [q_proj]}]"
    out = finetune([*words, "--max_steps", "1"], tmp_path, groups, "use_dora=True", "lora_alpha=8", "lora_rank=4")
    shapes = {
        name.removeprefix("base_model.model.model.layers."): value.shape
        for name, value in tensors(out / "adapter").items()
    }
    assert {name: shape for name, shape in shapes.items() if "lora_A" in name} == {
        "0.self_attn.q_proj.lora_A.weight": (6, 64),
        "0.self_attn.v_proj.lora_A.weight": (6, 64),
        "0.mlp.down_proj.lora_A.weight": (6, 96),
        "1.self_attn.q_proj.lora_A.weight": (2, 64),
    }
    assert shapes["1.self_attn.q_proj.lora_magnitude_vector"] == (64,)
    config = adapter_config(out / "adapter")
    assert (config["use_dora"], config["r"], config["lora_alpha"]) == (True, 6, 12)  # the ratio of 8 to 4 throughout
    assert config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 2}
    assert config["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 4}


def test_loraplus_and_noise_reach_the_run(words, tmp_path):
    plain, plus, noisy = (
        finetune([*words, "--max_steps", "2"], tmp_path / name, *keys)
        for name, keys in (("0", ()), ("1", ("loraplus_lr_ratio=16",)), ("2", ("neftune_noise_alpha=5",)))
    )
    moved = {
        folder: {f: max(np.abs(v).max() for n, v in tensors(folder / "adapter").items() if f in n) for f in ("lora_B",)}
        for folder in (plain, plus)
    }
    assert moved[plus]["lora_B"] > 8 * moved[plain]["lora_B"]
    assert losses(plus)[0] == losses(plain)[0] and losses(plus)[1] != losses(plain)[1]
    assert abs(losses(noisy)[0] - losses(plain)[0]) > 1e-4
    assert tensors(noisy / "adapter").keys() == tensors(plain / "adapter").keys()


@pytest.mark.parametrize(
    ("adapter", "keys", "message"),
    [
        ("adapters/qwen2", ["use_dora=True"], "use_dora: True in pet_config, False in the adapter"),
        ("adapters/qwen2", ["bias=all"], "bias: all in pet_config, none in the adapter"),
        ("adapters/qwen2", ["pet_type=adalora"], "pet_type: adalora in pet_config, lora in the adapter"),
        (
            "adapters/qwen2",
            ["lora_rank=4", "rank_pattern={v_proj: 2}"],
            "lora_rank of model.layers.0.self_attn.v_proj: 2 in pet_config, 4 in the adapter",
        ),
        (
            "adapters/qwen2",
            ["modules_to_save=[lm_head]"],
            "modules_to_save: ['lm_head'] in pet_config, [] in the adapter",
        ),
        (
            "variants/qwen2_adalora",
            ["init_rank=6", "pet_type=adalora"],
            "lora_rank: 6 in pet_config, 4 in the adapter",
        ),
        (
            "variants/qwen2_adalora",
            ["beta1=0.5", "init_rank=4", "target_rank=2", "pet_type=adalora"],
            "beta1: 0.5 in pet_config, 0.85 in the adapter, whose ranks are shared out",
        ),
    ],
)
def test_an_adapter_that_pet_config_contradicts(words, reference, tmp_path, capsys, adapter, keys, message):
    bare = re.sub(r", target_modules: '[^']*'", "", RUN)
    (tmp_path / "run.yaml").write_text(bare)
    given = ["--config", str(tmp_path / "run.yaml"), *words[2:], "--load_adapter", str(reference / adapter)]
    finetune(given, tmp_path / "out", *keys, status=2)
    assert f"load_adapter {reference / adapter}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("qwen2_prompt", {"pet_type": "prompt"}),
        ("qwen2_ptuning", {"pet_type": "ptuning"}),
        ("qwen2_prefix", {"pet_type": "prefix"}),
        ("qwen2_dora", {"use_dora": True}),
        ("qwen2_modules_to_save_head", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_an_adapter_that_pet_config_names_goes_on(reference, name, keys):
    folder = reference / "variants" / name
    config = load_config(None, flags={"load_adapter": str(folder), "model.model_config.pet_config": keys})
    check_adapter(config, read_config(reference / "models" / "qwen2")[0])


def test_a_misspelt_module_beside_an_adapter_to_go_on_with(reference):
    keys = {"modules_to_save": ["lm_hed"]}
    folder = str(reference / "adapters" / "qwen2")
    config = load_config(None, flags={"load_adapter": folder, "model.model_config.pet_config": keys})
    with pytest.raises(LoraMsError, match="modules_to_save lm_hed: the model has no such module; the nearest: lm_head"):
        check_adapter(config, read_config(reference / "models" / "qwen2")[0])


def test_an_impossible_adapter_is_refused_before_the_model_is_read(words, tmp_path, capsys):
    finetune(words, tmp_path / "out", "init_rank=4", "target_rank=6", "pet_type=adalora", status=2)
    assert "target_rank must be from 1 to lora_rank 4, got 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_starts_by_eva_resumes(words, tmp_path):
    """Of ranks that the rows decide; the file is plain LoRA, and rows of some tokens beside it."""
    keys = ("init_lora_weights=eva", "lora_rank=2", "lora_alpha=2", "eva_rho=2", "trainable_token_indices=[5,9]")
    whole = finetune(words, tmp_path / "whole", *keys)
    assert "the adapter starts from what the layers take at label tokens of 8 rows" in (whole / "run.log").read_text()
    first = load_file(whole / "checkpoints" / "step_5" / "adapter_model.safetensors")
    config = adapter_config(whole / "adapter")
    assert config["trainable_token_indices"] == [5, 9]
    assert tensors(whole / "adapter")[f"{EMBEDDING}.token_adapter.trainable_tokens_delta"].shape == (2, 64)
    assert config["init_lora_weights"] is True and {len(v) for k, v in first.items() if "lora_A" in k} != {2}
    shutil.copytree(whole, tmp_path / "resumed")
    finetune([*words, "--resume_training", "step_5"], tmp_path / "resumed", *keys)
    assert losses(tmp_path / "resumed") == losses(whole)
    for name, value in tensors(whole / "adapter").items():
        np.testing.assert_array_equal(tensors(tmp_path / "resumed" / "adapter")[name], value, err_msg=name)


def test_a_run_that_starts_in_the_weights_resumes(words, tmp_path):
    """The file is plain LoRA of twice the rank."""
    keys = ("init_lora_weights=lora_ga", "lora_rank=2", "lora_alpha=2")
    short = [*words, "--max_steps", "6"]
    whole = finetune(short, tmp_path / "whole", *keys)
    assert "the adapter starts from " in (whole / "run.log").read_text()
    config = adapter_config(whole / "adapter")
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 4, 4)
    shutil.copytree(whole, tmp_path / "resumed")
    finetune([*short, "--resume_training", "step_5"], tmp_path / "resumed", *keys)
    assert losses(tmp_path / "resumed") == losses(whole)
    for name, value in tensors(whole / "adapter").items():
        np.testing.assert_array_equal(tensors(tmp_path / "resumed" / "adapter")[name], value, err_msg=name)


def test_a_run_with_a_prefix(words, rows_file, tmp_path, capsys):
    bare = re.sub(r"lora_dropout: 0.0, target_modules: '[^']*'", "pet_type: prefix, num_virtual_tokens: 3", RUN)
    (tmp_path / "run.yaml").write_text(bare)
    out = finetune(["--config", str(tmp_path / "run.yaml"), *words[2:]], tmp_path / "out")
    said = capsys.readouterr().out
    assert "prefix tuning on 1 modules: " in said and "lora-ms chat" in said and "lora-ms merge" not in said
    found = losses(out)
    assert np.mean(found[-4:]) < np.mean(found[:4])
    tokens = [json.loads(line)["tokens"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line)["input_ids"] for line in rows_file.read_text().splitlines()]
    assert sum(tokens[:4]) == sum(map(len, rows))  # of an epoch; virtual tokens are not counted
    assert list(tensors(out / "adapter")) == ["prompt_embeddings"]
    assert adapter_config(out / "adapter")["peft_type"] == "PREFIX_TUNING"
