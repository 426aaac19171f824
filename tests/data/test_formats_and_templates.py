"""Tokens and labels of every template x format x conversation, as numbers; transformers' own rendering is the other
side."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ms.data.example import IGNORE_INDEX, Example, Message, ToolData
from lora_ms.data.pipeline import Preparation, prepare_rows, read, read_rows
from lora_ms.data.report import Tally
from lora_ms.data.template import encode, encode_prompt, encode_rows, set_template
from lora_ms.data.templates import TEMPLATES
from lora_ms.errors import LoraMsError

CONVERSATIONS = {
    "single": [("user", "你好 a"), ("assistant", "is his")],
    "multi": [("user", "a"), ("assistant", "b c"), ("user", "d\ne"), ("assistant", "是")],
    "system": [("system", "be short"), ("user", "a"), ("assistant", "b")],
}


def as_format(name: str, turns: list[tuple[str, str]]) -> dict:
    """The same conversation in each format that can hold it."""
    if name == "messages":
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    if name == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
    if name == "prompt":
        rows = [{"role": role, "content": text} for role, text in turns]
        return {"prompt": rows[:-1], "completion": rows[-1:]}
    system = [text for role, text in turns if role == "system"]
    rest = [text for role, text in turns if role != "system"]
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    row = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1], "history": [list(p) for p in pairs[:-1]]}
    return row | ({"system": system[0]} if system else {})


@pytest.fixture
def named(with_template):
    """A byte-level tokenizer with the template of a name; its end token is <|endoftext|>, it has no begin token."""

    def make(name: str):
        tokenizer = with_template(None)
        set_template(tokenizer, name)
        return tokenizer

    return make


# (tokens, labels) of each conversation; byte-level, so that they can be counted by hand
TABLE = {
    "chatml": {"single": (31, 4), "multi": (50, 8), "system": (40, 2)},
    "llama2": {"single": (29, 6), "multi": (46, 12), "system": (47, 4)},
    "llama3": {"single": (119, 14), "multi": (225, 27), "system": (172, 12)},
    "qwen": {"single": (67, 4), "multi": (86, 8), "system": (40, 2)},
    "alpaca": {"single": (151, 4), "multi": (186, 8), "system": (46, 2)},
    "vicuna": {"single": (182, 4), "multi": (201, 8), "system": (30, 2)},
    "deepseek": {"single": (30, 4), "multi": (48, 8), "system": (31, 2)},
    "human_assistant": {"single": (31, 4), "multi": (52, 8), "system": (32, 2)},
    "alpaca_vicuna": {"single": (320, 4), "multi": (477, 8), "system": (168, 2)},
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_labels_as_numbers(named, name, conversation):
    tokenizer, turns = named(name), CONVERSATIONS[conversation]
    found = []
    for form in ("messages", "sharegpt", "alpaca", "prompt"):
        (row,) = read_rows([as_format(form, turns)])
        (tokens,) = encode(tokenizer, row)
        found.append((tokens.input_ids.tolist(), tokens.labels.tolist()))
        assert (len(tokens.input_ids), int((tokens.labels != IGNORE_INDEX).sum())) == TABLE[name][conversation]
    assert all(other == found[0] for other in found)
    whole = tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)
    assert tokenizer.decode(found[0][0]).startswith(whole)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_transformers(named, name, conversation):
    tokenizer, turns = named(name), CONVERSATIONS[conversation]
    (row,) = encode(tokenizer, Example("row", tuple(Message(*turn) for turn in turns)))
    spans = answers(tokenizer, turns)
    assert runs(row) == spans


def answers(tokenizer, turns) -> list[tuple[int, int]]:
    """Token ranges of the answers, from transformers' rendering alone: prompt lengths, and the end tokens after."""
    found, first, done = [], 0, 0
    whole = tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)
    ends = [tokenizer.eos_token, "<|im_end|>"]
    for number, (role, text) in enumerate(turns):
        if role != "assistant":
            continue
        before = [{"role": role, "content": text} for role, text in turns[:number]]
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        assert whole.startswith(prompt)
        rest = whole[len(prompt) :]
        after = rest.index(text) + len(text)
        closing = next((end for end in ends if rest[after:].lstrip(" ").startswith(end)), None)
        if closing is None and number == len(turns) - 1:
            closing = rest[after:]
        stop = rest.index(closing, after) + len(closing) if closing else rest.index("<|eot_id|>", after) + 10
        # a prompt is tokenised by itself before its answer is known
        first += len(tokenizer(prompt[done:], add_special_tokens=False).input_ids)
        found.append((first, first + len(tokenizer(rest[:stop], add_special_tokens=False).input_ids)))
        done = len(prompt)
    if not whole.rstrip().endswith(tuple(ends)):
        found[-1] = (found[-1][0], found[-1][1] + 1)  # the end token that is added
    return found


def runs(row) -> list[tuple[int, int]]:
    learnt = np.r_[False, row.labels != IGNORE_INDEX, False]
    edges = np.flatnonzero(learnt[1:] != learnt[:-1])
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def test_named_templates_say_what_their_formats_say(named, llama):
    turns = [{"role": role, "content": text} for role, text in CONVERSATIONS["system"]]
    more = [*turns, {"role": "user", "content": "c"}]

    def text(name, messages, prompt=False):
        return named(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    assert text("human_assistant", more[1:2], True) == "Human: a\n\nAssistant: "
    assert text("human_assistant", more[1:], True) == "Human: a\n\nAssistant: b<|endoftext|>\n\nHuman: c\n\nAssistant: "
    assert text("vicuna", more, True) == "be short USER: a ASSISTANT: b<|endoftext|> USER: c ASSISTANT: "
    assert text("deepseek", more, True) == "be short\n\nUser: a\n\nAssistant: b<|endoftext|>User: c\n\nAssistant: "
    set_template(llama, "llama2")
    assert llama.apply_chat_template(more, tokenize=False) == (
        "<s>[INST] <<SYS>>\nbe short\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]"
    )
    llama.chat_template = None


def test_a_template_from_a_file_and_an_unknown_one(named, tmp_path, with_template):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer = with_template(None)
    set_template(tokenizer, str(tmp_path / "mine.jinja"))
    (row,) = encode(tokenizer, Example("row", (Message("user", "a"), Message("assistant", "b"))))
    assert tokenizer.decode(row.input_ids) == "a<|im_end|>b<|im_end|>"
    long = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}" + "{# as in MindFormers' YAMLs #}" * 200
    set_template(tokenizer, long)
    assert tokenizer.chat_template == long
    with pytest.raises(LoraMsError) as error:
        set_template(tokenizer, "chatgpt")
    assert str(error.value).startswith("chat_template chatgpt: no such file, and none of chatml, llama2, ")


def test_the_last_turn_only(chatml):
    row = Example("row", tuple(Message(*turn) for turn in CONVERSATIONS["multi"]))
    (everything,), (last,) = encode(chatml, row), encode(chatml, row, "last")
    assert everything.input_ids.tolist() == last.input_ids.tolist()
    assert runs(last) == runs(everything)[-1:]


def test_plain_text_and_prompt_completion(plain, llama):
    rows = read_rows([{"prompt": "is ", "completion": "his"}])
    (tokens,) = encode(plain, rows[0])
    assert plain.decode(tokens.input_ids) == "is his<|endoftext|>"
    assert tokens.labels.tolist() == [-100, -100, *tokens.input_ids[2:].tolist()]
    (text,) = read_rows([{"text": "his"}])
    (tokens,) = encode(llama, text)
    assert tokens.input_ids.tolist() == [1, *llama("his").input_ids[1:], 2]
    assert tokens.labels.tolist() == [-100, *tokens.input_ids[1:].tolist()]


def test_tools_are_text_where_the_template_takes_none(chatml):
    row = {
        "tools": [{"name": "add"}],
        "messages": [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": [1, 1]}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ],
    }
    (example,) = read_rows([row])
    assert example.tools == ToolData([{"name": "add"}], '[{"name": "add"}]')
    (tokens,) = encode(chatml, example)
    assert chatml.decode(tokens.input_ids) == (
        '<|im_start|>system\n[{"name": "add"}]<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n'
        '[{"name": "add", "arguments": [1, 1]}]<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n'
        "<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    assert len(runs(tokens)) == 2


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]}
    assert read_rows([row])[0].messages[0].content == "ab"


def test_a_named_format_and_renamed_columns(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"问": "a", "答": "b", "text": "no"}) + "\n", encoding="utf-8")
    how = Preparation(seq_length=16, format="alpaca", columns={"instruction": "问", "output": "答"})
    assert list(read([path], how, Tally()))[0].messages == (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(LoraMsError) as error:
        list(read([path], Preparation(seq_length=16, columns={"instruction": "q"}), Tally()))
    assert str(error.value) == (
        'd.jsonl:1: there is no column "q", which columns asks for; columns here: "问", "答", "text"'
    )


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
WORDS = TEXT.filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.none() | WORDS, st.sampled_from(sorted(TEMPLATES)))
def test_masks_hold_the_answers_and_their_ends(pairs, system, name):
    """Whatever the texts: ids are the rendering's, the prompt is generation's, and the label text begins as answer."""
    tokenizer = make_tokenizer(name)
    messages = [Message("system", system)] if system else []
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", answer)]
    (row,) = encode(tokenizer, Example("row", tuple(messages)))
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert row.input_ids[: len(prompt)].tolist() == prompt
    start, end = runs(row)[-1]
    assert start == len(prompt)
    answer = tokenizer.decode(row.input_ids[start:end])
    assert answer.strip().startswith(pairs[-1][1].strip())
    whole = tokenizer.apply_chat_template([m._asdict() for m in messages], tokenize=False)
    assert tokenizer.decode(row.input_ids).removesuffix("<|endoftext|>") == whole.removesuffix("<|endoftext|>")
    assert row.labels[end - 1] in (261, 263)


TOKENIZERS: dict[str, object] = {}


def make_tokenizer(name: str):
    if name not in TOKENIZERS:
        TOKENIZERS[name] = BYTE_LEVEL[0](None)
        set_template(TOKENIZERS[name], name)
    return TOKENIZERS[name]


BYTE_LEVEL: list = []


@pytest.fixture(autouse=True)
def _byte_level(with_template):
    BYTE_LEVEL[:] = [with_template]


def test_rows_together_are_rows_alone(chatml):
    examples = [Example(f"row {i}", tuple(Message(*turn) for turn in CONVERSATIONS[name]))
                for i, name in enumerate(CONVERSATIONS)]  # fmt: skip
    for together, example in zip(encode_rows(chatml, examples), examples, strict=True):
        (alone,) = encode(chatml, example)
        (row,) = together.rows
        assert row.input_ids.tolist() == alone.input_ids.tolist()
        assert row.labels.tolist() == alone.labels.tolist()


def test_truncation(chatml):
    rows = [Example("row 1", (Message("user", "a"), Message("assistant", "b" * 40)))]
    (whole,) = encode(chatml, rows[0])
    with pytest.raises(LoraMsError) as error:
        prepare_rows(rows, chatml, Preparation(seq_length=32, truncation="error"))
    assert str(error.value) == (
        f"row 1: {len(whole.input_ids)} tokens, and seq_length is 32; raise it, or set truncation to drop or cut"
    )
    store, report = prepare_rows(rows, chatml, Preparation(seq_length=32, truncation="cut"))
    assert chatml.decode(store[0].input_ids).endswith("bbb<|im_end|>") and len(store[0].input_ids) == 32
    assert store[0].labels[-1] == 263 and store[0].labels[-2] == store[0].input_ids[-2]
    assert (report.cut, report.dropped_too_long, report.answer_tokens_lost) == (1, 0, len(whole.input_ids) - 32 - 1)


def test_long_texts_are_split_and_every_token_is_learnt_once(plain):
    text = "abcdefghijklmnopqrstuvwxyz"
    store, report = prepare_rows(read_rows([{"text": text}]), plain, Preparation(seq_length=10))
    assert [len(row.input_ids) for row in store] == [10, 10, 9] and report.split == 1
    learnt = np.concatenate([row.labels[row.labels != -100] for row in store])
    assert plain.decode(learnt) == text[1:] + "<|endoftext|>"
