"""The Python interface as a notebook uses it, and what a run must not lose or mix up."""

import json

import numpy as np
import pytest

import lora_ms
from lora_ms import cli
from lora_ms.train.checkpoint import list_checkpoints

PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def rows(token_rows):
    return token_rows


def test_before_and_after_in_one_notebook(graph_mode, model, reference, golden):
    adapter = reference / "adapters" / "qwen2"
    net = lora_ms.AutoModelForCausalLM.from_pretrained(model)
    before = net.generate(PROMPTS, max_new_tokens=8, eos_token_id=[])
    assert before.shape == (2, 12)  # prompts of 4, the second padded on the left
    assert before[1, :4].tolist() == [0, 0, 9, 10]
    peft = lora_ms.PeftModel.from_pretrained(net, adapter)
    after = peft.generate(PROMPTS, max_new_tokens=8, eos_token_id=[])
    fresh = lora_ms.PeftModel.from_pretrained(lora_ms.AutoModelForCausalLM.from_pretrained(model), adapter)
    np.testing.assert_array_equal(after, fresh.generate(PROMPTS, max_new_tokens=8, eos_token_id=[]))
    assert not np.array_equal(before, after)
    merged = peft.merge_and_unload()
    np.testing.assert_array_equal(merged.generate(PROMPTS, max_new_tokens=8, eos_token_id=[]), after)
    with pytest.raises(TypeError, match="top_q"):
        merged.generate(PROMPTS, top_q=1)


def test_the_articles_arguments(tmp_path):
    args = lora_ms.TrainingArguments(
        output_dir=tmp_path, learning_rate=1e-4, num_train_epochs=3.0, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, save_steps=10, logging_steps=5, use_parallel=False, auto_trans_ckpt=False,
        weight_decay=0.01, warmup_ratio=0.03, lr_scheduler_type="cosine", max_grad_norm=0.3,
        gradient_checkpointing=True, save_strategy="epoch", evaluation_strategy="no", report_to="none",
        max_seq_length=256, packing=False,
    )  # fmt: skip
    settings = args.settings()
    assert (settings.epochs, settings.save_steps, settings.recompute, settings.max_grad_norm) == (3, -1, True, 0.3)
    assert settings.layout == "bucketed" and lora_ms.TrainingArguments(tmp_path).settings().layout == "packed"
    for wrong in ({"num_train_epochs": 1.5}, {"logging_steps": 0}, {"report_to": "wandb"}):
        with pytest.raises(lora_ms.LoraMsError):
            lora_ms.TrainingArguments(output_dir=tmp_path, **wrong).settings()


def finetune(model, rows_file, out, *more) -> int:
    words = ["finetune", "--load_checkpoint", model, "--train_dataset_dir", rows_file, "--seq_length", 16]
    words += ["--output_dir", out, "--batch_size", 2, "--pet_config.lora_dropout", 0, *more]
    return cli.main([str(word) for word in words])


def test_checkpoints_of_an_earlier_run_do_not_mix_with_a_new_one(model, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    every = ("--options", "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 2, keep_checkpoint_max: 1}]")
    assert finetune(model, rows_file, out, "--max_steps", 4, *every) == 0
    assert [path.name for path in list_checkpoints(out)] == ["step_4"]
    assert finetune(model, rows_file, out, "--max_steps", 2, *every) == 0
    assert [path.name for path in list_checkpoints(out)] == ["step_2"]
    assert "removed the checkpoints of an earlier run: step_4" in capsys.readouterr().out
    # a run with other targets, or with another alpha, does not go on from it
    more = ("--resume_training", "True", "--max_steps", 4, "--lr_schedule.total_steps", 2, *every)
    for key, value in (("target_modules", "[q_proj]"), ("lora_alpha", 3)):
        assert finetune(model, rows_file, out, *more, f"--pet_config.{key}", value) == 2
        assert "made by a run with other settings: " in capsys.readouterr().err
    assert finetune(model, rows_file, out, *more) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    assert finetune(model, rows_file, out, *more) == 0
    assert "nothing left of 4 steps" in capsys.readouterr().out


def test_what_cannot_be_trained_is_said(model, rows_file, tmp_path, capsys):
    words = ["finetune", "--load_checkpoint", model, "--train_dataset_dir", rows_file, "--output_dir", tmp_path / "a"]
    words += ["--options", "pet_config=null", "--model.model_config.compute_dtype", "float16"]
    assert cli.main([str(word) for word in words]) == 2
    assert "all parameters train in float32 only" in capsys.readouterr().err
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    yaml = tmp_path / "sizes.yaml"
    yaml.write_text(json.dumps({"model": {"model_config": {**sizes, "pet_config": {"pet_type": "lora"}}}}))
    status = cli.main(["finetune", "--config", str(yaml), "--train_dataset_dir", str(rows_file)])
    assert status == 2
    assert "load_checkpoint is missing" in capsys.readouterr().err
