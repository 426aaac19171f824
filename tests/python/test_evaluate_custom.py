"""``lora_ms.evaluate_custom``: judges of ours, and a function."""

import json

import pytest

import lora_ms
from lora_ms.python.evaluation import JUDGES

MODEL = "examples/tiny/model"
QUESTIONS = ["Count from 15 to 19.", "Which sound does a frog make?", "Who are you?"]


@pytest.fixture(scope="module")
def model(graph_mode):
    return lora_ms.AutoModelForCausalLM.from_pretrained(MODEL)


def write(path, references):
    rows = [{"instruction": q, "output": r} for q, r in zip(QUESTIONS, references, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judges(model, tmp_path):
    tokenizer = lora_ms.AutoTokenizer.from_pretrained(MODEL)

    def evaluated(references, judge, on=model):
        file = write(tmp_path / "rows.jsonl", references)
        return lora_ms.evaluate_custom(on, tokenizer, file, judge, max_new_tokens=32)

    first = evaluated(["x", "y", "z"], lambda answer, reference: len(answer) + 100 * (reference == "y"))
    answers = [one["answer"] for one in first["answers"]]
    assert answers[0] == "15 16 17 18 19"
    assert first["score"] == pytest.approx((sum(map(len, answers)) + 100) / 3)
    assert first["rows"] == 3
    assert [one["row"] for one in first["answers"]] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert 0 < evaluated([answers[0], answers[1][1:4], "@@@"], "chrf")["score"] < 100
    adapted = lora_ms.get_peft_model(model, lora_ms.LoraConfig(lora_rank=2, target_modules=["q_proj"]))
    found = evaluated([f" {answers[0]}\n", answers[1][1:4], "@@@"], "exact", adapted)  # a fresh adapter changes nothing
    assert found["score"] == pytest.approx(1 / 3)
    assert [one["score"] for one in found["answers"]] == [1.0, 0.0, 0.0]
    assert [JUDGES["contains"](answers[1], reference) for reference in (answers[1][1:4], "@@@")] == [True, False]
    with pytest.raises(lora_ms.LoraMsError, match="judge 'bleu' is none of exact, contains, chrf, and no function"):
        evaluated(["x", "y", "z"], "bleu")
    (tmp_path / "none.jsonl").write_text(json.dumps({"instruction": "q", "output": "a", "train": False}) + "\n")
    with pytest.raises(lora_ms.LoraMsError, match="none.jsonl: all rows are left out"):
        lora_ms.evaluate_custom(model, tokenizer, tmp_path / "none.jsonl")
