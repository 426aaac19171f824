"""Every format that is read, and every line that a user may be shown instead."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_ms.data.example import Example, Message, TokenRow
from lora_ms.data.mindrecord import trim_padding
from lora_ms.data.pipeline import read_rows
from lora_ms.data.readers import SUPPORTED as KINDS
from lora_ms.data.readers import find_files
from lora_ms.errors import LoraMsError

HI = {"instruction": "hi", "output": "yes"}
HI_MESSAGES = (Message("user", "hi"), Message("assistant", "yes"))
KNOWN = (
    "known formats: instruction + output (optional: input, system, history), messages (a list of role + content), "
    "conversations (a list of from + value), prompt + completion, text, input_ids + labels, input_ids + prompt_len"
)
NO_OBJECT = "a row must be an object with keys"
SUPPORTED = f"supported are {KINDS}"
ROLES = (
    "system, developer, user, human, assistant, gpt, bot, model, tool, function, observation, tool_response, ipython, "
    "function_call, tool_call"
)
BRACES = "or leave all such braces as they are with train_dataset.fill: False"


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fault(source, **options) -> str:
    with pytest.raises(LoraMsError) as error:
        read_rows(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def as_lists(rows: list[TokenRow]) -> list[tuple[str, list[int], list[int]]]:
    return [(row.where, row.input_ids.tolist(), row.labels.tolist()) for row in rows]


def test_alpaca():
    rows = read_rows(
        [
            {"instruction": "你是谁?", "input": "", "output": "臣妾甄嬛。"},
            {"instruction": "翻译", "input": "谢谢", "output": "thanks", "system": "你是译者。", "history": []},
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "id": 3},
            {"instruction": "", "input": "only input", "output": "d"},
        ]
    )
    assert rows == [
        Example("row 1", (Message("user", "你是谁?"), Message("assistant", "臣妾甄嬛。"))),
        Example(
            "row 2",
            (Message("system", "你是译者。"), Message("user", "翻译\n谢谢"), Message("assistant", "thanks")),
            input="谢谢",
        ),
        Example(
            "row 3",
            (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")),
        ),
        Example("row 4", (Message("user", "only input"), Message("assistant", "d"))),
    ]


def test_messages_with_the_names_that_other_datasets_give_the_roles():
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("bot", "d"), ("user", "e")]
    row = {"messages": [{"role": role, "content": content} for role, content in [*turns, ("assistant", "f")]]}
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert read_rows([row]) == [Example("row 1", tuple(map(Message, roles, "sabcdef")))]


def test_tokens():
    rows = read_rows(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
            {"input_ids": np.array([5, 6, 7]), "prompt_len": 2},
            {"input_ids": [5, 6], "prompt_len": 0},
        ]
    )
    assert as_lists(rows) == [
        ("row 1", [5, 6, 7], [-100, 6, 7]),
        ("row 2", [5, 6, 7], [-100, -100, 7]),
        ("row 3", [5, 6], [5, 6]),
    ]
    assert {array.dtype for row in rows for array in (row.input_ids, row.labels)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    "name, text, where",
    [
        ("d.jsonl", '{"instruction": "hi", "output": "yes"}\n\n{"instruction": "hi", "output": "yes"}\n', (":1", ":3")),
        ("d.jsonl", '{"instruction": "hi", "output": "yes"}\r\n{"instruction": "hi", "output": "yes"}', (":1", ":2")),
        ("d.jsonl", '\ufeff{"instruction": "hi", "output": "yes"}', (":1",)),
        (
            "d.json",
            '[{"instruction": "hi", "output": "yes"},\r\n{"instruction": "hi", "output": "yes"}]',
            ("[1]", "[2]"),
        ),
        ("d.json", '\ufeff{\n"instruction": "hi",\n"output": "yes"}', ("[1]",)),
        ("d.json", '{"instruction": "hi", "output": "yes"}\n{"instruction": "hi", "output": "yes"}\n', (":1", ":2")),
        ("D.JSON", '[{"instruction": "hi", "output": "yes"}]', ("[1]",)),
    ],
    ids=["blank line", "CRLF", "BOM", "array", "object", "lines named .json", "capitals"],
)
def test_files(tmp_path, name, text, where):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_rows(path) == read_rows(str(path)) == [Example(f"{name}{place}", HI_MESSAGES) for place in where]


def test_unusual_line_separators_inside_a_string_are_text(tmp_path):
    text = "a\u2028b\u0085c"
    path = write_lines(tmp_path / "d.jsonl", {"instruction": text, "output": "yes"})
    assert read_rows(path)[0].messages[0].content == text


def test_a_folder_and_a_glob_read_the_supported_files_in_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", HI)
    write_lines(tmp_path / "a.json", HI, HI)
    write_lines(tmp_path / ".hidden.jsonl", HI)
    (tmp_path / "readme.md").write_text("no data")
    (tmp_path / "sub").mkdir()
    assert [row.where for row in read_rows(tmp_path)] == ["a.json:1", "a.json:2", "b.jsonl:1"]
    assert [row.where for row in read_rows(f"{tmp_path}/*.json?")] == ["b.jsonl:1"]
    assert [row.where for row in read_rows(f"{tmp_path}/*")] == ["a.json:1", "a.json:2", "b.jsonl:1"]
    assert [row.where for row in read_rows(tmp_path, num_samples=2)] == ["a.json:1", "a.json:2"]
    assert [row.where for row in read_rows(tmp_path, num_samples=3)] == ["a.json:1", "a.json:2", "b.jsonl:1"]


def test_a_folder_has_splits_where_its_names_say_so(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        write_lines(tmp_path / name, {"text": name})

    def found(split):
        return [file.name for file in find_files(str(tmp_path), split)]

    assert found("train") == ["more.jsonl", "train.jsonl"] and found("test") == found(None) == ["test.jsonl"]
    with pytest.raises(LoraMsError, match="has no split validation; there are test, train: set data_loader.split"):
        found("validation")
    write_lines(tmp_path / "train-00000.jsonl", {"text": "numbered"})
    assert found("train") == ["train-00000.jsonl"] and found(None) == ["test.jsonl"]
    for name in ("train.jsonl", "more.jsonl"):
        (tmp_path / name).unlink()
    assert found("train") == ["train-00000.jsonl"]
    (tmp_path / "train-00000.jsonl").unlink()
    assert found("train") == ["test.jsonl"]  # a folder of test rows that is named as it is
    (tmp_path / "test.jsonl").rename(tmp_path / "train-00000.jsonl")
    assert found(None) == ["train-00000.jsonl"]  # held-out rows that lora-ms preprocess has written


def test_a_name_with_glob_characters_is_first_of_all_a_name(tmp_path):
    assert read_rows(write_lines(tmp_path / "[1].jsonl", HI)) == [Example("[1].jsonl:1", HI_MESSAGES)]


def test_num_samples_reads_no_further(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "hi", "output": "yes"}\nbroken\n')
    assert read_rows(path, num_samples=1) == [Example("d.jsonl:1", HI_MESSAGES)]
    assert fault(path, num_samples=0) == "num_samples is 0; give 1 or more, or leave it out to read all rows"


def test_fill():
    row = {"instruction": "{{NAME}}?", "input": "{{NAME}}", "system": "{{作者}}", "output": "I am {{NAME}} by {{作者}}"}
    history = {"history": [["{{NAME}}", "{{NAME}}"]]}
    fill = {"NAME": "小明", "作者": "{{NAME}}"}  # what is filled in is not filled again
    assert [message.content for message in read_rows([{**row, **history}], fill=fill)[0].messages] == [
        "{{NAME}}",
        "小明",
        "小明",
        "小明?\n小明",
        "I am 小明 by {{NAME}}",
    ]
    messages = [{"role": "user", "content": "{{NAME}}"}, {"role": "assistant", "content": "{ {NAME}} {{NAME}}"}]
    assert read_rows([{"messages": messages}], fill=fill)[0].messages == (
        Message("user", "小明"),
        Message("assistant", "{ {NAME}} 小明"),
    )
    assert read_rows([HI | {"output": "{{AGE}}"}], fill={"AGE": 5})[0].messages[1].content == "5"
    assert fault([row], fill={"NAME": "x"}) == (
        f"row 1: the placeholder {{{{作者}}}} is not filled; add --fill 作者=VALUE; {BRACES}"
    )


def test_paths_that_lead_nowhere(tmp_path):
    assert fault(tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: no such file or folder; check the path of the dataset"
    assert fault(f"{tmp_path}/*.jsonl") == f"{tmp_path}/*.jsonl: no supported file matches; {SUPPORTED}"
    assert fault(tmp_path) == f"{tmp_path}: no supported file in this folder; {SUPPORTED}"
    assert fault("x" * 300) == f"{'x' * 80}: File name too long; check the path of the dataset"
    assert fault("~nobody-there/d.json") == (
        "~nobody-there/d.json: Could not determine home directory; check the path of the dataset"
    )
    assert fault("") == "the path of the dataset is empty; name a file, a folder or a glob"
    (tmp_path / "d.docx").write_text("x")
    assert fault(tmp_path / "d.docx") == f"{tmp_path}/d.docx: file type not supported; {SUPPORTED}"


@pytest.mark.parametrize(
    "name, raw, text",
    [
        (
            "d.jsonl",
            b'{"instruction": "a", "output": "b"}\n{"instruction": }\n',
            "d.jsonl:2: not valid JSON (Expecting value at column 17); write one object per line",
        ),
        (
            "d.json",
            b'[{"instruction": "a",\n "output": "b"\n',
            "d.json:3: not valid JSON (Expecting ',' delimiter at column 1); write a list of objects",
        ),
        (
            "d.jsonl",
            b'[{"instruction": "a", "outp\n{"instruction": "a", "output": "b"}\n',
            "d.jsonl:1: not valid JSON (Invalid control character at column 28); write a list of objects, or one "
            "object per line",
        ),
        (
            "d.json",
            b'{"instruction": "a", "output": "b"}\n{"instruction": }\n',
            "d.json:2: not valid JSON (Expecting value at column 17); write one object per line",
        ),
        (
            "d.jsonl",
            "{“instruction”：“a”}".encode(),
            "d.jsonl:1: not valid JSON (Expecting property name enclosed in double quotes at column 2: “ instead of "
            '"); write one object per line',
        ),
        (
            "d.jsonl",
            b'{"instruction": "a", "output": "b",}',
            "d.jsonl:1: not valid JSON (the last comma before column 36 is too many); write one object per line",
        ),
        ("d.jsonl", b"[" * 100_000, "d.jsonl:1: not valid JSON (nested too deeply); write one object per line"),
        (
            "d.jsonl",
            b'{"instruction": "a", "output": "b"}\n{"instruction": "\xc4\xe3\xba\xc3"}\n',
            "d.jsonl:2: byte 0xc4 is not UTF-8; save the file as UTF-8 (from GBK: iconv -f GBK -t UTF-8)",
        ),
        (
            "d.jsonl",
            b'[{"instruction": "a", "output": "b"}]\n' * 2,
            f"d.jsonl:1, d.jsonl:2: {NO_OBJECT}, not list; {KNOWN}",
        ),
        ("d.json", b"\xff\xfe[\x00{", "{folder}/d.json: begins as UTF-16 and is none; save the file as UTF-8"),
        (
            "d.csv",
            b"instruction\toutput\na, b\tc\n",
            "d.csv:2: 2 fields, and the first line names 1 columns; if tabs separate the columns, name the file .tsv",
        ),
        (
            "d.jsonl",
            b'{"instruction": "a", "output": "\\ud83d"}',
            "d.jsonl:1: the text holds \\ud83d, half of a character; remove it",
        ),
    ],
    ids=[
        "line",
        "array",
        "array in a .jsonl",
        "lines named .json",
        "typographic quotes",
        "last comma",
        "nesting",
        "GBK",
        "arrays in lines",
        "half of UTF-16",
        "tabs",
        "half a surrogate pair",
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, raw, text):
    (tmp_path / name).write_bytes(raw)
    assert fault(tmp_path / name) == text.replace("{folder}", str(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '{"instruction": "你好", "output": "b"}\n{"instruction": "c", "output": "d\u2028"}\n'),
        ("d.json", '[{"instruction": "你好", "output": "b"},\n {"instruction": "c", "output": "d\u2028"}]'),
        ("d.csv", "instruction,output\r\n你好,b\r\nc,d\u2028\r\n"),
    ],
)
def test_utf_16_is_read_by_its_mark(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes((text if encoding == "utf-16" else "\ufeff" + text).encode(encoding))
    pairs = [[message.content for message in row.messages] for row in read_rows(tmp_path / name)]
    assert pairs == [["你好", "b"], ["c", "d\u2028"]]


def test_utf_16_needs_no_other_disk(tmp_path, monkeypatch):
    """Rows beyond one block of 64 K characters, of one, two, three and four bytes in UTF-8."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    answers = ["aé你😀" * 5000, "b" * 70_000, "c"]
    lines = [json.dumps({"instruction": "a", "output": text}, ensure_ascii=False) for text in answers]
    (tmp_path / "d.jsonl").write_bytes("\r\n".join(lines).encode("utf-16"))
    (tmp_path / "d.json").write_bytes(f"[{','.join(lines)}]".encode("utf-16"))
    for name in ("d.jsonl", "d.json"):
        assert [row.messages[1].content for row in read_rows(tmp_path / name)] == answers


@pytest.mark.parametrize(
    "text", ["[{}, {}]", "[ {}, {} ]", "[ {},\n {}]", "[{},\n{}\n]\n", "[\n  {},\n  {}\n]", "\ufeff\n[{}, {}]\n"]
)
def test_a_list_in_a_jsonl_is_read_as_one(tmp_path, text):
    row = '{"instruction": "a", "output": "b"}'
    (tmp_path / "d.jsonl").write_text(text.replace("{}", row), encoding="utf-8")
    assert [example.where for example in read_rows(tmp_path / "d.jsonl")] == ["d.jsonl[1]", "d.jsonl[2]"]


def test_nothing_to_read(tmp_path):
    for name, text in [("a.jsonl", "\n"), ("b.json", "[]"), ("c.json", ""), ("d.jsonl", "")]:
        (tmp_path / name).write_text(text)
        assert fault(tmp_path / name) == f"{tmp_path}/{name}: there are no rows; give at least one"
    assert fault([]) == "the dataset: there are no rows; give at least one"


def message_row(*turns: tuple[object, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


FLAT = "give a flat list of token ids"
ANSWER = "write the answer or remove the row"


@pytest.mark.parametrize(
    "row, text",
    [
        ({"instruction": "a", "output": ""}, f'no answer: "output" is empty; {ANSWER}'),
        ({"instruction": "a", "output": " \n"}, f'no answer: "output" is empty; {ANSWER}'),
        ({"instruction": "a", "output": None}, f'no answer: "output" is empty; {ANSWER}'),
        ({"instruction": "a"}, f'no answer: "output" is missing; {ANSWER}'),
        (
            {"instruction": "", "output": "b"},
            'no question: "instruction" is empty; write the question or remove the row',
        ),
        ({"instruction": "a", "output": 5}, '"output" is int, not text; put it in quotation marks'),
        ({"instruction": ["a"], "output": "b"}, '"instruction" is list, not text; put it in quotation marks'),
        ({"instruction": "a", "output": "b", "history": "x"}, '"history" is str, not a list; correct the row'),
        (
            {"instruction": "a", "output": "b", "history": [["q", "r"], ["q"]]},
            'turn 2 of "history" is no [question, answer] pair of texts; correct the row',
        ),
        (
            {"instruction": "a", "output": "b", "history": [["q", ""]]},
            f'no answer: turn 1 of "history" is empty; {ANSWER}',
        ),
        (
            {"role": "user", "content": "a"},
            'keys "role", "content" fit no format; if these are the messages of one row, write {"messages": [...]}; '
            + KNOWN,
        ),
        (
            {"from": "human", "value": "a"},
            'keys "from", "value" fit no format; if these are the messages of one row, write {"conversations": [...]}; '
            + KNOWN,
        ),
        ({"题目": "a", "answer": "b"}, f'keys "题目", "answer" fit no format; {KNOWN}'),
        (
            {"instruction;output": "a;b"},
            'keys "instruction;output" fit no format; if semicolons separate the columns, save the file with commas; '
            + KNOWN,
        ),
        (
            {"instruction\toutput": "a\tb"},
            'keys "instruction\\toutput" fit no format; if tabs separate the columns, name the file .tsv; ' + KNOWN,
        ),
        (
            {"data": {"instruction": "a", "output": "b"}},
            'keys "data" fit no format; if the rows are the objects under "data", write these alone; ' + KNOWN,
        ),
        (
            {"prompt": "a", "response": "b"},
            'keys "prompt", "response" fit no format; if "prompt" is the question and "response" the answer, set '
            f'--train_dataset.columns "{{instruction: prompt, output: response}}"; {KNOWN}',
        ),
        ({"prompt": "a"}, f'no answer: "completion" is missing; {ANSWER}'),
        ({"input_ids": [1]}, f'keys "input_ids" fit no format; {KNOWN}'),
        ({}, f"keys (none) fit no format; {KNOWN}"),
        ("text", f"{NO_OBJECT}, not str; {KNOWN}"),
        (message_row(), f'no answer: "messages" is empty; {ANSWER}'),
        ({"messages": {"role": "user"}}, '"messages" is dict, not a list; correct the row'),
        ({"messages": [{"role": "user"}]}, "message 1 is no object with role and content; correct the row"),
        (
            message_row(("user", "a"), ("工具", "b")),
            'message 2 has the unknown role "工具"; known roles: ' + ROLES,
        ),
        (
            message_row((["user"], "a")),
            'message 1 has the unknown role ["user"]; known roles: ' + ROLES,
        ),
        (
            message_row(("user", [{"type": "text"}]), ("assistant", "b")),
            "content of message 1 is list, not text; put it in quotation marks",
        ),
        (
            message_row(("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")),
            f"no answer: the content of message 2 is empty; {ANSWER}",
        ),
        (
            message_row(("user", "a"), ("assistant", "b"), ("human", "c")),
            "no answer: the last message is the user's; end every row with an assistant",
        ),
        (
            message_row(("gpt", "a")),
            "the first message is the assistant's; begin every row with a system or user message",
        ),
        (
            {"input_ids": [1, 2, 3], "labels": [1, 2]},
            "labels has 2 entries, input_ids 3; give one label for each token",
        ),
        ({"input_ids": [], "labels": []}, "input_ids is empty; remove the row"),
        ({"input_ids": [1, -2], "labels": [1, 2]}, "input_ids holds -2; token ids are 0 or more"),
        (
            {"input_ids": [1, 2], "labels": [-1, 2]},
            "labels holds -1; a label is a token id, or -100 where nothing is learnt",
        ),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, f"input_ids is no list of whole numbers; {FLAT}"),
        ({"input_ids": [[1], [2, 3]], "labels": [1]}, f"input_ids is no list of whole numbers; {FLAT}"),
        ({"input_ids": [1, 2], "labels": "ab"}, f"labels is no list of whole numbers; {FLAT}"),
        ({"input_ids": [2**31], "labels": [1]}, f"input_ids holds a number beyond 32 bits; {FLAT}"),
        (
            {"input_ids": [1, 2, 3, 4], "labels": [2, 3, 4, -100]},
            "labels are already shifted by one token; give labels in line with input_ids; training shifts them",
        ),
        ({"input_ids": [1, 2], "prompt_len": -1}, "prompt_len is -1; it is the number of prompt tokens, 0 or more"),
        ({"input_ids": [1, 2], "prompt_len": "1"}, "prompt_len is '1'; it is the number of prompt tokens, 0 or more"),
        ({"input_ids": [1, 2], "prompt_len": 2}, f"no answer: prompt_len is 2 of 2 tokens; {ANSWER}"),
        ({"input_ids": [1], "prompt_len": 0, "labels": [1]}, "both labels and prompt_len are given; give one of them"),
        (
            {"instruction": "{{x}}", "output": "b"},
            f"the placeholder {{{{x}}}} is not filled; add --fill x=VALUE; {BRACES}",
        ),
    ],
)
def test_rows_that_cannot_be_learnt_from(row, text):
    assert fault([row]) == f"row 1: {text}"


def test_faulty_rows_are_collected_in_one_line(tmp_path):
    empty = {"instruction": "a", "output": ""}
    path = write_lines(tmp_path / "data.jsonl", HI, empty, HI, {"instruction": "a", "output": 1})
    assert fault(path) == (
        f'data.jsonl:2: no answer: "output" is empty; data.jsonl:4: "output" is int, not text; {ANSWER}; '
        "put it in quotation marks"
    )
    assert fault([empty] * 8) == (
        f'row 1, row 2, row 3, row 4, row 5: no answer: "output" is empty; and 3 more such rows; {ANSWER}'
    )


def test_one_file_has_one_format(tmp_path):
    assert fault([HI, message_row(("user", "a"), ("assistant", "b"))]) == (
        "row 2: the format is messages, but the first row's is alpaca; keep one format in one file"
    )
    write_lines(tmp_path / "a.jsonl", HI)
    write_lines(tmp_path / "b.jsonl", {"input_ids": [1, 2], "prompt_len": 1})
    assert [type(row) for row in read_rows(tmp_path)] == [Example, TokenRow]


def write_mindrecord(path: Path, columns: list[str], rows: list[dict], shards: int = 1) -> None:
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(path), shards, overwrite=True)
    writer.set_header_size(1 << 14)
    writer.set_page_size(1 << 15)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in columns}, "tokens")
    writer.write_raw_data([{name: np.array(row[name], np.int32) for name in columns} for row in rows])
    writer.commit()


def test_mindrecord_round_trip(tmp_path):
    path = tmp_path / "train.mindrecord"
    rows = [
        {"input_ids": [5, 6, 7, 0, 0, 0], "labels": [-100, 6, 7, -100, -100, -100]},
        {"input_ids": [5, 0, 0, 0, 0, 0], "labels": [-100, 0, 0, -100, -100, -100]},  # the learnt 0s are no padding
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, 3, 4, 5, 6]},
    ]
    write_mindrecord(path, ["input_ids", "labels"], rows)
    expected = [
        ("train.mindrecord[1]", [5, 6, 7], [-100, 6, 7]),
        ("train.mindrecord[2]", [5, 0, 0], [-100, 0, 0]),
        ("train.mindrecord[3]", [1, 2, 3, 4, 5, 6], [-100, 2, 3, 4, 5, 6]),
    ]
    assert as_lists(read_rows(path)) == expected
    assert read_rows(path)[0].input_ids.nbytes == 12  # the stored padding is not kept
    assert as_lists(read_rows(tmp_path)) == expected
    assert as_lists(read_rows(path, num_samples=2)) == expected[:2]


def test_mindrecord_without_labels_learns_every_token(tmp_path):
    write_mindrecord(tmp_path / "wiki.mindrecord", ["input_ids"], [{"input_ids": [3, 4, 0, 0]}])
    assert as_lists(read_rows(tmp_path)) == [("wiki.mindrecord[1]", [3, 4, 0, 0], [3, 4, 0, 0])]


def test_mindrecord_shards(tmp_path):
    rows = [{"input_ids": [number], "labels": [number]} for number in range(4)]
    write_mindrecord(tmp_path / "x.mindrecord", ["input_ids", "labels"], rows, shards=2)
    names = ["x.mindrecord0", "x.mindrecord1"]
    assert sorted(row.input_ids[0] for row in read_rows(tmp_path)) == [0, 1, 2, 3]
    assert [row.where for row in read_rows(tmp_path)] == [f"{name}[{number}]" for name in names for number in (1, 2)]
    assert [row.where for row in read_rows(tmp_path / names[1])] == ["x.mindrecord1[1]", "x.mindrecord1[2]"]


def test_mindrecord_faults(tmp_path):
    path = tmp_path / "x.mindrecord"
    write_mindrecord(path, ["tokens"], [{"tokens": [1]}])
    assert fault(path) == f'{path}: columns tokens; a column "input_ids" is needed (and may have "labels")'
    write_mindrecord(path, ["input_ids", "labels"], [{"input_ids": [1, 2], "labels": [1]}])
    assert fault(path) == "x.mindrecord[1]: labels has 1 entries, input_ids 2; give one label for each token"
    path.write_text("x")
    assert fault(path) == (
        f"{path}: not readable as MindRecord (Invalid file, the size of mindrecord file: 1 is smaller than the lower "
        "limit: 8); write it anew"
    )
    Path(f"{path}.db").unlink()
    assert fault(path) == f"{path}: its index x.mindrecord.db is missing; copy it beside the file"


@pytest.mark.parametrize(
    "ids, labels, length",
    [
        ([5, 6, 0, 0], [-100, 6, -100, -100], 2),
        ([5, 6, 7, 0], [-100, 6, -100, -100], 3),
        ([5, 0, 6, 0], [-100, -100, 6, -100], 3),
        ([0, 0, 0], [-100, -100, -100], 1),
        ([5, 6], [5, 6], 2),
    ],
    ids=["padding", "unlearnt text stays", "pad id inside stays", "nothing but padding", "no padding"],
)
def test_trim_padding(ids, labels, length):
    trimmed = trim_padding(np.array(ids, np.int32), np.array(labels, np.int32))
    assert [array.tolist() for array in trimmed] == [ids[:length], labels[:length]]


def test_the_data_layer_loads_without_mindspore_and_transformers():
    modules = [path.stem for path in (Path(__file__).parents[2] / "lora_ms/data").glob("*.py")]
    program = f"import sys; {'; '.join(f'import lora_ms.data.{name}' for name in modules)}; " + (
        "print(sorted({'mindspore', 'transformers', 'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
