"""Preview, preprocess, templates that travel, mixtures and held-out rows, from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_ms.cli.main import main
from lora_ms.commands import preview
from lora_ms.config import load_config
from lora_ms.data.pipeline import read_rows
from lora_ms.data.templates import TEMPLATES
from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.recipes import data

ROWS = [{"instruction": "say hi", "input": "", "output": "hi there"}, {"instruction": "a", "input": "b", "output": "c"}]


@pytest.fixture
def words(tmp_path, text_model, monkeypatch):
    """Arguments for two rows of Alpaca."""
    monkeypatch.setenv("LORA_MS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return ["--load_checkpoint", str(text_model), "--train_dataset_dir", str(path), "--seq_length", "64"]


def test_preview(words, capsys):
    assert main(["preview", *words, "--row", "1"]) == 0
    assert capsys.readouterr().out == (
        "rows.json[1]: 35 tokens, 9 of them learnt\n"
        "<|im_start|>user\nsay hi<|im_end|>\n<|im_start|>assistant\n[[hi there<|im_end|>]]\n\n\n"
    )
    assert main(["preview", *words]) == 0
    assert capsys.readouterr().out.count(" of them learnt\n") == 2
    assert main(["preview", *words, "--row", "3"]) == 2
    assert capsys.readouterr().err == "error: --row 3: there is no row of that number\n"


def test_preview_counts_rows_as_the_file_does(words, capsys):
    assert main(["preview", *words, "--seq_length", "30", "--row", "2"]) == 0  # the first is too long
    assert capsys.readouterr().out.startswith("rows.json[2]: ")
    assert main(["preview", *words, "--seq_length", "30", "--row", "1"]) == 2
    assert capsys.readouterr().err == "error: --row 1: left out: 35 tokens, and seq_length is 30\n"
    for more in ([], ["--row", "1"]):
        assert main(["preview", *words, "--seq_length", "5", *more]) == 2
        assert capsys.readouterr().err.startswith("error: all 2 rows are longer than seq_length 5 (shortest: ")


def test_preview_shows_both_answers(words, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"instruction": "q{i}", "chosen": "yes", "rejected": "no"}}\n' for i in range(4)))
    pairs = ["--train_dataset_dir", str(file), "--options", "objectives=[{type: dpo}]"]
    assert main(["preview", *words, *pairs, "--row", "2"]) == 0
    chosen, rejected, _ = capsys.readouterr().out.split("\n\n\n")
    assert chosen.startswith("pairs.jsonl:2: ") and "q1" in chosen and "[[yes<|im_end|>]]" in chosen
    assert " of them rejected\n" in rejected and "[[no<|im_end|>]]" in rejected
    assert main(["preview", *words, *pairs]) == 0
    assert capsys.readouterr().out.count("[[") == 6
    assert main(["preview", *pairs]) == 0
    assert "  user: q0\n  chosen: yes\n  rejected: no\n" in capsys.readouterr().out


def test_preview_reads_no_further_than_its_row(words, tmp_path, capsys):
    good, text = json.dumps(ROWS[0]), tmp_path / "rows.jsonl"
    text.write_text("\n".join([good] * 600 + ["{"]))
    assert main(["preview", *words, "--train_dataset_dir", str(text), "--row", "2"]) == 0
    assert capsys.readouterr().out.startswith("rows.jsonl:2: ")
    cut = ["--seq_length", "30", "--train_dataset.truncation", "cut", "--row", "9"]
    assert main(["preview", *words, *cut]) == 2
    assert capsys.readouterr().err == "error: --row 9: there is no row of that number\n"


@pytest.mark.parametrize(
    ("options", "row", "why"),
    [
        ([], 3, "weight is 0"),
        (["--train_dataset.clean.dedupe", "True"], 4, "its questions are those of an earlier row (clean.dedupe)"),
        (["--train_dataset.clean.min_chars", "5"], 2, "too short"),
        (["--train_dataset.clean.skip_faulty", "True"], 5, 'no answer: "output" is empty; write the answer or '),
    ],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_preview_says_why_a_row_is_left_out(words, tmp_path, capsys, options, row, why, with_model):
    rows = [ROWS[0], {"instruction": "a", "output": "c"}, {**ROWS[0], "weight": 0}, ROWS[0]]
    rows += [{"instruction": "d", "output": ""}] * (row == 5)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    model = words if with_model else []
    assert main(["preview", *model, "--train_dataset_dir", str(file), *options, "--row", str(row)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --row {row}: left out: {why}")


def test_preview_without_a_model(tmp_path, capsys):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    assert main(["preview", "--train_dataset_dir", str(file)]) == 0
    assert capsys.readouterr().out == (
        "rows.json[1]:\n  user: say hi\n  assistant: hi there\n\n"
        "rows.json[2]:\n  user: a\nb\n  assistant: c\n\n"
        "2 rows can be read; with --load_checkpoint they are shown as the model sees them\n"
    )
    file.write_text('[{"prompt": "q", "response": "a"}]')
    assert main(["preview", "--train_dataset_dir", str(file)]) == 2
    advice = 'set --train_dataset.columns "{instruction: prompt, output: response}"; '
    assert advice in capsys.readouterr().err


def test_preview_names_a_token_that_the_model_does_not_have(words, tmp_path, capsys):
    (tmp_path / "tokens.jsonl").write_text('{"input_ids": [1, 99999], "prompt_len": 1}\n')
    assert main(["preview", *words, "--train_dataset_dir", str(tmp_path / "tokens.jsonl")]) == 2
    assert "tokens.jsonl:1: token id 99999 does not exist" in capsys.readouterr().err


def test_preview_says_what_it_left_out(words, tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": [*turns, turns[0], {**turns[1], "weight": 0}], "id": 3},
        {"messages": [turns[0], {**turns[1], "train": False}]},
        {"messages": [turns[0], {"role": "assistant", "content": "b" * 200}]},
    ]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    assert main(["preview", *words, "--train_dataset_dir", str(text)]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "left out: 1 rows: every assistant turn is marked as not to be learnt",
        "longer than seq_length 64: 1 rows, 0 of them cut and 1 dropped",
        "assistant turns not learnt, as the data says (weight: 0 and the like): 1 of 3",
        'rows.jsonl: keys without effect, and how often: "id" (1)',
    ]


def test_preview_and_preprocess_leave_out_what_is_longer_than_the_model(text_model, tmp_path, capsys):
    """Without a seq_length it is the model's, 512, in both."""
    text = tmp_path / "rows.jsonl"
    rows = [{"instruction": "a", "output": "b" * length} for length in (600, 300)]
    text.write_text("\n".join(map(json.dumps, rows)))
    words = [
        "--load_checkpoint",
        str(text_model),
        "--train_dataset_dir",
        str(text),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["preview", *words]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "longer than seq_length 512: 1 rows, 0 of them cut and 1 dropped"
    assert "rows.jsonl:1:" not in said and "rows.jsonl:2:" in said
    assert main(["preprocess", *words, "--report"]) == 0
    assert "longer than seq_length 512, dropped" in capsys.readouterr().out


def test_preview_shows_all_rows_that_a_conversation_becomes(words, tmp_path, capsys):
    (tmp_path / "late.jinja").write_text(
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}<|im_end|>{% endfor %}"
    )
    turns = [{"role": role, "content": f"{role}{n}"} for n in range(5) for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    arguments = ["preview", *words[:2], "--train_dataset_dir", str(tmp_path / "rows.jsonl"), "--row", "1"]
    assert main([*arguments, "--chat_template", str(tmp_path / "late.jinja")]) == 0
    shown = capsys.readouterr().out
    assert [f"[[assistant{n}<|im_end|>]]" in shown for n in range(5)] == [True] * 5
    assert "user0<|im_end|>-<|im_end|>user1<|im_end|>[[assistant1<|im_end|>]]" in shown
    assert "conversations that became several rows: 1; " in shown


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_characters_that_the_terminal_does_not_have(words, tmp_path, encoding):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b", "😀": 1}), encoding="utf-8")
    command = [sys.executable, "-m", "lora_ms.cli", "preview", *words[:2]]
    done = subprocess.run(
        [*command, "--train_dataset_dir", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b'how often: "?" (1)' in done.stdout and b"Traceback" not in done.stderr


def test_preview_in_colour(chatml_row):
    row, tokenizer = chatml_row
    shown = preview.show(row, tokenizer, True)
    green, grey, plain = preview.COLOUR, preview.GREY, preview.PLAIN
    assert shown.split("\n", 1)[1] == (
        f"{grey}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{plain}{green}b<|im_end|>{plain}{grey}\n{plain}"
    )


@pytest.fixture
def chatml_row(text_model):
    from lora_ms.data.example import Example, Message
    from lora_ms.data.template import encode

    tokenizer = load_tokenizer(text_model)
    (row,) = encode(tokenizer, Example("row", (Message("user", "a"), Message("assistant", "b"))))
    return row, tokenizer


def test_preprocess(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["preprocess", *words, "--output_dir", str(out), "--report"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["data_report.json"]
    (report,) = json.loads((out / "data_report.json").read_text())
    assert (report["rows"], report["kept"], report["percentiles"]["longest"]) == (2, 2, 35)
    assert "rows to train on" in capsys.readouterr().out
    for _ in range(2):  # the second time, nothing is left to do
        assert main(["preprocess", *words, "--output_dir", str(out), "--layout", "mindformers"]) == 0
    rows = read_rows(out)
    assert [int(np.count_nonzero(row.labels != -100)) for row in rows] == [9, 2]
    assert capsys.readouterr().out.endswith(f"2 rows in 1 MindRecord files: {out}\n")


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"input_ids": [1, 99999], "prompt_len": 1}, 1),
        ({"input_ids": [1, 2, 2], "labels": [-100, 99999, 2]}, 1),
        ({"input_ids": [99999, 2], "labels": [-100, 2]}, 1),
        ({"input_ids": [1, 99999], "prompt_len": 1}, 300),
    ],
    ids=["an id", "a label", "a token that is not learnt", "a late row"],
)
def test_preprocess_names_a_token_that_the_model_does_not_have(words, tmp_path, capsys, bad, line):
    rows = [{"input_ids": [1, 2], "prompt_len": 1}] * (line - 1) + [bad]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--train_dataset_dir", str(tmp_path / "tokens.jsonl"), "--output_dir", str(tmp_path / "out")]
    for more in ([], ["--report"], ["--layout", "mindformers"]):
        assert main(["preprocess", *words, *arguments, *more]) == 2
        named = f"error: tokens.jsonl:{line}: token id 99999 does not exist in a vocabulary "
        assert capsys.readouterr().err.startswith(named)
    assert not list((tmp_path / "out").glob("*.mindrecord"))


def test_a_text_with_a_token_that_the_model_does_not_have(words, tmp_path, text_model, capsys):
    """The tokenizer has a token more than the embedding."""
    folder = tmp_path / "model"
    shutil.copytree(text_model, folder)
    tokenizer = load_tokenizer(folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<new{n}>" for n in range(vocab_size + 1 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    row = {"instruction": "a", "output": f"b {tokenizer.convert_ids_to_tokens(vocab_size)}"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    arguments = ["--train_dataset_dir", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    for command in ("preprocess", "preview"):
        assert main([command, "--load_checkpoint", str(folder), *arguments]) == 2
        assert f"rows.jsonl:1: token id {vocab_size} does not exist in a vocabulary of" in capsys.readouterr().err


def test_braces_by_the_yaml_key(words, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "{{who}}?", "output": "{{x}}"}))
    arguments = ["preview", *words, "--train_dataset_dir", str(tmp_path / "rows.jsonl")]
    assert main(arguments) == 2
    assert "add --fill who=VALUE; or leave all such braces as they are with train_dataset.fill: False" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--train_dataset.fill", "False", "--fill", "who=Mira"]) == 0
    assert "Mira?<|im_end|>\n<|im_start|>assistant\n[[{{x}}<|im_end|>]]" in capsys.readouterr().out


def test_the_handler_of_mindformers(words, capsys):
    handler = ["--options", "train_dataset.data_loader.handler={type: AlpacaInstructDataHandler, seq_length: 400}"]
    assert main(["preview", *words[:4], *handler, "--row", "2"]) == 0
    shown = capsys.readouterr().out
    assert "USER: Below is an instruction that describes a task, paired with an input" in shown
    assert "### Instruction:\na\n\n### Input:\nb\n\n### Response: ASSISTANT: [[c<|im_end|>]]" in shown


def tokenizer_of(text_model, adapter: Path | str, *options: str, training: bool = False):
    flags = {"load_checkpoint": str(text_model), "load_adapter": str(adapter)}
    return data.tokenizer_for(load_config(None, flags=flags, options=list(options)), training)


def test_another_template_than_the_training_one_is_refused(text_model, tmp_path):
    adapter = tmp_path / "adapter"
    named = "processor.tokenizer.chat_template=vicuna"
    tokenizer_of(text_model, "", named, training=True).save_pretrained(adapter)
    assert tokenizer_of(text_model, adapter).chat_template == TEMPLATES["vicuna"]
    assert tokenizer_of(text_model, adapter, named).chat_template == TEMPLATES["vicuna"]
    for other in ("processor.tokenizer.chat_template=deepseek", f"processor.tokenizer.vocab_file={text_model}"):
        with pytest.raises(LoraMsError) as error:
            tokenizer_of(text_model, adapter, other)
        assert "was trained with another chat template (vicuna) than the one here" in str(error.value)
        assert tokenizer_of(text_model, adapter, other, "allow_other_template=True").chat_template


def test_a_vocab_file_that_is_not_there(text_model):
    with pytest.raises(LoraMsError) as error:
        tokenizer_of(text_model, "", "processor.tokenizer.vocab_file=path/vocab.json")
    assert str(error.value) == (
        "processor.tokenizer.vocab_file path/vocab.json: no such file; leave the key out to use the tokenizer in "
        "load_checkpoint"
    )


def test_a_mixture_and_an_eval_file(words, tmp_path, text_model, rows_file, capsys, graph_mode):
    """Two datasets by weight, four steps; another file is evaluated at the end."""
    out = tmp_path / "out"
    mix = [{"dataset_dir": str(rows_file), "weight": 3, "weight_end": 1}, {"dataset_dir": words[3], "weight": 1}]
    arguments = [
        "finetune", *words, "--output_dir", str(out), "--max_steps", "4", "--batch_size", "4", "--do_eval", "True",
        "--eval_dataset_dir", str(rows_file), "--options", f"train_dataset.mix={json.dumps(mix)}",
        "pet_config={lora_rank: 2, target_modules: q_proj, lora_dropout: 0}",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("data: ") == 2 and "step 4/4  eval loss " in printed
    assert sorted(path.name for path in (out / "best").glob("adapter_*")) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    reports = json.loads((out / "data_report.json").read_text())
    assert [report["rows"] for report in reports] == [8, 2]
    assert main([*arguments, "--options", "train_dataset.validation_split=0.5"]) == 2
    assert "validation_split and mix are both given" in capsys.readouterr().err
    arguments = ["preprocess", *words, "--output_dir", str(tmp_path / "rows")]
    assert main([*arguments, "--options", f"train_dataset.mix={json.dumps(mix)}"]) == 2
    assert "preprocess writes the rows of one dataset, and train_dataset.mix has weights" in capsys.readouterr().err


def test_held_out_rows_tear_no_conversation(words, tmp_path, text_model):
    (tmp_path / "late.jinja").write_text(
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}<|im_end|>{% endfor %}"
    )
    turns = [{"role": role, "content": f"{role}{n}"} for n in range(4) for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 10))
    config = load_config(
        None,
        flags={"load_checkpoint": str(text_model)},
        options=["train_dataset.validation_split=0.3", f"processor.tokenizer.chat_template={tmp_path / 'late.jinja'}"],
    )
    tokenizer = data.tokenizer_for(config, training=True)
    preparation = data.preparation_of(config, config.train_dataset, 64, None)
    rows = data.rows_of(config.train_dataset, [str(tmp_path / "rows.jsonl")], tokenizer, preparation)
    kept, held_out = data.split_off(config, rows, tokenizer, preparation)
    assert (len(rows.store), len(kept.store), len(held_out.store)) == (40, 28, 12)
    assert not {row.where for row in kept.store} & {row.where for row in held_out.store}


def test_held_out_rows(words, tmp_path, rows_file, capsys, graph_mode):
    arguments = [*words[:2], "--train_dataset_dir", str(rows_file), "--seq_length", "16", "--max_steps", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--options", "train_dataset.validation_split=0.25"]
    assert main(["finetune", *arguments, "--pet_config.target_modules", "q_proj"]) == 0
    printed = capsys.readouterr().out
    assert "training: 1 step, 1 row each, 6 per epoch" in printed and "step 1/1  eval loss " in printed
