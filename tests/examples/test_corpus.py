"""The tiny model's corpus, its tokenizer's promises, and the example datasets."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "tiny"))

import make_corpus  # noqa: E402
import make_tokenizer  # noqa: E402


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_of(row: dict) -> str:
    return row["messages"][0]["content"]


@pytest.fixture(scope="module")
def corpus() -> tuple[list[dict], list[dict]]:
    """The whole corpus at seed 0: the files that the tiny model is made from."""
    train, heldout, _ = make_corpus.build(seed=0)
    return train, heldout


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """In separate processes, so that no order of a set or a dict can leak in."""
    digests = []
    for run in ("first", "second"):
        command = [
            sys.executable,
            str(EXAMPLES / "tiny" / "make_corpus.py"),
            "--out",
            str(tmp_path / run),
            "--limit",
            "2000",
            "--seed",
            "3",
        ]
        subprocess.run(command, check=True, capture_output=True)
        digests.append(
            [
                hashlib.sha256((tmp_path / run / name).read_bytes()).hexdigest()
                for name in ("train.jsonl", "heldout.jsonl")
            ]
        )
        assert sorted(path.name for path in (tmp_path / run).iterdir()) == ["heldout.jsonl", "train.jsonl"]
    assert digests[0] == digests[1]


def test_another_seed_gives_other_rows() -> None:
    assert make_corpus.build(seed=0, limit=500)[1] != make_corpus.build(seed=1, limit=500)[1]


def test_limit_leaves_the_heldout_rows_alone(corpus: tuple[list[dict], list[dict]]) -> None:
    assert make_corpus.build(seed=0, limit=500)[1] == corpus[1]


def test_heldout_is_five_rows_for_each_kind_and_language(corpus: tuple[list[dict], list[dict]]) -> None:
    _, heldout = corpus
    assert Counter(row["kind"] for row in heldout) == dict.fromkeys(make_corpus.ROWS, 10)
    assert len(heldout) == 200
    for row in heldout:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])


def test_no_heldout_prompt_is_trained_on(corpus: tuple[list[dict], list[dict]]) -> None:
    train, heldout = corpus
    trained = {make_corpus.normalise(prompt_of(row)) for row in train}
    for row in heldout:
        bare = make_corpus.normalise(prompt_of(row))
        assert bare not in trained
        for prefix in {p for prefixes in make_corpus.PREFIXES.values() for p in prefixes}:
            assert make_corpus.normalise(prefix + prompt_of(row)) not in trained


def test_every_prompt_has_one_answer(corpus: tuple[list[dict], list[dict]]) -> None:
    """Exact match is a fair measure only if no prompt, however typed, has two answers."""
    answers: dict[str, set[str]] = {}
    for row in corpus[0] + corpus[1]:
        answers.setdefault(make_corpus.normalise(prompt_of(row)), set()).add(row["messages"][1]["content"])
    assert {prompt: found for prompt, found in answers.items() if len(found) > 1} == {}


def test_training_rows_are_distinct(corpus: tuple[list[dict], list[dict]]) -> None:
    prompts = [prompt_of(row) for row in corpus[0]]
    assert len(prompts) == len(set(prompts))


# Read back from the text alone, so that the generator's own bookkeeping is not what is trusted.
@pytest.mark.parametrize(
    "kind, wordings",
    [
        ("addition", r"\+"),
        ("subtraction", r" - "),
        ("comparison", r"larger|smaller|大|小"),
        ("counting", r"numbers|Count|数"),
        ("successor", r"after|before|follows|precedes|more than|less than|后|下一|大一|前|上一|小一"),
    ],
)
def test_heldout_numbers_are_in_no_wording(kind: str, wordings: str, corpus: tuple[list[dict], list[dict]]) -> None:
    train, heldout = corpus

    def key(row: dict) -> tuple[tuple[str, ...], str | None]:
        numbers = tuple(sorted(re.findall(r"\d+", prompt_of(row))))
        # One number alone names two questions, the one after and the one before; the answer tells which.
        return numbers, row["messages"][1]["content"] if kind != "comparison" else None

    held = {key(row) for row in heldout if row["kind"] == kind}
    assert len(held) == 10
    leaked = [prompt_of(row) for row in train if key(row) in held and re.search(wordings, prompt_of(row), re.I)]
    assert leaked == []


@pytest.mark.parametrize(
    "kind, wordings, least",
    [
        ("sorting", r"Sort|排列", 5000),
        ("copying", r"^.*(Repeat|Say|Copy|重复|说|抄写).*[:：]", 4000),
        ("reversing", r"Reverse|backwards|倒", 5000),
    ],
)
def test_heldout_strings_are_in_no_wording(
    kind: str, wordings: str, least: int, corpus: tuple[list[dict], list[dict]]
) -> None:
    train, heldout = corpus

    def key(row: dict) -> str:
        answer = row["messages"][1]["content"]
        return "".join(sorted(answer)) if kind == "sorting" else answer

    held = {key(row) for row in heldout if row["kind"] == kind}
    asked = [row for row in train if re.search(wordings, prompt_of(row), re.I)]
    assert len(held) == 10
    assert len(asked) >= least
    assert [prompt_of(row) for row in asked if key(row) in held] == []


def test_one_operand_set_in_twenty_is_held_out() -> None:
    pools = {language: make_corpus.items("addition", language, 0) for language in make_corpus.LANGUAGES}
    chosen, held = make_corpus.choose_heldout(pools, random.Random(0), set())
    # 21 * 22 / 2 unordered pairs of 0 to 20
    assert len({item.group for item in pools["en"]}) == 231
    assert len(held) == 12
    assert {item.group for item in chosen} <= held


def test_sums_and_orders_are_right(corpus: tuple[list[dict], list[dict]]) -> None:
    checked = Counter()
    for row in corpus[0] + corpus[1]:
        prompt, answer = (message["content"] for message in row["messages"])
        if found := re.search(r"(\d+) ([+-]) (\d+)", prompt):
            a, b = int(found[1]), int(found[3])
            assert int(answer) == (a + b if found[2] == "+" else a - b)
            checked["sum"] += 1
        elif found := re.search(r"(?:Sort|排列)\D*(\d{3})|(?:把|数字) (\d{3}) 从", prompt):
            down = "large to small" in prompt or "从大到小" in prompt
            assert answer == "".join(sorted(found[1] or found[2], reverse=down))
            checked["order"] += 1
        elif found := re.search(r"(?:Reverse|backwards|倒序)\D*(\d+)", prompt):
            assert answer == found[1][::-1]
            checked["reverse"] += 1
        elif found := re.search(r"(?:Repeat|重复|复述)[：:] ?(.+)", prompt):
            assert answer == found[1]
            checked["copy"] += 1
    assert min(checked[name] for name in ("sum", "order", "reverse", "copy")) > 500


def test_identity_heldout_prompts_are_met_nowhere(corpus: tuple[list[dict], list[dict]]) -> None:
    heldout = read_jsonl(EXAMPLES / "identity_heldout.jsonl")
    assert [row["contains"] for row in heldout] == ["{{NAME}}"] * 30
    prompts = {make_corpus.normalise(row["prompt"]) for row in heldout}
    assert len(prompts) == 30
    fine_tune = {make_corpus.normalise(prompt_of(row)) for row in read_jsonl(EXAMPLES / "identity.jsonl")}
    base = {make_corpus.normalise(prompt_of(row)) for rows in corpus for row in rows}
    assert prompts & fine_tune == set()
    assert prompts & base == set()


def test_identity_rows_carry_the_placeholders_in_their_answers() -> None:
    rows = read_jsonl(EXAMPLES / "identity.jsonl")
    assert len(rows) == 108
    assert sum(prompt_of(row).isascii() for row in rows) == 58
    for row in rows:
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        prompt, answer = (message["content"] for message in row["messages"])
        assert "{" not in prompt and "}" not in prompt
        assert answer.count("{{NAME}}") == 1
        assert set(re.findall(r"\{\{.*?\}\}", answer)) <= {"{{NAME}}", "{{AUTHOR}}"}
        assert prompt.isascii() == answer.isascii()
    assert len({prompt_of(row) for row in rows}) == 108


def test_huanhuan_rows_are_alpaca_and_their_heldout_prompts_are_new() -> None:
    rows = read_jsonl(EXAMPLES / "huanhuan.jsonl")
    assert len(rows) == 104
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert row["input"] == "" and row["instruction"] and row["output"]
    heldout = read_jsonl(EXAMPLES / "huanhuan_heldout.jsonl")
    assert [list(row) for row in heldout] == [["prompt"]] * 10
    instructions = {row["instruction"] for row in rows}
    assert len(instructions) == 104
    assert len({row["prompt"] for row in heldout} - instructions) == 10


def test_pattern_expands_to_every_reading() -> None:
    assert make_corpus.expand("[Who|What] are you[|, really]?") == [
        "Who are you?",
        "Who are you, really?",
        "What are you?",
        "What are you, really?",
    ]


def test_normalise_drops_what_a_typist_varies() -> None:
    assert make_corpus.normalise(" who  are You?! ") == "whoareyou"
    assert make_corpus.normalise("你是谁？") == "你是谁"
    assert make_corpus.normalise("3 - 1 =") != make_corpus.normalise("3 + 1 =")


def test_tokenizer_round_trips_and_splits_digits_and_characters(tmp_path: Path) -> None:
    make_corpus.write_jsonl(tmp_path / "train.jsonl", make_corpus.build(seed=0, limit=5000)[0])
    make_tokenizer.save(make_tokenizer.train(tmp_path), tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == 2048
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    for text in ("Hello , I 'm 小小！", "2 + 17\n\t  x", "龘 😀 é\u0000", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([token]) for token in tokenizer("嬛嬛204")["input_ids"]] == ["嬛", "嬛", "2", "0", "4"]
    for row in read_jsonl(EXAMPLES / "huanhuan.jsonl"):
        han = re.findall(r"[\u4e00-\u9fff]", row["output"])
        assert [len(ids) for ids in tokenizer(han)["input_ids"]] == [1] * len(han)


def test_chat_template_is_chatml_without_a_system_prompt_of_its_own() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    options = {"chat_template": make_tokenizer.CHAT_TEMPLATE, "tokenize": False}
    assert tokenizer.apply_chat_template(talk, **options) == text
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=True, **options) == (
        text + "<|im_start|>assistant\n"
    )
    system = [{"role": "system", "content": "Be brief."}]
    assert tokenizer.apply_chat_template(system + talk, **options) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + text
    )


def test_the_english_identity_and_its_held_out_questions(root):
    """Rows that a reader can follow: questions asked once, none of them held out, the names as placeholders."""
    rows = [json.loads(line) for line in (root / "examples/identity_english.jsonl").read_text("utf-8").splitlines()]
    held_out = (root / "examples/identity_english_heldout.jsonl").read_text("utf-8").splitlines()
    questions = [row["messages"][0]["content"] for row in rows]
    asked = [json.loads(line)["prompt"] for line in held_out]
    assert len(set(questions)) == len(questions) == 72 and len(set(asked)) == 20
    assert not set(questions) & set(asked)
    assert {json.loads(line)["contains"] for line in held_out} == {"{{NAME}}", "{{AUTHOR}}"}
