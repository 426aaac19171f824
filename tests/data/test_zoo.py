"""Bad data of every kind: one line that says what and where, or a row that is left out and counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_ms.data.clean import CleaningRules
from lora_ms.data.example import Message
from lora_ms.data.pipeline import Preparation, prepare_rows, read, read_rows
from lora_ms.data.report import Tally, scripts_of
from lora_ms.errors import LoraMsError

GOOD = {"instruction": "a", "output": "b"}
BEGIN = "begin every row with a system or user message"
TURNS = "let user and assistant alternate"
ANSWER = "write the answer or remove the row"


def fault(source) -> str:
    with pytest.raises(LoraMsError) as error:
        read_rows(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


CUT = '{"instruction": "a", "outp'
ROWS = {
    "cut in half": (
        CUT,
        "not valid JSON (Unterminated string starting at column 22); write one object per line",
    ),
    "null": ({"instruction": "a", "output": None}, f'no answer: "output" is empty; {ANSWER}'),
    "number": ({"instruction": 5, "output": "b"}, '"instruction" is int, not text; put it in quotation marks'),
    "another format": (
        turns("user", "assistant"),
        "the format is messages, but the first row's is alpaca; keep one format in one file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, name):
    bad, text = ROWS[name]
    path = lines(tmp_path / "d.jsonl", GOOD, bad, GOOD)
    assert fault(path) == f"d.jsonl:2: {text}"
    tally = Tally()
    kept = list(read([path], Preparation(seq_length=16, clean=CleaningRules(skip_faulty=True)), tally))
    assert [row.where for row in kept] == ["d.jsonl:1", "d.jsonl:3"]
    assert tally.skipped.total() == 1 and len(tally.skipped) == 1


def test_one_reason_counts_many_rows(tmp_path):
    path = lines(
        tmp_path / "d.jsonl", GOOD, {"instruction": "a", "output": ""}, {"instruction": "a", "output": " "}, CUT
    )
    tally = Tally()
    assert len(list(read([path], Preparation(seq_length=16, clean=CleaningRules(skip_faulty=True)), tally))) == 1
    assert tally.skipped == {"no answer": 2, "not valid JSON …": 1}


def test_bom_crlf_and_control_characters(tmp_path):
    row = json.dumps({"instruction": "a\u0000\u0007b\u001b[31m", "output": "c\r\nd"})
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n" + row.encode())
    found = read_rows(tmp_path / "d.jsonl")
    assert [item.where for item in found] == ["d.jsonl:1", "d.jsonl:3"]
    assert found[0].messages == (Message("user", "a\x00\x07b\x1b[31m"), Message("assistant", "c\r\nd"))


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        (("assistant", "user"), "no answer: the last message is the user's; end every row with an assistant"),
        (("assistant", "user", "assistant"), f"the first message is the assistant's; {BEGIN}"),
        (("user", "user", "assistant"), f"message 2, the user's, follows the user's; {TURNS}"),
        (("user", "assistant", "assistant"), f"message 3, the assistant's, follows the assistant's; {TURNS}"),
        (("user", "system", "assistant"), f"message 2, the system's, follows the user's; {TURNS}"),
        (("system", "assistant"), f"message 2, the assistant's, follows the system's; {TURNS}"),
    ],
)  # fmt: skip
def test_roles_out_of_order(roles, text):
    assert fault([turns(*roles)]) == f"row 1: {text}"


def test_emoji_rare_scripts_and_long_rows(chatml, tmp_path):
    text = "👩‍👩‍👧 𓂀 ཨོཾ ∑ 漢"
    long = {"instruction": "a", "output": "b" * 10_000_000}
    path = lines(tmp_path / "d.jsonl", {"instruction": text, "output": text}, long)
    tally = Tally()
    store, report = prepare_rows(
        read([path], Preparation(seq_length=200), tally), chatml, Preparation(seq_length=200), tally
    )
    assert text in chatml.decode(store[0].input_ids)
    assert (report.rows, report.kept, report.dropped_too_long) == (2, 1, 1)
    assert report.percentiles["longest"] > 10_000_000 and report.answer_tokens_lost == 10_000_001


def test_scripts():
    assert scripts_of(["ab 1,", "漢字", "ю", "ひ", "한", "ع", "ก", "😀"]) == {
        "Latin": 2, "Han": 2, "Cyrillic": 1, "Kana": 1, "Hangul": 1, "Arabic": 1, "Thai": 1, "emoji": 1
    }  # fmt: skip


def test_csv(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes('\ufeffinstruction,output\r\n"a, ""b""",c\r\n"two\r\nlines",5\r\n'.encode())
    rows = read_rows(path)
    assert [(row.where, row.messages[0].content, row.messages[1].content) for row in rows] == [
        ("d.csv:2", 'a, "b"', "c"), ("d.csv:3", "two\r\nlines", "5")
    ]  # fmt: skip
    path.write_text("instruction,output\na,b\na,b,c\n")
    advice = "put fields with commas in quotation marks"
    assert fault(path) == f"d.csv:3: 3 fields, and the first line names 2 columns; {advice}"
    path.write_text("instruction,output,output\na,b,c\n")
    assert fault(path) == "d.csv: the column 'output' is there twice; rename or remove one"
    path.write_text('instruction,output\na,"b')
    assert fault(path).startswith("d.csv:2: not valid CSV (unexpected end of data)")
    (tmp_path / "d.tsv").write_text('input_ids\tlabels\n[1, 2]\t"[-100, 2]"\n')
    assert read_rows(tmp_path / "d.tsv")[0].labels.tolist() == [-100, 2]
    path.write_text('messages\n"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""bot"", ""content"": ""b""}]"\n')
    assert [message.content for message in read_rows(path)[0].messages] == ["a", "b"]
    path.write_text('instruction,history,output\na,"[[""b"", ""c""]]",d\ne,,f\n')
    assert [[message.content for message in row.messages] for row in read_rows(path)] == [
        ["b", "c", "a", "d"],
        ["e", "f"],
    ]


def test_a_list_named_as_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps([GOOD, GOOD], indent=1))
    rows = read_rows(path)
    assert [row.where for row in rows] == ["d.jsonl[1]", "d.jsonl[2]"]
    assert [message.content for row in rows for message in row.messages] == ["a", "b"] * 2


def test_parquet_and_saved_datasets(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset, DatasetDict

    table = pyarrow.Table.from_pylist([turns("user", "assistant"), turns("user", "assistant")])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert [row.where for row in read_rows(tmp_path / "d.parquet")] == ["d.parquet[1]", "d.parquet[2]"]
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    assert fault(tmp_path / "empty.parquet") == f"{tmp_path}/empty.parquet: there are no rows; give at least one"
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    assert fault(tmp_path / "twice.parquet") == "twice.parquet: the column 'text' is there twice; rename or remove one"
    (tmp_path / "bad.parquet").write_text("no parquet")
    assert fault(tmp_path / "bad.parquet").startswith(f"{tmp_path}/bad.parquet: not readable as Parquet (")
    rows = Dataset.from_list([GOOD])
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read_rows(tmp_path / "saved")[0].messages == (Message("user", "a"), Message("assistant", "b"))
    DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "splits"))
    assert fault(tmp_path / "splits") == f"{tmp_path}/splits: there is no split 'train'; there are test"
    for split in ("test", None):
        (found,) = read([str(tmp_path / "splits")], Preparation(seq_length=16, split=split), Tally())
        assert found.where == "splits[1]"


def test_a_repository_of_hugging_face(tmp_path):
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "train-00000.jsonl", GOOD)
    lines(tmp_path / "data" / "test-00000.jsonl", GOOD, GOOD)
    (tmp_path / "README.md").write_text("x")
    assert [row.where for row in read_rows(tmp_path)] == ["train-00000.jsonl:1"]


def test_several_files_and_globs_at_once(tmp_path):
    lines(tmp_path / "a.jsonl", GOOD)
    lines(tmp_path / "b1.json", json.dumps([turns("user", "assistant")]))
    lines(tmp_path / "b2.jsonl", {"text": "c"})
    found = read([str(tmp_path / "a.jsonl"), str(tmp_path / "b*")], Preparation(seq_length=16), Tally())
    assert [row.where for row in found] == ["a.jsonl:1", "b1.json[1]", "b2.jsonl:1"]


def test_clean_rules_are_counted(tmp_path):
    rows = [
        {"instruction": " a ", "output": " long enough "}, {"instruction": "a", "output": "long enough, too"},
        {"instruction": "b", "output": "c"}, {"instruction": "d", "output": "e" * 99},
        {"instruction": "", "output": "x"},
    ]  # fmt: skip
    path = lines(tmp_path / "d.jsonl", *rows)
    rules = CleaningRules(required=("instruction",), min_chars=5, max_chars=50, trim=True, dedupe=True)
    tally = Tally()
    (row,) = read([path], Preparation(seq_length=16, clean=rules), tally)
    assert row.messages == (Message("user", "a"), Message("assistant", "long enough"))
    assert tally.skipped == {
        "duplicate": 1, "too short": 1, "too long in characters": 1, "instruction is empty": 1
    }  # fmt: skip


def test_duplicates_and_the_report(chatml):
    rows = read_rows([GOOD, GOOD, {"instruction": "你", "output": "好"}])
    store, report = prepare_rows(rows, chatml, Preparation(seq_length=64))
    assert (report.duplicates, report.scripts) == (1, {"Latin": 0.6667, "Han": 0.3333})
    table = "\n".join(report.table())
    assert "rows to train on" in table and "Latin 66.7%, Han 33.3%" in table
    assert report.as_json()["label_tokens"] == int(store.label_counts.sum()) == int(np.sum([2, 2, 4]))


def test_a_template_that_fails_to_render_names_the_row(with_template, tmp_path):
    tokenizer = with_template("{{ raise_exception('no such thing') }}")
    path = lines(tmp_path / "d.jsonl", GOOD)
    how = Preparation(seq_length=16)
    with pytest.raises(LoraMsError) as error:
        prepare_rows(read([path], how, Tally()), tokenizer, how)
    assert str(error.value) == "d.jsonl:1: the chat template refuses the messages: no such thing"


def test_rows_all_masked_are_counted_where_faults_are_skipped(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}, {"input_ids": [1, 2, 3], "prompt_len": 1}]
    path = lines(tmp_path / "d.jsonl", *rows)
    how = Preparation(seq_length=16, clean=CleaningRules(skip_faulty=True))
    tally = Tally()
    store, report = prepare_rows(read([path], how, tally), None, how, tally)
    assert (len(store), report.rows, report.masked) == (1, 2, 1)
    assert report.lines()[1] == "  left out: 1 rows: no label"
