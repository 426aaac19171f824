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
