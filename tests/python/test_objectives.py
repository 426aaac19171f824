"""``TrainingArguments(objectives=…)``: the terms of a YAML, from Python."""

import json

import numpy as np
import pytest

import lora_ms

CHOICES = [
    {"instruction": f"{one} or {other}?", "chosen": f"I prefer {one}.", "rejected": f"I prefer {other}."}
    for one, other in (("Cake", "winter"), ("Tea", "rain"), ("Bread", "snow"), ("Milk", "wind"))
]
TOKENS = [{"input_ids": list(range(first, first + 8))} for first in (5, 30, 55, 80)]


@pytest.fixture(scope="module")
def train(graph_mode, tmp_path_factory):
    """``train(objectives, rows, net, tokenizer, **of Trainer)``: four steps of four rows -> trainer, records."""

    def run(objectives, rows, net, tokenizer=None, **more):
        peft = lora_ms.get_peft_model(net, lora_ms.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        folder = tmp_path_factory.mktemp("run")
        args = lora_ms.TrainingArguments(
            folder, 5e-3, per_device_train_batch_size=4, max_steps=4, max_seq_length=64, objectives=objectives,
            eval_strategy="steps" if "eval_dataset" in more else "no", eval_steps=2,
        )  # fmt: skip
        trainer = lora_ms.Trainer(peft, args, rows, tokenizer, **more)
        trainer.train()
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return trainer, records

    return run


def test_preferences_are_learnt_and_evaluated(train, net, tokenizer):
    trainer, records = train([{"type": "dpo", "beta": 0.2}], CHOICES, net, tokenizer, eval_dataset=CHOICES[:2])
    steps = [one for one in records if "loss" in one]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the reference is the model without the adapter
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["rewards/margins"] > 0
    evaluated = [one for one in records if "eval_loss" in one]
    assert [one["step"] for one in evaluated] == [2, 4] and "eval_perplexity" not in evaluated[0]
    assert trainer.state.best_metric == evaluated[-1]["eval_loss"] < np.log(2)
    assert evaluated[-1]["eval_rewards/accuracies"] == 1.0


def test_terms_beside_the_cross_entropy(train, reference):
    net = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
    terms = [{"type": "l2_anchor", "weight": 0.5}, {"type": "kl_anchor"}]
    _, records = train(terms, TOKENS[:3], net, general_dataset=TOKENS[3:])
    first, last = records[0], records[-1]
    assert first["l2_anchor"] == 0 and first["kl_anchor"] == pytest.approx(0, abs=1e-6)
    assert last["l2_anchor"] > 0 and last["kl_anchor"] > 0
    assert last["loss"] == pytest.approx(last["cross_entropy"] + last["l2_anchor"] + last["kl_anchor"], rel=1e-5)
    assert first["label_tokens"] == last["label_tokens"]  # all four rows in every step


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        ([{"type": "dp"}], r"objectives.0.type expects one of ewc, .* got 'dp' \(nearest: dpo\)"),
        ([{"type": "dpo", "beat": 1}], "unknown key objectives.0.beat; did you mean objectives.0.beta"),
        ([{"type": "dpo"}, {"type": "kto"}], "dpo and kto exclude each other"),
    ],
)
def test_objectives_that_are_wrong(objectives, said):
    with pytest.raises(lora_ms.LoraMsError, match=said):
        lora_ms.TrainingArguments("out", objectives=objectives).settings()


class Stop(lora_ms.TrainerCallback):
    def on_step_end(self, state, record):
        if record.step == 2:
            state.stop("enough")


@pytest.mark.parametrize(("objective", "with_adapter"), [("l2_anchor", True), ("kl_anchor", True), ("dpo", False)])
def test_what_the_run_began_with_is_not_taken_from_a_trained_model(
    graph_mode, tiny, tokenizer, tmp_path, objective, with_adapter
):
    net = lora_ms.AutoModelForCausalLM.from_pretrained(tiny)
    if with_adapter:
        net = lora_ms.get_peft_model(net, lora_ms.LoraConfig(r=2, target_modules=["q_proj"]))
    args = lora_ms.TrainingArguments(
        tmp_path, 1e-3, per_device_train_batch_size=2, max_steps=4, save_steps=1, objectives=[{"type": objective}]
    )
    trainer = lora_ms.Trainer(net, args, CHOICES if objective == "dpo" else TOKENS, tokenizer, callbacks=[Stop()])
    trainer.train()
    another = lora_ms.Trainer(net, args, trainer.train_dataset, tokenizer)
    for one in (trainer, another):
        with pytest.raises(lora_ms.LoraMsError, match=f"{objective} compares with the model before training, which is"):
            one.train(resume_from_checkpoint=True)


def test_rows_that_are_compared_are_not_halved_for_memory(graph_mode, tiny, tokenizer, tmp_path, monkeypatch):
    """KTO's z is the mean over a micro-batch: another size is another loss, here and where the run is resumed."""
    from lora_ms.recipes import estimate
    from lora_ms.runtime import host

    monkeypatch.setattr(host, "available", lambda: estimate.memory_estimate.LIBRARIES + 60.0)
    rows = [{"prompt": row["instruction"], "completion": row["chosen"], "label": True} for row in CHOICES]

    def run(**given):
        net = lora_ms.AutoModelForCausalLM.from_pretrained(tiny)
        peft = lora_ms.get_peft_model(net, lora_ms.LoraConfig(r=2, target_modules=["q_proj"]))
        args = lora_ms.TrainingArguments(
            tmp_path, 1e-3, max_steps=2, save_steps=1, objectives=[{"type": "kto"}], **given
        )
        trainer = lora_ms.Trainer(peft, args, rows, tokenizer)
        trainer.train()
        return trainer

    assert run().state.global_step == 2
    with pytest.raises(lora_ms.LoraMsError, match="rows_compared"):
        run(per_device_train_batch_size=4, gradient_accumulation_steps=2, resume_from_checkpoint=True)
