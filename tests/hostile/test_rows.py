"""Rows of data, and the files that hold them."""

import json
import os
import struct

import pytest

from lora_ms.data.pipeline import read_rows
from lora_ms.errors import LoraMsError

BIG = "9" * 5000
DEEP = "[" * 100_000
ROW = '{"instruction": "a", "output": "b"}'
LINES = {
    "a number of 5,000 digits": f'{{"input_ids": [1, {BIG}], "prompt_len": 1}}',
    "deep": f'{{"instruction": "a", "output": "b", "history": {DEEP}',
    "deep and closed": f'{{"instruction": "a", "output": {DEEP}{"]" * 100_000}}}',
    "half a character": '{"instruction": "\\ud800", "output": "b"}',
    "a list": "[1]",
    "a text": '"x"',
    "a number": "1",
    "null": "null",
    "no JSON": "{instruction: a}",
    "not UTF-8": '{"instruction": "\xff", "output": "b"}',
    "a key twice": '{"instruction": "a", "instruction": "b", "output": "c"}',
    "an object for a text": '{"instruction": {}, "output": "b"}',
    "a number for a text": '{"instruction": 1, "output": "b"}',
    "messages that are none": '{"messages": [1]}',
    "messages as text": '{"messages": "x"}',
    "no role": '{"messages": [{"content": "x"}]}',
    "a role that is none": '{"messages": [{"role": ["x"], "content": "x"}]}',
    "no content": '{"messages": [{"role": "user"}]}',
    "conversations as a number": '{"conversations": 5}',
    "tools of numbers": '{"messages": [{"role": "user", "content": "x"}], "tools": [1]}',
    "ids of fractions": '{"input_ids": [1.5], "labels": [1]}',
    "ids of texts": '{"input_ids": ["x"], "labels": [1]}',
    "ids in lists": '{"input_ids": [[1], [2, 3]], "labels": [1]}',
    "ids beyond 32 bits": '{"input_ids": [4294967296], "labels": [1]}',
    "negative ids": '{"input_ids": [-5, -6], "labels": [-5, -6]}',
    "lengths that differ": '{"input_ids": [1, 2, 3], "labels": [1]}',
    "a prompt beyond the row": '{"input_ids": [1, 2], "prompt_len": 99}',
    "a history of numbers": '{"instruction": "a", "output": "b", "history": [[1, 2]]}',
    "zero bytes": "\0" * 20,
    "not a number": '{"input_ids": [NaN], "labels": [1]}',
}


def fault(path) -> str:
    with pytest.raises(LoraMsError) as error:
        read_rows(str(path))
    text = str(error.value)
    assert path.name in text and len(text) < 1000
    return text


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("what", LINES)
def test_rows(tmp_path, name, what):
    if what == "negative ids":
        pytest.skip("refused with the vocabulary, later")
    line = LINES[what].encode("latin-1")
    (tmp_path / name).write_bytes(ROW.encode() + b"\n" + line if name == "rows.jsonl" else b"[" + line + b"]")
    fault(tmp_path / name)


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ms.data.readers.MOST_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_text(f'{ROW}\n{{"instruction": "{"a" * 5000}", "output": "b"}}\n{ROW}\n')
    assert fault(tmp_path / "rows.jsonl") == "rows.jsonl:2: longer than 16 MB; cut it into several rows"
    (tmp_path / "rows.jsonl").write_text(f'{ROW}\n{{"instruction": "{"a" * 5000}')
    assert fault(tmp_path / "rows.jsonl").startswith("rows.jsonl:2: longer than 16 MB")


def test_a_text_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ms.data.formats.MOST_BYTES", 1000)
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a" * 1001, "output": "b"}]))
    assert fault(tmp_path / "rows.json") == "rows.json[1]: longer than 16 MB; cut it into several rows"


TABLES = {
    "a header in quotes": '"instruction,output\na,b\n',
    "a deep history": 'instruction,output,history\na,b,"' + "[" * 200_000 + '"\n',
    "a column twice": "instruction,instruction\na,b\n",
    "no columns": "\n\n\na\n",
    "quotes inside": 'instruction,output\n"a"b,c\n',
    "not UTF-8": "instruction,output\n\xff,b\n",
    "too few fields": "instruction,output\na\n",
    "too many fields": "instruction,output\na,b,c\n",
}


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables(tmp_path, what, kind):
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(TABLES[what].replace(",", "," if kind == "csv" else "\t").encode("latin-1"))
    fault(file)


def test_a_field_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ms.data.tables.MOST_BYTES", 1000)
    (tmp_path / "rows.csv").write_text(f"instruction,output\n{'a' * 2000},b\n")
    assert "field larger than field limit (1000)" in fault(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"x" * 200, b"PAR1\xff\xff\xff\x7fPAR1"]
)
def test_parquet(tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    assert "not readable as Parquet" in fault(tmp_path / "rows.parquet")


def test_parquet_with_texts_that_are_none(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"instruction": bad, "output": ["a"]}), tmp_path / "rows.parquet")
    assert "not readable as Parquet (In column 0: Invalid: Invalid UTF8 sequence" in fault(tmp_path / "rows.parquet")


@pytest.fixture
def saved(tmp_path):
    import datasets

    datasets.Dataset.from_list([json.loads(ROW)]).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "name", ["../outside.arrow", "/etc/hostname", "link.arrow", "none.arrow", 5, None, "a\0b", "state.json"], ids=str
)
def test_a_saved_dataset_names_files_outside(saved, name):
    data = next(saved.glob("*.arrow"))
    (saved.parent / "outside.arrow").write_bytes(data.read_bytes())
    (saved / "link.arrow").symlink_to(saved.parent / "outside.arrow")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    fault(saved)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff" * 64, b'{"a":' + b"[" * 10**5, b"{}"], ids=lambda c: repr(c[:6])
)
def test_a_saved_dataset_of_damaged_files(saved, name, content):
    if (name, content) == ("dataset_info.json", b"{}"):
        pytest.skip("the features are in the table, too")
    (saved / name).write_bytes(content)
    fault(saved)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "no such file" in fault(tmp_path / "rows.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "no such file" in fault(tmp_path / "zero.jsonl")


TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** 99999999 }}",
    "a long text": "{{ ('a' * 10 ** 10) | length }}",
    "a text that doubles": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x=n.x~n.x %}{% endfor %}",
    "a padded text": "{{ '%09999999999d' % 1 }}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a module": "{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}",
    "a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a file": "{% include '/etc/hostname' %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "an error": "{{ raise_exception('\x1b[2J') }}",
    "a division": "{{ 1 / 0 }}",
    "no end": "{% if true %}",
    "no such filter": "{{ messages | nothing }}",
    "a change": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_templates(refused, tiny, rows, tmp_path, what):
    (tiny / "chat_template.jinja").write_text(TEMPLATES[what])
    line = refused("preview", "--load_checkpoint", "m", "--train_dataset_dir", rows, "--row", 1)
    assert "chat template" in line or "no label" in line or "not learnt" in line
    assert not list(tmp_path.rglob("EXECUTED"))
