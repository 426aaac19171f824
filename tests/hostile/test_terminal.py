"""What is shown of files: control characters are made visible, and the outermost guard keeps tracebacks away."""

import io
import json

import pytest

from lora_ms.cli import main as cli
from lora_ms.errors import LoraMsError
from lora_ms.text import Escaping, escaped, folded, shortened
from lora_ms.train.log import Tee

CODES = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\x08\x08",
    "\x7f",
    "\x00",
    "\u202egnp.exe",
    "\u2066",
    "\x85",
    "\x0c",
    "\u2028",
]


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_codes_are_made_visible(code):
    shown = escaped(f"a{code}b")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")


def test_text_stays_as_it_is():
    text = "tab\tline\nChinese 你好, emoji 👍🏽, accents é ñ, right to left שלום"
    assert escaped(text) == text


def test_a_stream():
    stream = io.StringIO()
    print("a\x1b[2J\rb", file=Escaping(stream))
    assert stream.getvalue() == "a\\x1b[2J\\rb\n"
    stream = io.StringIO()
    print("a\x1b[2J\rb", file=Escaping(stream, keep="\r"))
    assert stream.getvalue() == "a\\x1b[2J\rb\n"


def test_the_log_of_a_run(tmp_path, capsys):
    with pytest.raises(LoraMsError), Tee() as tee:
        print("a\x1b[2Jb")
        tee.to(tmp_path / "run.log")
        print("c\x07")
        raise LoraMsError("d\x1b")
    assert (tmp_path / "run.log").read_text() == "a\\x1b[2Jb\nc\\x07\nerror: d\\x1b\n"


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_rows_with_codes_are_previewed(tiny, tmp_path, capsys, code):
    (tmp_path / "codes.jsonl").write_text(json.dumps({"instruction": f"a{code}", "output": f"b{code}"}))
    assert cli.main(["preview", "--load_checkpoint", "m", "--train_dataset_dir", "codes.jsonl"]) == 0
    printed = capsys.readouterr()
    assert code not in printed.out + printed.err


@pytest.mark.parametrize(
    "fault",
    [TypeError("x"), RecursionError(), KeyError("k"), AssertionError(), OSError(5, "y"), BaseException("panic")],
    ids=repr,
)
def test_the_outermost_guard(monkeypatch, capsys, fault):
    def fail(argv):
        raise fault

    assert cli._guarded(fail, []) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {type(fault).__name__}: ") and error.count("\n") == 1 and "--debug" in error
    with pytest.raises(type(fault)):
        cli._guarded(fail, ["--debug"])


def test_a_long_line_is_wrapped_between_its_words():
    keys = [f"section-{number}.key-{number}" for number in range(9)]
    lines = folded(f"no effect here: {', '.join(keys)}").splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines).endswith(", ".join(keys))
    assert folded("x" * 100) == "x" * 100


def test_a_long_text_is_shortened():
    assert shortened("a" * 3000) == "a" * 3000
    assert len(shortened("a" * 10**7)) < 3100 and "(9,997,000 characters)" in shortened("a" * 10**7)
