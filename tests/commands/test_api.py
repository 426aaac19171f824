"""The Python interface as a notebook uses it, and what a run must not lose or mix up."""

import json

import numpy as np
import pytest

import lora_ms
from lora_ms.cli.main import main
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
    for wrong in ({"num_train_epochs": 1.5}, {"logging_steps": 0}, {"report_to": "comet"}):
        with pytest.raises(lora_ms.LoraMsError):
            lora_ms.TrainingArguments(output_dir=tmp_path, **wrong).settings()


def finetune(model, rows_file, out, *more) -> int:
    words = ["finetune", "--load_checkpoint", model, "--train_dataset_dir", rows_file, "--seq_length", 16]
    words += ["--output_dir", out, "--batch_size", 2, "--pet_config.lora_dropout", 0, *more]
    return main([str(word) for word in words])


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
    assert main([str(word) for word in words]) == 2
    assert "all parameters train in float32 only" in capsys.readouterr().err
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    yaml = tmp_path / "sizes.yaml"
    yaml.write_text(json.dumps({"model": {"model_config": {**sizes, "pet_config": {"pet_type": "lora"}}}}))
    status = main(["finetune", "--config", str(yaml), "--train_dataset_dir", str(rows_file)])
    assert status == 2
    assert "load_checkpoint is missing" in capsys.readouterr().err


class Witness(lora_ms.TrainerCallback):
    """Keeps what it is told, and stops the run after two steps."""

    def __init__(self):
        self.told = []

    def on_train_begin(self, state):
        self.told.append(("begin", state.total_steps))

    def on_step_end(self, state, record):
        self.told.append(("step", record.step, record.loss > 0))
        if record.step == 2:
            state.stop("seen enough")

    def on_evaluate(self, state, evaluation):
        self.told.append(("evaluate", evaluation.step, evaluation.eval_label_tokens))

    def on_save(self, state, path):
        self.told.append(("save", path.name))

    def on_train_end(self, state):
        self.told.append(("end", state.step))


def test_a_callback_sees_the_run_and_stops_it(graph_mode, model, rows, tmp_path):
    """Eight rows in steps of two, five epochs; the last evaluation follows the step that was stopped at."""
    net = lora_ms.AutoModelForCausalLM.from_pretrained(model)
    peft = lora_ms.get_peft_model(net, lora_ms.LoraConfig(lora_rank=2, lora_dropout=0.0, target_modules=["q_proj"]))
    args = lora_ms.TrainingArguments(
        tmp_path, max_steps=20, per_device_train_batch_size=2, max_seq_length=16, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4, report_to=["tensorboard"], save_steps=2, logging_steps=5,
    )  # fmt: skip
    witness, held_out = Witness(), rows[:3]
    outcome = lora_ms.Trainer(peft, args, rows, eval_dataset=held_out, callbacks=[witness]).train()
    labels = sum(label != -100 for row in held_out for label in row["labels"][1:])
    assert witness.told == [
        ("begin", 20), ("step", 1, True), ("evaluate", 1, labels), ("step", 2, True), ("evaluate", 2, labels),
        ("save", "step_2"), ("end", 2),
    ]  # fmt: skip
    assert (outcome.steps, outcome.stopped, outcome.reason) == (2, False, "seen enough")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (0, 0, 0, ())),
        ({"eval_strategy": "steps", "logging_steps": 7}, (7, 0, 0, ())),
        ({"evaluation_strategy": "steps", "eval_steps": 3, "early_stopping_patience": 2}, (3, 0, 2, ())),
        ({"evaluation_strategy": "epoch", "eval_strategy": "epoch"}, (0, 1, 0, ())),
        ({"report_to": "tensorboard"}, (0, 0, 0, ("tensorboard",))),
        ({"report_to": ["none"]}, (0, 0, 0, ())),
    ],
)
def test_arguments_of_evaluation(given, found, tmp_path):
    s = lora_ms.TrainingArguments(tmp_path, **given).settings()
    assert (s.eval_steps, s.eval_epochs, s.patience, s.report_to) == found


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"eval_strategy": "daily"}, "eval_strategy 'daily' is not supported; supported: no, steps, epoch"),
        ({"eval_strategy": "steps", "evaluation_strategy": "epoch"}, "eval_strategy and evaluation_strategy differ"),
        ({"early_stopping_patience": 1}, "early_stopping_patience needs evaluations: set eval_strategy"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps expects a whole number from 1 on, got 0"),
        (
            {"report_to": ["tensorboard", "comet"]},
            "report_to 'comet' is not supported; supported: none, tensorboard, wandb",
        ),
    ],
)
def test_arguments_that_contradict(given, reason, tmp_path):
    with pytest.raises(lora_ms.LoraMsError, match=f"^{reason}"):
        lora_ms.TrainingArguments(tmp_path, **given).settings()


def test_what_a_trainer_does_not_take(tmp_path):
    args = lora_ms.TrainingArguments(tmp_path, eval_strategy="epoch")
    with pytest.raises(lora_ms.LoraMsError, match="eval_dataset is not: give Trainer the rows to evaluate"):
        lora_ms.Trainer(None, args, [])
    with pytest.raises(lora_ms.LoraMsError, match="callbacks must be objects of a subclass of lora_ms.TrainerCallback"):
        lora_ms.Trainer(None, lora_ms.TrainingArguments(tmp_path), [], callbacks=[Witness])
