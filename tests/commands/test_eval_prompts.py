"""``lora-ms eval --prompts_file``: answers to questions, exact match and chrF."""

import contextlib
import io
import json
import sys
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from lora_ms.cli.main import main
from lora_ms.config import load_config
from lora_ms.data.example import Completion, Example, Message, TokenRow
from lora_ms.data.template import encode, encode_prompt
from lora_ms.errors import LoraMsError
from lora_ms.infer.questions import chrf, is_match, question_of
from lora_ms.recipes.evaluate import Quiz, has_label_tokens

QUESTIONS = ["Why?", "What is 1?", "Who wrote this long line of words?", "And two?", "Is it so?"]


def run(command: str, model, *words) -> int:
    return main([str(word) for word in (command, "--load_checkpoint", model, "--max_new_tokens", 6, *words)])


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(call) -> list[str]:
    """Lines that a successful call prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert call() == 0
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def answers(text_model):
    """What the model says to the questions, all in one batch."""
    lines = printed(lambda: run("predict", text_model, "--predict_data", *QUESTIONS))
    return [lines[lines.index(f"> {question}") + 1] for question in QUESTIONS]


@pytest.fixture(scope="module")
def asked(text_model, answers, tmp_path_factory):
    """All five in batches of two; the first and the last have the model's own answer as their reference."""
    folder = tmp_path_factory.mktemp("asked")
    references = [f"  {answers[0]}\n", "one", "me", "two", answers[4]]
    rows = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, references, strict=True)]
    file = write(folder / "questions.jsonl", rows)
    words = ["--prompts_file", file, "--eval_dataset_dir", file, "--batch_size", 2, "--output_dir", folder / "out"]
    lines = printed(lambda: run("eval", text_model, *words))
    return folder, references, lines


def test_answers_in_small_batches_are_those_of_one(asked, answers):
    folder, references, _ = asked
    lines = (folder / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "row": f"questions.jsonl:{i}",
            "prompt": q,
            "answer": a,
            "reference": r,
            "exact_match": i in (1, 5),
        }
        for i, (q, a, r) in enumerate(zip(QUESTIONS, answers, references, strict=True), start=1)
    ]


def character_f(answers: list[str], references: list[str]) -> float:
    """chrF2 over characters without white space, orders 1 to 6, counts summed over all pairs."""
    shares = []  # of the n-grams, those that are in the other side: precision and recall of each order
    for n in range(1, 7):
        sides = []
        for texts in (answers, references):
            plain = ["".join(text.split()) for text in texts]
            sides.append([Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in plain])
        # an order that a reference is too short for is not held against its answer
        mine = sum(sum(a.values()) for a, b in zip(*sides, strict=True) if b)
        theirs = sum(sum(b.values()) for b in sides[1])
        both = sum(sum((a & b).values()) for a, b in zip(*sides, strict=True))
        if mine and theirs:
            shares.append((both / mine, both / theirs))
    precision, recall = np.mean(shares, 0)
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_the_scores(asked, answers):
    pytest.importorskip("sacrebleu")
    folder, references, lines = asked
    assert lines[-3].startswith("loss ")  # of the same rows' label tokens
    assert lines[-2:] == [
        f"exact match 40.0% (2 of 5)  chrF {character_f(answers, references):.1f}",
        f"answers: {folder / 'out' / 'predictions.jsonl'}",
    ]


def test_chrf_by_its_definition():
    pytest.importorskip("sacrebleu")
    pairs = [
        ("the cat sat on the mat", "the cat is on the mat"),
        ("一二三四五六七八", "一二三四五六八七"),
        ("abc", "xyz"),
    ]
    found = chrf(*map(list, zip(*pairs, strict=True)))
    assert found == pytest.approx(character_f(*map(list, zip(*pairs, strict=True))), abs=1e-9)
    assert 20 < found < 80


def test_exact_match_trims():
    assert is_match(" a b\n", "a b") and not is_match("a  b", "a b")


class Parrot:
    """Says the same to every prompt."""

    max_length = 1000

    def __init__(self):
        self.asked = []

    def continued(self, prompts) -> list[str]:
        self.asked.append([len(prompt) for prompt in prompts])
        return ["me"] * len(prompts)


def test_without_sacrebleu_exact_match_alone(asked, text_model, tmp_path, monkeypatch, capsys):
    """And questions of like length go together, in batches of one size."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    flags = {"load_checkpoint": str(text_model), "output_dir": str(tmp_path), "run_mode": "eval"}
    flags |= {"evaluation.prompts_file": str(asked[0] / "questions.jsonl"), "runner_config.batch_size": 2}
    config = load_config(None, flags=flags)
    speaker, quiz = Parrot(), Quiz(config)
    assert not has_label_tokens(config)  # without an eval_dataset the answers alone
    assert has_label_tokens(load_config(None, flags={**flags, "evaluation.prompts_file": ""}))
    quiz.run(speaker, True)
    assert capsys.readouterr().out.splitlines() == [
        "exact match 20.0% (1 of 5)",
        "chrF is left out: it needs sacrebleu (pip install sacrebleu)",
        f"answers: {tmp_path / 'predictions.jsonl'}",
    ]
    lengths = sorted(len(q.tokens) for q in quiz.questions)
    assert speaker.asked == [lengths[:2], lengths[2:4], lengths[4:] * 2]
    speaker.max_length = lengths[-1]
    with pytest.raises(LoraMsError, match=f"^questions.jsonl:3: the question has {lengths[-1]} tokens"):
        quiz.ask(speaker)


def test_questions_of_every_format(text_model):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d e"))
    found = question_of(tokenizer, Example("row 1", turns))
    assert (found.prompt, found.reference, found.tokens) == ("c", "d e", encode_prompt(tokenizer, turns[:3]))
    found = question_of(tokenizer, Completion("row 2", "1+1=", "2"))
    assert (found.prompt, found.reference) == ("1+1=", "2")
    assert tokenizer.decode(found.tokens) == "1+1="
    (row,) = encode(tokenizer, Example("row 3", turns))
    found = question_of(tokenizer, row)
    assert found.reference == "d e" and found.tokens == encode_prompt(tokenizer, turns[:3])
    for row in (Completion("row 4", "", "text"), TokenRow("row 5", np.arange(4), np.arange(4))):
        with pytest.raises(LoraMsError, match=f"^{row.where}: no question comes before an answer"):
            question_of(tokenizer, row)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (None, "no such file or folder; check the path of the dataset"),
        ([{"instruction": "Why?"}], 'q.jsonl:1: no answer: "output" is missing; write the answer or remove the row'),
        ([{"text": "Once"}], "q.jsonl:1: no question comes before an answer: give rows with both"),
    ],
)
def test_a_wrong_file_is_one_line(text_model, tmp_path, capsys, rows, reason):
    file = tmp_path / "q.jsonl"
    if rows is not None:
        write(file, rows)
    assert run("eval", text_model, "--prompts_file", file, "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: prompts_file {file}: {reason}\n"
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_there_are_no_answers(model, tmp_path, capsys):
    file = write(tmp_path / "q.jsonl", [{"instruction": "Why?", "output": "So."}])
    assert run("eval", model, "--prompts_file", file) == 2
    assert "prompts_file needs a tokenizer" in capsys.readouterr().err
