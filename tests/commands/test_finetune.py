"""The commands from end to end, on the reference models: what a run leaves behind, and what goes on from it."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_ms.cli.main import main, run_mindformer
from lora_ms.config import load_config

RUN = """
runner_config: {batch_size: 2, max_steps: 4}
lr_schedule: {type: ConstantWarmUpLR, learning_rate: 1.e-3}
callbacks: [{type: CheckpointMonitor, save_checkpoint_steps: 2}]
model:
  model_config:
    seq_length: 16
    pet_config: {lora_dropout: 0.0, target_modules: 'q_proj|v_proj'}
"""
FILES = ["config.yaml", "data_report.json", "loss.png", "metrics.jsonl", "run.log"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "lora-ms.sha256"]
TOKENIZER = ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
MINDFORMERS_NAMES = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.": "model.norm_out.",
    ".self_attn.q_proj.": ".attention.wq.",
    ".self_attn.k_proj.": ".attention.wk.",
    ".self_attn.v_proj.": ".attention.wv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}
# The article's model section, with the sizes of the reference Llama 2
ARTICLE = """
run_mode: finetune
use_parallel: True
runner_config: {epochs: 1, batch_size: 4}
model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 16
    hidden_size: 48
    num_layers: 2
    num_heads: 4
    intermediate_size: 96
    vocab_size: 128
    compute_dtype: "float32"
    pet_config:
      pet_type: lora
      lora_rank: 16
      lora_alpha: 16
      lora_dropout: 0.05
      target_modules: '.*wq|.*wk|.*wv|.*wo'
  arch:
    type: LlamaForCausalLM
"""


def lora_ms(command: str, *words) -> None:
    assert main([command, *map(str, words)]) == 0


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def words(text_model, rows_file, tmp_path_factory) -> list[str]:
    """Arguments of a run of four steps of two rows."""
    config = tmp_path_factory.mktemp("config") / "run.yaml"
    config.write_text(RUN)
    return ["--config", config, "--load_checkpoint", text_model, "--train_dataset_dir", rows_file]


@pytest.fixture(scope="module")
def done(graph_mode, words, tmp_path_factory) -> Path:
    """The folder of that run, with the preset for small datasets, whose dropout the command line takes back."""
    out = tmp_path_factory.mktemp("runs") / "made" / "out"
    lora_ms("finetune", *words, "--preset", "small_dataset", "--pet_config.lora_dropout", "0", "--output_dir", out)
    return out


def test_outputs(done):
    assert names(done) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "data_report.json",
        "loss.png",
        "metrics.jsonl",
        "run.log",
    ]
    assert names(done / "adapter") == sorted([*ADAPTER, *TOKENIZER])
    assert names(done / "checkpoints") == ["step_2", "step_4"]
    state = ["optimizer.safetensors", "trainer_state.json"]
    assert names(done / "checkpoints" / "step_4") == sorted([*ADAPTER, *state, *TOKENIZER])
    assert (done / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_metrics(done):
    keys = "step epoch loss grad_norm learning_rate tokens label_tokens tokens_per_second step_time_s wait_share"
    assert [list(record) for record in records(done)] == [[*keys.split(), "peak_memory_mb"]] * 4
    assert [record["step"] for record in records(done)] == [1, 2, 3, 4]
    assert [record["epoch"] for record in records(done)] == [0.25, 0.5, 0.75, 1.0]


def test_preset_and_flags_reach_the_adapter(done):
    config = json.loads((done / "adapter" / "adapter_config.json").read_text())
    settings = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "peft_type")}
    assert settings == {
        "r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"
    }  # fmt: skip
    assert [record["learning_rate"] for record in records(done)] == [1e-4] * 4  # the preset's, not the YAML's
    shapes = {name: value.shape for name, value in adapter_of(done).items()}
    prefix = "base_model.model.model.layers.1.self_attn."
    assert len(shapes) == 8
    assert (shapes[f"{prefix}v_proj.lora_A.weight"], shapes[f"{prefix}v_proj.lora_B.weight"]) == ((8, 64), (32, 8))


def test_log_is_what_was_printed(done, token_rows):
    lines = (done / "run.log").read_text().splitlines()
    tokens = sum(len(row["input_ids"]) for row in token_rows)
    assert lines[0].startswith(f"data: 8 rows, {tokens} tokens, ")
    assert " into lines of " in lines.pop(1)
    assert lines[1].startswith("  padding: ")
    assert lines[2].startswith("memory: about ") and lines[2].endswith(" free")
    assert lines.pop(3).startswith(
        "few rows: 4 steps at a learning rate of 0.0001 will hardly change the model; --preset few_"
    )
    lines = [lines[0], *lines[3:]]
    assert lines[1:4] == [
        "LoRA on 4 modules: 3,584 of 73,792 parameters train (4.86%)",
        "training: 4 steps, 2 rows each, 4 per epoch",
        "1 batch shape, compiled when first used: 2 x 16 tokens",
    ]
    lines = [line for line in lines[4:] if not line.startswith(("compiling ", "loading ", "about "))]
    assert [line.split("  ")[0] for line in lines[:4]] == [f"step {step}/4" for step in (1, 2, 3, 4)]
    first, *_, last = losses(done)
    assert lines[4:6] == [
        f"loss {first:.4f} -> {last:.4f} in 4 steps",
        f"adapter: {done / 'adapter'}   loss plot: {done / 'loss.png'}",
    ]
    assert re.fullmatch(r"\d+ seconds in all, [\d.]+ [MG]B of memory at the peak", lines[6])
    merge = f"lora-ms merge --load_adapter {done / 'adapter'} --output_dir {done / 'merged'}"
    assert lines[7].startswith("next: lora-ms chat --load_checkpoint ")
    assert lines[7].endswith(f" --load_adapter {done / 'adapter'}")
    assert lines[8:] == [f"      {merge}"]


def test_config_reloads(done, words):
    given = load_config(str(words[1]), preset="small_dataset", options=["pet_config.lora_dropout=0"], flags={
        "load_checkpoint": str(words[3]), "train_dataset.data_loader.dataset_dir": str(words[5]),
        "output_dir": str(done), "run_mode": "finetune",
    })  # fmt: skip
    assert load_config(str(done / "config.yaml")) == given


def test_a_stopped_run_goes_on(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoints" / "step_4")  # as if it had stopped after step 2 or 3
    lora_ms("finetune", "--config", done / "config.yaml", "--output_dir", out, "--resume_training", "True")
    assert "training: 4 steps, 2 rows each, 4 per epoch, from step 2" in (out / "run.log").read_text().splitlines()
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4]
    assert losses(out) == losses(done)
    assert names(out / "checkpoints") == ["step_2", "step_4"]
    once, again = adapter_of(done), adapter_of(out)
    assert {name: value.tobytes() for name, value in again.items()} == {n: v.tobytes() for n, v in once.items()}


def test_an_adapter_is_trained_on(done, words, tmp_path):
    same = ["--load_adapter", done / "adapter", "--pet_config.lora_rank", "8", "--pet_config.lora_alpha", "32"]
    # At a rate of 0 the adapter is what it was
    lora_ms("finetune", *words, *same, "--learning_rate", "0", "--max_steps", "1", "--output_dir", tmp_path)
    before, after = adapter_of(done), adapter_of(tmp_path)
    assert {name: value.tobytes() for name, value in after.items()} == {n: v.tobytes() for n, v in before.items()}
    assert losses(tmp_path)[0] < losses(done)[0]  # the same two rows


def test_without_pet_config_the_model_is_trained(words, text_model, raw_tensors, tmp_path):
    from lora_ms.models.hub import load_directory

    lora_ms("finetune", *words, "--options", "pet_config=null", "--max_steps", "1", "--output_dir", tmp_path)
    assert names(tmp_path) == sorted(["model", *FILES])
    before = raw_tensors(text_model)
    after = {name: p.asnumpy() for name, p in load_directory(tmp_path / "model").parameters_and_names()}
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    # AdamW's first step moves every number with a gradient by the learning rate
    moved = np.abs(after["model.norm.weight"] - before["model.norm.weight"])
    np.testing.assert_allclose(moved, 1e-3, atol=1e-6)


def test_eval(done, text_model, rows_file, capsys):
    words = ["--load_checkpoint", text_model, "--eval_dataset_dir", rows_file, "--seq_length", "16"]
    lora_ms("eval", *words, "--load_adapter", done / "adapter", "--batch_size", "8")
    line = capsys.readouterr().out.splitlines()[-1]
    form = r"loss (\S+)  perplexity (\S+)  accuracy (\S+)%  on (\d+) label tokens"
    loss, perplexity, accuracy, tokens = re.fullmatch(form, line).groups()
    assert 0 <= float(accuracy) <= 100
    assert int(tokens) == sum(record["label_tokens"] for record in records(done))
    assert float(perplexity) == pytest.approx(np.exp(float(loss)), rel=1e-4)
    seen = sum(record["loss"] * record["label_tokens"] for record in records(done)) / int(tokens)
    assert 0 < seen - float(loss) < 0.1  # lower than while it was trained
    lora_ms("eval", *words, "--load_adapter", done / "adapter", "--batch_size", "8", "--num_samples", "2")
    first = capsys.readouterr().out.splitlines()[-1]
    assert 0 < int(re.fullmatch(form, first)[4]) < int(tokens)


def test_predict(done, text_model, capsys):
    words = ["--load_checkpoint", text_model, "--predict_data", "Who?", "Where are you?", "--max_new_tokens", "4"]
    lora_ms("predict", *words, "--load_adapter", done / "adapter")
    out = capsys.readouterr().out
    assert re.fullmatch(r"> Who\?\n.*\n> Where are you\?\n.*\n", out), out


def test_the_articles_command(reference, raw_tensors, token_rows, tmp_path):
    import mindspore as ms
    from mindspore.mindrecord import FileWriter

    weights = []
    for name, value in raw_tensors(reference / "models" / "llama2").items():
        for theirs, mindformers in MINDFORMERS_NAMES.items():
            name = name.replace(theirs, mindformers)
        weights.append({"name": name, "data": ms.Tensor(value)})
    ms.save_checkpoint(weights, str(tmp_path / "llama2_7b.ckpt"))

    writer = FileWriter(str(tmp_path / "alpaca-fastchat.mindrecord"), 1)
    writer.set_header_size(1 << 14)
    writer.set_page_size(1 << 15)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}, "tokens")
    width = 17  # MindFormers' rows have seq_length + 1 tokens
    writer.write_raw_data([
        {
            "input_ids": np.array(row["input_ids"] + [0] * (width - len(row["input_ids"])), np.int32),
            "labels": np.array(row["labels"] + [-100] * (width - len(row["labels"])), np.int32),
        }
        for row in token_rows
    ])  # fmt: skip
    writer.commit()

    (tmp_path / "lora.yaml").write_text(ARTICLE)
    command = (
        f"--config {tmp_path}/lora.yaml --train_dataset_dir {tmp_path}/alpaca-fastchat.mindrecord "
        f"--load_checkpoint {tmp_path}/llama2_7b.ckpt --auto_trans_ckpt False --use_parallel False --run_mode finetune"
    )
    assert run_mindformer([*command.split(), "--output_dir", str(tmp_path / "out")]) == 0
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2]
    assert names(tmp_path / "out") == [
        "adapter",
        "config.yaml",
        "data_report.json",
        "loss.png",
        "metrics.jsonl",
        "run.log",
    ]
    projections = {name.split(".")[-3] for name in adapter_of(tmp_path / "out")}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj"}


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_rows(done, words, root, python, python_env, tmp_path):
    common = [*map(str, words), "--preset", "small_dataset", "--pet_config.lora_dropout", "0", "--run_mode", "finetune"]
    command = ["run_mindformer.py", *common, "--batch_size", "1", "--use_parallel", "True", "--output_dir", "two"]
    env = python_env | {"PATH": f"{Path(python).parent}:{python_env['PATH']}"}
    ran = subprocess.run(
        ["bash", root / "scripts/msrun_launcher.sh", " ".join(command), "2", str(free_port()), "logs", "True", "300"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(done), rtol=1e-5)
    one, two = adapter_of(done), adapter_of(tmp_path / "two")
    assert set(two) == set(one)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert names(tmp_path / "two") == names(done)
