"""Rows of two answers, and of one with a label: the forms that they come in, their tokens, and their faults."""

import json

import pytest

from lora_ms.data.clean import CleaningRules
from lora_ms.data.example import Completion, Example, Preference
from lora_ms.data.pipeline import Preparation, prepare, prepare_rows, read
from lora_ms.data.report import Tally
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError

PAIRS = Preparation(seq_length=64, preferences="pairs")
LABELLED = Preparation(seq_length=64, preferences="labelled")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def one(row: dict, preparation: Preparation = PAIRS):
    [found] = read([[row]], preparation, Tally())
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"input": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": gpt("a"), "rejected": gpt("b")},
        {"messages": [user("q")], "chosen": said("a"), "rejected": said("b")},
        {"messages": [user("q")], "chosen": "a", "rejected": "b"},
        {"messages": json.dumps([user("q")]), "chosen": json.dumps([said("a")]), "rejected": json.dumps([said("b")])},
        {"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")]},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [said("a")], "rejected": [said("b")]},
        {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"prompt": "q", "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        # as UltraFeedback has it, whose messages are the chosen ones
        {"messages": [user("q"), said("a")], "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"instruction": "q", "chosen": said("a"), "rejected": said("b")},
        {"instruction": "q", "chosen": "a", "rejected": "b", "label": 1, "chosen_response": "x"},
    ],
)
def test_forms_of_pairs(row):
    found = one(row)
    assert isinstance(found, Preference)
    assert [[message.content for message in answer.messages] for answer in (found.chosen, found.rejected)] == [
        ["q", "a"], ["q", "b"],
    ]  # fmt: skip
    assert found.chosen.liked and not found.rejected.liked


@pytest.mark.parametrize("asked", [{"instruction": "q"}, {"prompt": "q"}, {"messages": [user("q")]}])
@pytest.mark.parametrize("texts", [('{"name": "f"}', '{"name": "g"}'), ("[1, 2]", "[2, 1]"), ("[]", "none")])
def test_answers_that_are_json_are_texts(asked, texts):
    found = one({**asked, "chosen": texts[0], "rejected": texts[1]})
    for answer, text in zip((found.chosen, found.rejected), texts, strict=True):
        assert (answer.completion if isinstance(answer, Completion) else answer.messages[-1].content) == text


def test_pairs_of_plain_texts_and_of_long_conversations():
    found = one({"prompt": "q: ", "chosen": "a", "rejected": "b"})
    assert found.chosen == Completion("row 1", "q: ", "a") and found.rejected.completion == "b"
    first = [{"role": "system", "content": "s"}, user("1"), said("2"), user("3")]
    found = one({"messages": first, "chosen": said("4"), "rejected": said("5"), "score": 0.5})
    assert [message.content for message in found.rejected.messages] == ["s", "1", "2", "3", "5"]


@pytest.mark.parametrize(
    ("row", "liked"),
    [
        ({"instruction": "q", "output": "a", "kto_tag": True}, True),
        ({"messages": [user("q"), said("a")], "label": "false"}, False),
        ({"conversations": [{"from": "human", "value": "q"}, gpt("a")], "label": 1}, True),
        ({"prompt": [user("q")], "completion": [said("a")], "label": 0}, False),
    ],
)
def test_forms_of_labelled_answers(row, liked):
    found = one(row, LABELLED)
    assert isinstance(found, Example) and found.liked is liked
    assert [message.content for message in found.messages] == ["q", "a"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "q", "chosen": "a"}, 'no rejected answer: "rejected" is missing'),
        ({"instruction": "q", "chosen": " ", "rejected": "b"}, 'no chosen answer: "chosen" is empty'),
        ({"instruction": "q", "output": "a"}, 'no chosen answer: "chosen" is missing'),
        ({"instruction": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"instruction": "q", "chosen": "a", "rejected": [said("b")]}, "chosen is a text and rejected a list"),
        ({"chosen": [user("p"), said("a")], "rejected": [user("q"), said("b")]}, "answer different questions"),
        ({"messages": [user("q")], "chosen": user("a"), "rejected": said("b")}, "no answer: the last message is"),
        ({"chosen": "a", "rejected": "b"}, "there is no question beside chosen and rejected"),
        ({"messages": [user("q")], "chosen": 1, "rejected": 2}, "no texts, turns or lists"),
    ],
)
def test_faults_of_pairs(row, text):
    with pytest.raises(LoraMsError) as error:
        one(row)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "q", "output": "a"}, 'no label: "label" is missing'),
        ({"instruction": "q", "output": "a", "label": "good"}, 'label is "good"; an answer is liked or not'),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, "kto learns from single answers"),
        ({"input_ids": [1, 2], "labels": [-100, 2], "label": True}, "token ids are not read"),
    ],
)
def test_faults_of_labelled_answers(row, text):
    with pytest.raises(LoraMsError, match=text):
        one(row, LABELLED)


def test_forms_are_not_mixed_in_a_file(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"messages": [user("q")], "chosen": said("a"), "rejected": said("b")},
        {"instruction": "q", "chosen": "a", "rejected": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        LoraMsError, match="d.jsonl:2: the format is messages, but the first row's is alpaca; d.jsonl:3"
    ):
        list(read([str(path)], PAIRS, Tally()))


def test_columns_name_the_two_answers():
    columns = {"instruction": "q", "chosen": "chosen_response", "rejected": "rejected_response"}
    row = {"q": "?", "chosen_response": "a", "rejected_response": "b"}
    [found] = read([[row]], Preparation(seq_length=64, preferences="pairs", columns=columns), Tally())
    assert found.rejected.messages[-1].content == "b"


def test_rules_take_a_pair_as_one_row():
    rules = CleaningRules(trim=True, dedupe=True, skip_faulty=True)
    rows = [
        {"instruction": " q ", "chosen": " a ", "rejected": " b "},
        {"instruction": "q", "chosen": "c", "rejected": "d"},
        {"instruction": "r", "chosen": "c", "rejected": "c"},
    ]
    tally = Tally()
    [found] = read([rows], Preparation(seq_length=64, preferences="pairs", clean=rules), tally)
    assert found.chosen.messages[-1].content == "a"
    assert tally.skipped == {"duplicate": 1, "chosen and rejected are equal": 1}


def test_both_answers_are_kept_or_neither(chatml):
    rows = [
        {"instruction": "q", "chosen": "a", "rejected": "b" * 200},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
    ]
    store, report = prepare_rows(read([rows], PAIRS, Tally()), chatml, PAIRS)
    assert [store.where(i) for i in range(len(store))] == ["row 2", "row 2"]
    assert store.columns.liked.tolist() == [1, 0]
    assert report.dropped_too_long == 1


def test_what_is_liked_is_kept_on_disk(chatml, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_MS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "d.jsonl"
    rows = [{"instruction": f"q{i}", "output": "a", "label": i % 2 == 0} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        store, _ = prepare([str(path)], chatml, LABELLED, always_cache=True)
        assert store.columns.liked.tolist() == [1, 0, 1]
        assert [row.liked for row in store] == [True, False, True]
    other = TokenStore(store.columns._replace(liked=1 - store.columns.liked))
    assert store.checksum() != other.checksum()
