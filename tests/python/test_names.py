"""Names of transformers and PEFT: what they do here, those without an effect, and unknown ones."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

import lora_ms
from lora_ms.python.rows import prepared
from lora_ms.recipes import estimate
from lora_ms.runtime import host

Refused = lora_ms.LoraMsError


def test_pefts_names_of_an_adapter():
    by_peft = lora_ms.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="none")
    assert by_peft == lora_ms.LoraConfig(lora_rank=4, lora_alpha=8, target_modules=["q_proj"])
    assert by_peft == lora_ms.LoraConfig(4, 8, target_modules=["q_proj"], task_type=lora_ms.TaskType.CAUSAL_LM)
    assert replace(by_peft, lora_dropout=0.1).lora_rank == 4
    assert repr(by_peft) == "LoraConfig(lora_rank=4, lora_alpha=8, target_modules=('q_proj',))"
    ranks = lora_ms.AdaLoraConfig(init_r=12, target_r=4, r=8)
    assert (ranks.lora_rank, ranks.target_rank) == (12, 4)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rnk": 4}, "unknown argument rnk; the nearest is r"),
        ({"target_module": ["q_proj"]}, "unknown argument target_module; the nearest is target_modules"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported: CAUSAL_LM is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported: leave it out"),
        ({"r": 4, "lora_rank": 8}, "lora_rank is given as 4 and as 8: give one of them"),
    ],
)
def test_names_of_an_adapter_that_are_refused(given, reason):
    with pytest.raises(Refused, match=reason):
        lora_ms.LoraConfig(**given)


def test_names_without_an_effect_are_said_once_in_a_line(capsys):
    lora_ms.LoraConfig(r=4, inference_mode=False, base_model_name_or_path="x", revision="main")
    args = lora_ms.TrainingArguments("out", bf16=True, fp16=False, remove_unused_columns=True, dataloader_num_workers=2)
    assert capsys.readouterr().out.splitlines() == [
        "no effect here: base_model_name_or_path, revision of LoraConfig",
        "no effect here: bf16, dataloader_num_workers of TrainingArguments",
    ]
    assert repr(args) == "TrainingArguments(output_dir='out')"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"learning_rat": 1}, "unknown argument learning_rat; the nearest is learning_rate"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor not supported"),
        ({"optim": "adafactor"}, "optim 'adafactor' is not supported; supported: adamw_torch"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model 'f1' is not supported; supported: loss"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size expects a whole number from 1 on, got 0"),
        ({"save_steps": 0.25}, "save_steps expects a whole number, got 0.25"),
        ({"warmup_steps": 2.5}, "warmup_steps expects a whole number, or a share below 1, got 2.5"),
    ],
)
def test_arguments_that_are_refused(given, reason):
    with pytest.raises(Refused, match=reason):
        lora_ms.TrainingArguments("out", **given).settings()


def test_what_other_names_become():
    args = lora_ms.TrainingArguments(
        lr_scheduler_type="constant_with_warmup", optim="paged_adamw_8bit", logging_dir="logs", run_name="mine",
        neftune_noise_alpha=None, max_grad_norm=0, resume_from_checkpoint=None, save_strategy="best", report_to=None,
    )  # fmt: skip
    s = args.settings()
    assert (s.lr_kind, s.logging_dir, s.run_name, s.neftune_noise_alpha) == ("constant", "logs", "mine", 0.0)
    assert (s.max_grad_norm, s.resume, s.save_steps, s.report_to, s.batch_size) == (None, False, 0, (), 8)
    assert (s.eight_bits, s.paged) == (True, True)
    for limit in (None, 0):
        assert lora_ms.TrainingArguments(save_total_limit=limit).settings().keep_checkpoint_max == sys.maxsize
    assert str(s.output_dir) == "trainer_output"


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        # transformers.get_scheduler: the first three of 20 steps, as shares of the highest rate
        ({"lr_scheduler_type": "constant", "warmup_steps": 10}, [1, 1, 1]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.03}, [0, 1, 1]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, [0, 0.5, 1]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0, 0.5, 1]),
    ],
)
def test_the_warmup_is_that_of_transformers(graph_mode, reference, tmp_path, given, rates):
    net = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
    peft = lora_ms.get_peft_model(net, lora_ms.LoraConfig(r=2, target_modules=["q_proj"]))
    seen = []

    class Rates(lora_ms.TrainerCallback):
        def on_step_end(self, state, record):
            seen.append(record.learning_rate)
            if len(seen) == 3:
                state.stop("enough")

    args = lora_ms.TrainingArguments(tmp_path, 1e-3, max_steps=20, per_device_train_batch_size=1, **given)
    lora_ms.Trainer(peft, args, [{"input_ids": list(range(5, 17))}], callbacks=[Rates()]).train()
    assert seen == pytest.approx([1e-3 * rate for rate in rates], abs=1e-9)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"data_collator": print}, "data_collator is not supported: rows are padded and packed here"),
        ({"optimizers": (1, 2)}, "optimizers is not supported"),
        ({"train_data": []}, "unknown argument train_data; the nearest is train_dataset"),
    ],
)
def test_arguments_of_a_trainer_that_are_refused(given, reason, tmp_path):
    with pytest.raises(Refused, match=reason):
        lora_ms.Trainer(None, lora_ms.TrainingArguments(tmp_path), [], **given)


def test_types_by_all_their_names(tiny, capsys):
    class Torch:  # as torch shows its own
        def __str__(self) -> str:
            return "torch.float16"

    load = lora_ms.AutoModelForCausalLM.from_pretrained
    for name in ("float16", Torch()):
        assert "float16" in repr(load(tiny, torch_dtype=name))
    assert str(load(tiny, dtype="auto", device_map="auto").dtype) == "Float32"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dtype auto is float32 here")
    assert lines[1] == "no effect here: device_map of from_pretrained"
    with pytest.raises(Refused, match="dtype int8 is not supported for weights"):
        load(tiny, dtype="int8")
    with pytest.raises(Refused, match="unknown argument device_mapp; the nearest is device_map"):
        load(tiny, device_mapp="auto")


def test_settings_of_four_bits(tiny, capsys):
    asked = lora_ms.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    net = lora_ms.AutoModelForCausalLM.from_pretrained(tiny, quantization_config=asked)
    assert sum(parameter.size for parameter in net.get_parameters()) < 2_000_000
    assert "bnb_4bit_compute_dtype bfloat16 has no effect" in capsys.readouterr().out
    with pytest.raises(Refused, match="bnb_4bit_quant_type 'fp4' .transformers' default. is not supported: nf4 is"):
        lora_ms.BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(Refused, match="the nearest is load_in_8bit"):
        lora_ms.BitsAndBytesConfig(load_in_4bit=True, load_in_8bits=True)


def test_a_tokenizers_tensors_go_into_the_model(net, tokenizer, tmp_path):
    texts = ["Who are you?", "你"]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(net.device)
    found = net.generate(**inputs, max_new_tokens=3, eos_token_id=[])
    alone = [net.generate(**tokenizer([text]), max_new_tokens=3, eos_token_id=[])[0] for text in texts]
    assert [row[-3:].tolist() for row in found] == [row[-3:].tolist() for row in alone]
    tokenizer.save_pretrained(tmp_path)
    assert '"_Arrays' not in (tmp_path / "tokenizer_config.json").read_text()
    with pytest.raises(Refused, match="num_beams above 1 is not supported"):
        net.generate(**inputs, num_beams=2)


def test_rows_of_a_dataset_as_a_table(capsys):
    """Padding goes by the mask, on either side; without labels all is learnt; other columns are left out."""
    given = [
        {"text": "a", "input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "labels": [-100, -100, 6]},
        {"text": "b", "input_ids": [7, 8, 0], "attention_mask": [1, 1, 0], "labels": [7, 8, -100]},
    ]
    kept = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    assert prepared(given) == prepared(Dataset.from_list(given)) == kept
    assert prepared(Dataset.from_list(given).with_format("numpy")) == kept
    assert prepared([{name: tuple(value) for name, value in row.items()} for row in given]) == kept
    assert capsys.readouterr().out == ""
    assert prepared(Dataset.from_list(given).remove_columns("labels"))[0] == {"input_ids": [5, 6], "labels": [5, 6]}
    assert capsys.readouterr().out == "rows without labels: every token is learnt\n"
    rows = [{"instruction": "a", "output": "b"}]
    assert prepared(rows) is rows and prepared("rows.jsonl") == "rows.jsonl"
    with pytest.raises(Refused, match="the dataset has parts: give one of train, test"):
        prepared({"train": rows, "test": rows})


def test_a_trainer_as_transformers_has_it(graph_mode, reference, tokenizer, tmp_path, capsys, monkeypatch):
    """The default batch is 8 rows a step: four here, one at a time, as little memory is free."""
    monkeypatch.setattr(host, "available", lambda: estimate.memory_estimate.LIBRARIES + 150.0)
    net = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
    tokens = [{"input_ids": list(range(first, first + 12))} for first in (5, 30, 55, 80)]
    peft = lora_ms.get_peft_model(net, lora_ms.LoraConfig(r=2, target_modules=["q_proj"]))
    args = lora_ms.TrainingArguments(
        str(tmp_path), num_train_epochs=4, learning_rate=1e-2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, logging_steps=2, max_seq_length=64,
    )  # fmt: skip
    trainer = lora_ms.Trainer(
        model=peft, args=args, train_dataset=Dataset.from_list(tokens), eval_dataset=Dataset.from_list(tokens[:2]),
        processing_class=tokenizer, compute_metrics=len,
    )  # fmt: skip
    output = trainer.train()
    text = capsys.readouterr().out
    assert "no effect here: compute_metrics of Trainer" in text
    assert "the 8 rows of a step are computed " in text
    assert "the model has the weights of step 4, the best evaluation" in text
    assert (output.global_step, output.metrics["epoch"]) == (4, 4.0) and output.training_loss > 0
    assert repr(output).startswith("TrainOutput(global_step=4, training_loss=") and len(repr(output)) < 120
    state = trainer.state
    assert (state.global_step, state.max_steps, state.best_global_step) == (4, 4, 4)
    assert [record["step"] for record in state.log_history if "loss" in record] == [2, 4]
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(state.best_metric, rel=1e-6) and found["eval_label_tokens"] > 0
    with peft.disable_adapter():
        base = trainer.evaluate()["eval_loss"]
    assert base > found["eval_loss"] == trainer.evaluate()["eval_loss"]
    trainer.save_model(tmp_path / "saved")
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "saved").iterdir()}
    assert repr(trainer).startswith("Trainer(PeftModel(ModelForCausalLM(") and len(repr(trainer)) < 600
    logits = peft(np.array([tokens[0]["input_ids"]]))
    assert logits.shape == (1, 12, 128)


def test_a_saved_model_is_known_to_the_next_run(graph_mode, reference, tokenizer, tmp_path):
    rows = [{"input_ids": list(range(first, first + 12))} for first in (5, 30)]
    args = lora_ms.TrainingArguments(tmp_path, max_steps=1, per_device_train_batch_size=1)
    for _ in range(2):
        net = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
        peft = lora_ms.get_peft_model(net, lora_ms.LoraConfig(r=2, target_modules=["q_proj"]))
        trainer = lora_ms.Trainer(peft, args, rows, tokenizer)
        trainer.train()
        trainer.save_model()
        assert (tmp_path / "adapter" / "tokenizer.json").is_file()
