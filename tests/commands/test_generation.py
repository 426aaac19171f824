"""predict and chat: what they are told of the conversation and the sampling, and what they refuse."""

import builtins
import contextlib
import io
import json
import shutil

import numpy as np
import pytest

import lora_ms
from lora_ms.cli import main as cli
from lora_ms.commands import chat, predict
from lora_ms.config import load_config
from lora_ms.data.example import Message
from lora_ms.data.template import encode_prompt
from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.recipes.generate import sampling_of

SUGGESTED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def run(command: str, model, *words) -> int:
    return cli.main([str(word) for word in (command, "--load_checkpoint", model, "--max_new_tokens", 6, *words)])


@pytest.fixture
def folder(text_model, tmp_path):
    """A copy of the model with a tokenizer, to be changed."""
    return shutil.copytree(text_model, tmp_path / "model")


@pytest.fixture
def said(graph_mode, text_model, capsys):
    """``said(*flags)``: the answer to one question."""

    def answer(*words, model=text_model) -> str:
        assert run("predict", model, "--predict_data", "Why?", *words) == 0
        return capsys.readouterr().out.split("> Why?\n")[1]

    return answer


@pytest.fixture(scope="module")
def plain(graph_mode, text_model):
    """The same without any flag."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run("predict", text_model, "--predict_data", "Why?") == 0
    return out.getvalue().split("> Why?\n")[1]


@pytest.fixture
def typed(monkeypatch):
    """``typed(*lines)``: what a person at the terminal writes next."""

    def write(*lines):
        words = iter(lines)

        def one(prompt: str) -> str:
            try:
                return next(words)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", one)

    return write


# --system


class Listener:
    """A speaker that notes what it is asked; ten tokens a message, of a hundred."""

    max_length, max_new_tokens = 100, 60

    def __init__(self):
        self.asked = []

    def prompt_length(self, messages):
        return 10 * len(messages)

    def answers(self, conversations, show=None):
        self.asked += [[(m.role, m.content) for m in messages] for messages in conversations]
        return ["yes" for _ in conversations]


@pytest.fixture
def listener(monkeypatch):
    found = Listener()
    for module in (predict, chat):
        monkeypatch.setattr(module, "speaker_for", lambda config, model, sampling: found)
    return found


def test_predict_puts_the_system_message_before_every_prompt(listener, text_model):
    assert run("predict", text_model, "--system", "Be brief.", "--predict_data", "a", "b") == 0
    assert listener.asked == [[("system", "Be brief."), ("user", "a")], [("system", "Be brief."), ("user", "b")]]


def test_without_one_there_is_none(listener, text_model):
    assert run("predict", text_model, "--system", "", "--predict_data", "a") == 0
    assert run("predict", text_model, "--predict_data", "b") == 0
    assert listener.asked == [[("user", "a")], [("user", "b")]]


def test_chat_keeps_the_system_message_through_reset(listener, typed, text_model):
    typed("a", "b", "/reset", "c")
    assert run("chat", text_model, "--system", "Be brief.") == 0
    system, a, b, c = ("system", "Be brief."), ("user", "a"), ("user", "b"), ("user", "c")
    assert listener.asked == [[system, a], [system, a, ("assistant", "yes"), b], [system, c]]


def test_old_turns_go_and_the_system_message_stays(listener):
    history = [Message("user", str(i)) for i in range(8)]
    assert chat.fit_history(listener, history, [Message("system", "s")]) == 4  # 50 tokens of prompt at most
    assert [message.content for message in history] == ["4", "5", "6", "7"]
    with pytest.raises(LoraMsError, match="60 tokens, and there is room for 50"):
        chat.fit_history(listener, history[:1], [Message("system", "s")] * 5)


def test_the_model_hears_it(said, plain):
    assert said("--system", "Answer in French, and at length, please.") != plain


@pytest.mark.parametrize("command", ["eval", "finetune", "estimate", "preview", "preprocess"])
def test_other_commands_refuse_it(text_model, capsys, command):
    assert run(command, text_model, "--system", "Be brief.") == 2
    assert f"--system is for predict and chat, not {command}" in capsys.readouterr().err


# temperature, top_p, max_length


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        (["temperature=0"], True),
        (["top_p=0"], True),
        (["temperature=0.0", "top_k=5"], True),
        (["temperature=0", "top_p=0"], True),
        (["temperature=0.01"], False),
        (["top_p=0.01", "top_k=1"], False),
    ],
)
def test_zero_is_greedy(options, greedy):
    options = ["do_sample=True", *options]
    config = load_config(None, options=[f"model.model_config.{option}" for option in options])
    assert sampling_of(config).greedy == greedy


def test_zero_answers_as_without_sampling(said, plain):
    assert said("--do_sample", "True", "--temperature", "0") == plain


@pytest.mark.parametrize(("flag", "value"), [("temperature", "-1"), ("top_p", "1.5"), ("top_p", "-0.1")])
def test_values_out_of_range(text_model, capsys, flag, value):
    assert run("predict", text_model, "--predict_data", "a", f"--{flag}={value}") == 2
    assert flag in capsys.readouterr().err


def test_max_length_counts_the_prompt(said, plain, text_model, capsys):
    length = len(encode_prompt(load_tokenizer(text_model), [Message("user", "Why?")]))
    short = said("--max_length", length + 2)
    assert plain.startswith(short.rstrip("\n")) and len(short) < len(plain)
    assert run("predict", text_model, "--predict_data", "Why?", "--max_length", length) == 2
    assert f"the prompt has {length} tokens, and the model takes {length} with the answer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def python_model(graph_mode, model):
    return lora_ms.AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.parametrize(
    ("limits", "new"),
    [
        ({"max_new_tokens": 4}, [4, 4]),
        ({"max_length": 10}, [7, 4]),
        ({"max_length": 10, "max_new_tokens": 5}, [5, 4]),
        ({"max_length": 30, "max_new_tokens": 3}, [3, 3]),
        ({"max_length": 7}, [4, 1]),
    ],
)
def test_limits_in_python(python_model, limits, new):
    """Prompts of three and six tokens, without an end token: every row runs to its own limit."""
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9, 10]]
    found = python_model.generate(prompts, eos_token_id=[], pad_token_id=-1, **limits)
    assert ((found[:, 6:] >= 0).sum(1)).tolist() == new
    alone = python_model.generate(prompts[:1], eos_token_id=[], **limits)
    np.testing.assert_array_equal(found[0, 6 : 6 + new[0]], alone[0, 3 : 3 + new[0]])


def test_the_usual_limit_in_python(python_model):
    assert python_model.generate([[5, 6, 7]], eos_token_id=[]).shape == (1, 3 + 64)


@pytest.mark.parametrize(
    ("lengths", "limits", "message"),
    [
        ([600], {}, "the prompt has 600 tokens, and the model takes 512"),
        ([3, 513], {"max_new_tokens": 1}, "prompt 2 has 513 tokens, and the model takes 512"),
        ([10], {"max_length": 10}, "the prompt has 10 tokens: max_length 10 leaves no room for an answer"),
        ([3, 20], {"max_length": 12}, "prompt 2 has 20 tokens: max_length 12 leaves no room for an answer"),
    ],
)
def test_prompts_too_long_in_python(python_model, lengths, limits, message):
    with pytest.raises(LoraMsError, match=message):
        python_model.generate([[5] * n for n in lengths], **limits)


def test_ids_beyond_the_vocabulary_in_python(python_model):
    with pytest.raises(LoraMsError, match="prompt 2: token id 128 does not exist in a vocabulary of 128"):
        python_model.generate([[5], [128]])


# what the model's authors suggest


def suggest(folder, **settings) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def line_of(flags: str) -> str:
    return f"generation_config.json suggests {flags}; without these flags an answer is the most likely tokens"


LINE = line_of("--do_sample True --temperature 0.7 --top_k 20 --top_p 0.8 --repetition_penalty 1.05")


@pytest.mark.parametrize(
    ("settings", "flags", "line"),
    [
        (SUGGESTED, [], LINE),
        ({"eos_token_id": [2], "pad_token_id": 0}, [], None),
        ({**SUGGESTED, "do_sample": False}, [], line_of("--repetition_penalty 1.05")),
        ({"temperature": 0.7, "top_p": 0.8}, [], None),  # which has no effect without do_sample
        ({"do_sample": True, "temperature": 1.0, "top_k": None}, [], line_of("--do_sample True")),
        (SUGGESTED, ["--do_sample", "True", "--temperature", "1"], None),
        (SUGGESTED, ["--repetition_penalty", "1.2"], None),
    ],
)  # fmt: skip
def test_sampling_is_offered(listener, folder, capsys, settings, flags, line):
    suggest(folder, **settings)
    assert run("predict", folder, "--predict_data", "Why?", *flags) == 0
    out = capsys.readouterr().out
    assert [text for text in out.splitlines() if "suggests" in text] == ([] if line is None else [line])


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (["--temperature", "0.7", "--top_k", "5", "--top_p", "0.9"], "--temperature 0.7 --top_k 5 --top_p 0.9"),
        (["--temperature", "1"], "--temperature 1"),
        (["--do_sample", "False", "--top_k", "5"], "--top_k 5"),
        (["--do_sample", "True", "--temperature", "0.7"], None),
        (["--temperature", "0"], None),
        (["--top_p", "1", "--top_k", "0"], None),
    ],
)
def test_settings_of_sampling_without_sampling(listener, folder, capsys, flags, idle):
    assert run("predict", folder, "--predict_data", "Why?", *flags) == 0
    line = f"no effect without --do_sample True: {idle}; an answer is the most likely tokens"
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("no effect")]
    assert said == ([] if idle is None else [line])


def test_sampling_is_not_taken(said, plain, folder):
    suggest(folder, **SUGGESTED)
    assert said(model=folder) == plain


def test_chat_offers_it_before_the_first_question(listener, typed, folder, capsys):
    suggest(folder, **SUGGESTED)
    typed("/exit")
    assert run("chat", folder) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [LINE, f"chat: {chat.HELP}"]


def test_an_end_token_of_generation_config_ends_an_answer(said, plain, folder):
    ids = load_tokenizer(folder).encode(plain.rstrip("\n"), add_special_tokens=False)
    suggest(folder, eos_token_id=[ids[2], 2])
    short = said(model=folder)
    assert plain.startswith(short.rstrip("\n")) and len(short) < len(plain)


# prompts that the model cannot take


@pytest.fixture
def beyond(folder):
    """The tokenizer has <x39>, of id 138, and the model's vocabulary is of 128."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<x{i}>" for i in range(40)])
    tokenizer.save_pretrained(folder)
    return folder


MESSAGE = "token id 138 does not exist in a vocabulary of 128; is the tokenizer another model's?"


def test_predict_names_an_id_beyond_the_vocabulary(beyond, capsys):
    assert run("predict", beyond, "--predict_data", "hi", "a <x39> b") == 2
    assert capsys.readouterr().err == f"error: prompt 2: {MESSAGE}\n"


def test_chat_names_it_and_goes_on(beyond, typed, capsys):
    typed("hi", "a <x39> b", "hi", "/reset", "hi", "/exit")
    assert run("chat", beyond) == 0
    out = capsys.readouterr().out
    assert f"\nthe prompt: {MESSAGE}\n" in out
    first, last = out.splitlines()[1], out.splitlines()[-1]
    assert first == last  # the faulty message is forgotten, too


def test_eval_names_it(beyond, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"instruction": "a <x39> b", "output": "c"}) + "\n")
    assert run("eval", beyond, "--prompts_file", file, "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: the prompt: {MESSAGE}\n"
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_prompts_of_an_evaluation_are_checked_before_the_first_step(beyond, text_model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    words = [
        "--train_dataset_dir",
        rows,
        "--eval_dataset_dir",
        rows,
        "--do_eval",
        "True",
        "--output_dir",
        tmp_path / "o",
    ]
    for model, prompt, message in (
        (beyond, "a <x39>", f"the prompt: {MESSAGE}"),
        (text_model, "b" * 600, "the prompt has 619 tokens, and the model takes 512 with the answer"),
    ):
        assert run("finetune", model, *words, "--options", f"evaluation.prompts=['{prompt}']") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("prompts", [["b" * 600], ["hi", "b" * 500], ["b" * 700, "hi", "ho"]])
def test_predict_refuses_a_prompt_longer_than_the_model(text_model, capsys, prompts):
    assert run("predict", text_model, "--predict_data", *prompts) == 2
    error = capsys.readouterr().err
    assert "tokens, and the model takes 512 with the answer: shorten it" in error
    assert error.startswith("error: the prompt has" if len(prompts) == 1 else "error: prompt ")
