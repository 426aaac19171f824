"""``lora-ms predict --predict_file``: many answers at once, into a file that is gone on with after an interruption."""

import json

import pytest

from lora_ms import saving
from lora_ms.cli.main import main
from lora_ms.data.prompts import read_prompts
from lora_ms.errors import LoraMsError

QUESTIONS = ["Why?", "What is 1?", "Who wrote this long line of words?", "And two?", "Is it so?", "你是谁？", "Why?"]
ROWS = [
    {"prompt": QUESTIONS[0]},
    {"question": QUESTIONS[1], "id": 7},
    *({"instruction": question} for question in QUESTIONS[2:-1]),
    {"messages": [{"role": "user", "content": QUESTIONS[-1]}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]},
    *({"query": f"question {i}"} for i in range(12)),
]
SAMPLED = ("--max_new_tokens", "8", "--do_sample", "True", "--seed", "3")


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "prompts.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def run(model, file, output, *flags) -> int:
    words = ["predict", "--load_checkpoint", model, "--predict_file", file, "--predict_output", output]
    return main([str(word) for word in (*words, *SAMPLED, *flags)])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_file_that_is_not_there_is_named_with_its_flag(text_model, tmp_path, capsys):
    assert run(text_model, tmp_path / "none.jsonl", tmp_path / "answers.jsonl") == 2
    line = f"predict_file: {tmp_path}/none.jsonl: no such file or folder; check the path"
    assert capsys.readouterr().err == f"error: {line}\n"


def test_an_adapter_that_is_not_there(text_model, file, tmp_path, capsys):
    assert run(text_model, file, tmp_path / "answers.jsonl", "--load_adapter", file) == 2
    line = f"load_adapter: {file} is not a folder; give the folder that holds adapter_config.json"
    assert capsys.readouterr().err == f"error: {line}\n"


def test_an_interrupted_file_is_gone_on_with(text_model, file, tmp_path, capsys, monkeypatch):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part" / "answers.jsonl"
    assert run(text_model, file, whole) == 0
    found = lines(whole)
    assert [line["prompt"] for line in found] == [next(iter(row.values())) for row in ROWS]
    assert [line["row"] for line in found] == [f"prompts.jsonl:{i + 1}" for i in range(len(ROWS))]
    assert {line["finish"] for line in found} <= {"stop", "length"}
    assert len({line["answer"] for line in found}) > 5
    assert "answers.jsonl" not in capsys.readouterr().out

    append = saving.append

    def fails(path, text):
        if len(lines(path)) == 5 if path.exists() else False:
            path.write_bytes(path.read_bytes() + b'{"row": "prompts.jsonl:6", "prom')  # power is lost in a line
            raise KeyboardInterrupt
        append(path, text)

    monkeypatch.setattr(saving, "append", fails)
    assert run(text_model, file, part) == 130
    monkeypatch.undo()
    assert run(text_model, file, part) == 0
    assert part.read_bytes() == whole.read_bytes()
    assert f"{part}: 5 answers of {len(ROWS)} are there" in capsys.readouterr().out
    assert run(text_model, file, part) == 0  # nothing is left to do
    assert part.read_bytes() == whole.read_bytes()

    # the same answers as on the command line
    capsys.readouterr()
    assert (
        main([str(w) for w in ("predict", "--load_checkpoint", text_model, *SAMPLED, "--predict_data", *QUESTIONS)])
        == 0
    )
    printed = capsys.readouterr().out
    for line in found[: len(QUESTIONS)]:
        text = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][0]["content"]
        assert f"> {text}\n{line['answer']}\n" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:3], "answers.jsonl:4 answers another prompt"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "answers.jsonl:1 answers another prompt"),
        (None, "answers.jsonl:1 was made with another model, adapter or system message, or other settings"),
    ],
)
def test_answers_of_another_run_are_kept(text_model, file, tmp_path, capsys, change, said):
    output = tmp_path / "answers.jsonl"
    before = [{"prompt": next(iter(row.values())), "answer": "", "settings": "x"} for row in ROWS[:4]]
    write(output, before)
    if change is not None:
        from lora_ms.recipes import predict

        settings = predict._digest
        try:
            predict._digest = lambda config, system: "x"
            write(file, change(ROWS))
            assert run(text_model, file, output) == 2
        finally:
            predict._digest = settings
    else:
        assert run(text_model, file, output) == 2
    assert said in capsys.readouterr().err
    assert lines(output) == before


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "prompts.jsonl:2: the row has none of them; give one of messages, question"),
        ({"prompt": "x", "question": "y"}, "prompts.jsonl:2: the row has question, prompt; give one of"),
        ({"prompt": 5}, "prompts.jsonl:2: prompt is no text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "prompts.jsonl:2: message 1 has no content, or no role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "prompts.jsonl:2: the last message is the assistant's"),
        ({"messages": []}, "prompts.jsonl:2: messages is no list"),
        ({"instruction": "x", "history": [["a", "b"]]}, "prompts.jsonl:2: a row with history"),
        ({"instruction": "x", "input": 5}, "prompts.jsonl:2: input or system is no text"),
        ({"prompt": "word " * 5000}, "prompts.jsonl:2: the prompt has"),
    ],
)
def test_rows_that_are_no_prompts(text_model, tmp_path, capsys, row, said):
    file = write(tmp_path / "prompts.jsonl", [ROWS[0], row])
    assert run(text_model, file, tmp_path / "out.jsonl") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_half_a_character_is_no_text(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "\\ud83d"}\n')
    with pytest.raises(LoraMsError, match=r"prompts.jsonl:1: the text holds \\ud83d, half of a character; remove it"):
        read_prompts(str(file))


def test_all_of_a_row_is_asked(tmp_path):
    row = {"instruction": "Translate.", "input": "chat", "system": "Be short.", "output": "猫"}
    (found,) = read_prompts(str(write(tmp_path / "rows.jsonl", [row])))
    assert [(turn.role, turn.content) for turn in found.messages] == [
        ("system", "Be short."),
        ("user", "Translate.\nchat"),
    ]
    assert (found.shown, found.input) == ("Translate.\nchat", "chat")


def test_an_output_that_is_none_of_ours(text_model, file, tmp_path, capsys):
    output = tmp_path / "notes.txt"
    output.write_text("my notes\n")
    assert run(text_model, file, output) == 2
    assert "notes.txt:1 is no answer of lora-ms predict" in capsys.readouterr().err
    assert output.read_text() == "my notes\n"
    for given, said in ((tmp_path, "cannot be read: Is a directory"), (output / "x", "notes.txt is not a folder")):
        assert run(text_model, file, given) == 2
        assert said in capsys.readouterr().err
    assert main(["predict", "--load_checkpoint", str(text_model), "--predict_data", "x", "--predict_output", "y"]) == 2
    assert "--predict_output is for the answers to --predict_file" in capsys.readouterr().err
    assert main(["chat", "--load_checkpoint", str(text_model), "--predict_file", str(file)]) == 2
    assert "--predict_file is for predict, not chat" in capsys.readouterr().err


def test_an_answer_under_another_system_message_is_another(text_model, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    file = write(tmp_path / "prompts.jsonl", [{"prompt": "Hi", "system": "You are a pirate."}])
    assert run(text_model, file, output) == 0 == run(text_model, file, output)
    assert lines(output)[0]["system"] == "You are a pirate."
    write(file, [{"prompt": "Hi", "system": "You are a poet."}])
    assert run(text_model, file, output) == 2
    assert "answers.jsonl:1 answers another prompt" in capsys.readouterr().err
