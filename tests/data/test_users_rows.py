"""What users' files hold: nothing is dropped, invented or learnt against the data's own word without being said."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_ms.data.clean import CleaningRules
from lora_ms.data.example import IGNORE_INDEX, Example, Message, TokenRow, ToolData
from lora_ms.data.loader import DataPlan
from lora_ms.data.pipeline import Preparation, prepare, prepare_rows, read, read_rows
from lora_ms.data.report import Tally, notes_of
from lora_ms.data.template import IN_PART, NO_REASONING, NOT_MARKED, ONLY_LAST, SAID_SO, encode, encode_rows
from lora_ms.errors import LoraMsError

IM_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def chat(*turns: tuple[str, str] | dict, **columns) -> dict:
    """A row of messages; turns are (role, content), or as they stand in the file."""
    messages = [turn if isinstance(turn, dict) else dict(zip(("role", "content"), turn, strict=True)) for turn in turns]
    return {"messages": messages, **columns}


def answer(content: str | None = "a", **keys) -> dict:
    return {"role": "assistant", "content": content, **keys}


Q = ("user", "q")


def one(row: dict) -> Example:
    (found,) = read_rows([row])
    return found


def fault(*rows: dict, **options) -> str:
    with pytest.raises(LoraMsError) as error:
        read_rows(rows, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def learnt(tokenizer, row: TokenRow) -> list[str]:
    """The text of every run of labelled tokens."""
    mask = np.r_[False, row.labels != IGNORE_INDEX, False]
    edges = np.flatnonzero(mask[1:] != mask[:-1])
    return [tokenizer.decode(row.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def texts(tokenizer, row: dict) -> list[tuple[str, list[str]]]:
    return [(tokenizer.decode(tokens.input_ids), learnt(tokenizer, tokens)) for tokens in encode(tokenizer, one(row))]


def read_file(path: Path, **options) -> tuple[list, Tally]:
    tally = Tally()
    return list(read([str(path)], Preparation(seq_length=64, **options), tally)), tally


# Marks of what is learnt.

OPENED = "{% if add_generation_prompt %}<|im_start|>A\n{% endif %}"
MARKS = {
    "with the end token": (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}U\n{{ m.content }}<|im_end|>{% else %}A\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}" + OPENED,
        ["a1<|im_end|>", "a2<|im_end|>"],
        {},
    ),
    "without it: it is learnt all the same": (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}U\n{{ m.content }}{% else %}A\n"
        "{%- generation -%}  {{ '\n' + m.content }}  {%- endgeneration -%}{% endif %}<|im_end|>{% endfor %}" + OPENED,
        ["a1<|im_end|>", "a2<|im_end|>"],
        {},
    ),
    "around the heading, too": (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>U\n{{ m.content }}<|im_end|>{% else %}"
        "{% generation %}<|im_start|>A\n{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}" + OPENED,
        ["a1<|im_end|>", "a2<|im_end|>"],
        {},
    ),
    "of the last turn alone": (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}U\n{{ m.content }}<|im_end|>"
        "{% elif m.content == 'a2' %}A\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}A\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}" + OPENED,
        ["a2<|im_end|>"],
        {NOT_MARKED: 1},
    ),
    "of the first letter alone": (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}U\n{{ m.content }}<|im_end|>{% else %}A\n"
        "{% generation %}{{ m.content[0] }}{% endgeneration %}{{ m.content[1:] }}<|im_end|>{% endif %}{% endfor %}"
        + OPENED,
        ["a", "a"],
        {IN_PART: 2},
    ),
    "in two parts": (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}U\n{{ m.content }}<|im_end|>{% else %}A\n"
        "{% generation %}{{ m.content[0] }}{% endgeneration %}-{% generation %}{{ m.content[1:] }}<|im_end|>"
        "{% endgeneration %}{% endif %}{% endfor %}" + OPENED,
        ["a", "1<|im_end|>", "a", "2<|im_end|>"],
        {},
    ),
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_of_a_template_say_what_is_learnt(with_template, name):
    template, labelled, notes = MARKS[name]
    tokenizer = with_template(template)
    row = one(chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")))
    (encoded,) = encode_rows(tokenizer, [row])
    (tokens,) = encoded.rows
    assert learnt(tokenizer, tokens) == labelled and encoded.notes == notes
    whole = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in row.messages], tokenize=False
    )
    assert tokenizer.decode(tokens.input_ids) == whole  # no mark is left in the text


def test_marks_of_a_template_that_strips_past_reasoning(with_template):
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% else %}A{% generation %}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    row = chat(("user", "1"), ("assistant", "<think>x</think>b"), ("user", "2"), ("assistant", "c"))
    assert texts(tokenizer, row) == [
        ("U1A<think>x</think>b<|im_end|>", ["<think>x</think>b<|im_end|>"]),
        ("U1Ab<|im_end|>U2Ac<|im_end|>", ["c<|im_end|>"]),
    ]


STRIPS = (
    "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% else %}A"
    "{{ m.content if loop.last else m.content.upper() }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


def test_a_template_that_shows_past_turns_in_other_words(with_template):
    """Three turns, and each is learnt as it was written."""
    tokenizer = with_template(STRIPS)
    row = chat(*(turn for n in "123" for turn in (("user", n), ("assistant", f"a{n}"))))
    assert texts(tokenizer, row) == [
        ("U1Aa1<|im_end|>", ["a1<|im_end|>"]),
        ("U1AA1<|im_end|>U2Aa2<|im_end|>", ["a2<|im_end|>"]),
        ("U1AA1<|im_end|>U2AA2<|im_end|>U3Aa3<|im_end|>", ["a3<|im_end|>"]),
    ]
    (encoded,) = encode_rows(tokenizer, [one(row)], "last")
    assert [learnt(tokenizer, tokens) for tokens in encoded.rows] == [["a3<|im_end|>"]]
    assert (encoded.turns, encoded.notes) == (3, {ONLY_LAST: 2})


def test_a_template_that_changes_even_the_last_turn(with_template):
    tokenizer = with_template(STRIPS.replace("m.content if loop.last else ", ""))
    assert texts(tokenizer, chat(Q, answer("b"))) == [("UqAb<|im_end|>", ["b<|im_end|>"])]


# Reasoning.


@pytest.mark.parametrize(
    "turn",
    [
        answer(reasoning_content="why"),
        answer(reasoning="why"),
        answer(thinking="why\n"),
        answer(reasoning_content="why", thinking="why"),
        answer([{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "a"}]),
        answer("<think>\nwhy\n</think>\n\na"),
        answer("<think>why</think>\n\na", reasoning_content="why"),
    ],
    ids=["reasoning_content", "reasoning", "thinking", "two keys", "a part", "inline", "inline and a key"],
)
def test_reasoning_in_all_its_spellings(with_template, turn):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% else %}A<think>\n{{ m.reasoning_content or "
        "m.content.split('</think>')[0].replace('<think>', '') | trim }}\n</think>\n\n"
        "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    written = "<think>\nwhy\n</think>\n\na<|im_end|>"
    assert texts(with_template(template), chat(Q, turn)) == [(f"UqA{written}", [written])]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_its_key(with_template, key):
    tokenizer = with_template(
        f"{{% for m in messages %}}{{{{ '(' + m.{key} + ')' if m.{key} else '' }}}}{{{{ m.content }}}}<|im_end|>"
        "{% endfor %}"
    )
    assert texts(tokenizer, chat(Q, answer(reasoning="why"))) == [("q<|im_end|>(why)a<|im_end|>", ["(why)a<|im_end|>"])]


def test_reasoning_that_contradicts_itself_is_refused():
    assert fault(chat(Q, answer(reasoning="x", thinking="y"))) == (
        "row 1: reasoning and thinking of message 2 differ; keep one of them"
    )
    assert fault(chat(Q, answer("<think>x</think>a", reasoning="y"))) == (
        "row 1: reasoning of message 2 and a <think> block in the answer are both given; keep one of them"
    )


def test_reasoning_that_the_template_does_not_show_is_counted(chatml, plain):
    row = one(chat(Q, answer(reasoning="why"), Q, answer()))
    for tokenizer in (chatml, plain):
        (encoded,) = encode_rows(tokenizer, [row])
        assert encoded.notes == {NO_REASONING: 1}
        assert "why" not in tokenizer.decode(encoded.rows[0].input_ids)


def test_reasoning_beside_an_alpaca_answer(with_template):
    tokenizer = with_template(
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    row = {"instruction": "q", "output": "a", "thinking": "why"}
    assert texts(tokenizer, row) == [
        ("q<|im_end|><think>\nwhy\n</think>\n\na<|im_end|>", ["<think>\nwhy\n</think>\n\na<|im_end|>"])
    ]


def test_keys_without_effect_are_named_once_a_file_and_counted(tmp_path):
    rows = [chat(Q, answer(mood="glad"), id=number, images=[]) for number in range(3)]
    lines(tmp_path / "a.jsonl", *rows)
    lines(tmp_path / "b.jsonl", {"instruction": "q", "output": "a", "source": "x"}, {"instruction": "q", "output": "a"})
    _, tally = read_file(tmp_path)
    assert notes_of(tally) == [
        'a.jsonl: keys without effect, and how often: "id" (3), "messages[].mood" (3)',
        'b.jsonl: keys without effect, and how often: "source" (1)',
    ]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        (chat({**dict(zip(("role", "content"), Q, strict=True)), "name": "Bob"}, answer()), {"messages[].name": 1}),
        ({"text": "a", "label": 3}, {"label": 1}),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": np.array([1, 1])}, {"attention_mask": 1}),
        ({"prompt": "a", "completion": "b", "score": 0.5, "meta": None, "tags": []}, {"score": 1}),
        (chat(Q, answer(), system=None, messages_id="x"), {"messages_id": 1}),
        (chat(("system", "s"), Q, answer(), system="another"), {"system": 1}),
        ({"instruction": "q", "output": "a", "answer": "b"}, {"answer": 1}),
    ],
)
def test_more_keys_without_effect(row, keys):
    tally = Tally()
    list(read([[row]], Preparation(seq_length=8), tally))
    assert tally.unused == {"the dataset": keys}


# Tools, and calls of them.


@pytest.mark.parametrize("tools", ["[]", "null", "{}", "", "  ", [], {}, None, [None], ["null"]])
def test_no_tools_are_no_system_message(chatml, tools):
    row = chat(Q, answer(), tools=tools)
    assert one(row).tools is None
    ((text, _),) = texts(chatml, row)
    assert "system" not in text


TOOL = {"name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("columns", "items"),
    [
        ({"tools": [TOOL]}, [TOOL]),
        ({"tools": json.dumps([TOOL])}, [TOOL]),
        ({"tools": [json.dumps(TOOL)]}, [TOOL]),
        ({"tools": TOOL}, [TOOL]),
        ({"functions": [TOOL]}, [TOOL]),
        ({"tools": "call f when needed"}, []),
    ],
    ids=["a list", "JSON", "a list of JSON", "one alone", "functions", "words"],
)
def test_tools_in_all_their_spellings(columns, items):
    found = one(chat(Q, answer(), **columns)).tools
    assert found is not None and found.items == items
    assert json.loads(found.text) if items else found.text == "call f when needed"


def test_tools_of_the_system_message():
    row = chat({"role": "system", "content": "s", "tools": [TOOL]}, Q, answer())
    assert one(row).tools == ToolData([TOOL], json.dumps([TOOL]))


CALL = {"name": "f", "arguments": {"x": 1}}
OPENAI = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    "turn",
    [
        answer("", tool_calls=[CALL]),
        answer("", tool_calls=json.dumps([CALL])),
        answer("", tool_calls=[json.dumps(CALL)]),
        answer(None, tool_calls=[OPENAI]),
        answer(None, function_call=CALL),
        answer(None, function_call={"name": "f", "arguments": '{"x": 1}'}),
        {"role": "function_call", "content": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps([CALL])},
    ],
    ids=["list", "JSON", "list of JSON", "OpenAI", "function_call", "its arguments as text", "a role", "another role"],
)
def test_calls_reach_the_template_as_calls(with_template, turn):
    tokenizer = with_template(
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}CALL {{ c.function.name }} "
        "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    row = chat(Q, turn, ("tool", "1"), answer("done"))
    written = 'CALL f {"x": 1}<|im_end|>'
    assert texts(tokenizer, row) == [(f"q<|im_end|>{written}1<|im_end|>done<|im_end|>", [written, "done<|im_end|>"])]


def test_calls_are_written_once_where_the_template_takes_none(chatml):
    for turn, text in (
        (answer("", tool_calls=json.dumps([CALL])), json.dumps([CALL])),
        (answer("Let me see. ", tool_calls=[CALL]), f"Let me see. {json.dumps([CALL])}"),
        (answer("a", tool_calls="[]"), "a"),
        (answer("a", tool_calls=None, function_call="null"), "a"),
        ({"role": "function_call", "content": '{"name":"f"}'}, '{"name":"f"}'),
        ({"role": "function_call", "content": "f(1)"}, "f(1)"),
        ({"role": "function_call", "content": "<think>\na\n</think>\nf(1)"}, "<think>\na\n</think>\nf(1)"),
    ):
        ((_, labelled),) = texts(chatml, chat(Q, turn))
        assert labelled == [f"{text}<|im_end|>"]


def test_a_thought_before_a_call():
    """As LLaMA-Factory has it in a function_call turn."""
    turn = {"from": "function_call", "value": f"<think>\nLet me see.\n</think>\n\n{json.dumps(CALL)}"}
    found = one({"conversations": [{"from": "human", "value": "q"}, turn]}).messages[1]
    assert (found.reasoning, found.content) == ("Let me see.", "")
    assert [call["name"] for call in found.tool_calls.items] == [CALL["name"]]


def test_parallel_calls_in_turns_of_their_own_are_one_turn():
    first, second = ({"from": "function_call", "value": json.dumps({**CALL, "name": name})} for name in "fg")
    row = {"conversations": [{"from": "human", "value": "q"}, first, second, {"from": "observation", "value": "1"}]}
    row["conversations"] += [{"from": "observation", "value": "2"}, {"from": "gpt", "value": "a"}]
    found = one(row).messages
    assert [message.role for message in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["name"] for call in found[1].tool_calls.items] == ["f", "g"]


def test_calls_without_a_name_are_refused():
    assert fault(chat(Q, answer("", tool_calls=[{"arguments": {}}]))) == (
        "row 1: tool_calls of message 2 holds no call with a name; give calls as {name, arguments}, or as OpenAI does"
    )


# Turns and rows that are not to be learnt.


@pytest.mark.parametrize(
    "keys",
    [
        *({"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"trainable": 0}, {"loss": False}),
        *({"loss": "false"}, {"loss_weight": 0}, {"loss_scale": 0}, {"loss_mask": 0}, {"masked": True}),
        {"weight": 0, "train": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_turns_that_are_not_learnt(chatml, keys, form):
    row = chat(("user", "1"), answer("bad", **keys), ("user", "2"), answer("good", weight=1, loss=None))
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        row = {form: [{"from": names[m.pop("role")], "value": m.pop("content"), **m} for m in row["messages"]]}
    (encoded,) = encode_rows(chatml, [one(row)])
    (tokens,) = encoded.rows
    assert learnt(chatml, tokens) == ["good<|im_end|>"]
    assert "bad" in chatml.decode(tokens.input_ids)
    assert encoded.notes == {SAID_SO: 1}
    tally = Tally()
    list(read([[row]], Preparation(seq_length=8), tally))
    assert tally.unused == {}


def test_the_last_turn_is_not_learnt(chatml):
    row = chat(("user", "1"), answer("good"), ("user", "2"), answer("bad", weight=0))
    ((_, labelled),) = texts(chatml, row)
    assert labelled == ["good<|im_end|>"]


def test_weights_that_say_nothing_clear_are_refused():
    assert fault(chat(Q, answer(weight=0.5))) == (
        "row 1: weight of message 2 is 0.5; a turn is learnt or not: give 1 or 0, true or false"
    )
    assert fault(chat(Q, answer(weight=1, train=False))) == (
        "row 1: weight and train of message 2 contradict each other; keep one of them"
    )
    tally = Tally()
    row = chat({"role": "user", "content": "q", "train": True}, {**answer(), "train": True})
    list(read([[row]], Preparation(seq_length=8), tally))
    assert tally.unused == {"the dataset": {"messages[].train": 1}}  # a user's turn is not learnt


def test_rows_that_are_not_learnt_are_left_out_and_counted(chatml):
    rows = [
        {"instruction": "q", "output": "a", "weight": 0},
        {"instruction": "q", "output": "b", "train": False},
        {"instruction": "q", "output": "c", "weight": 1},
        {"instruction": "q", "output": "d", "weight": 0.7},
    ]
    tally = Tally()
    kept = list(read([rows], Preparation(seq_length=64), tally))
    assert [row.messages[1].content for row in kept] == ["c", "d"]
    assert tally.skipped == {"weight is 0": 1, "train is False": 1}
    assert tally.unused == {"the dataset": {"weight": 1}}
    tally = Tally()
    assert list(read([[chat(Q, answer(weight=0))]], Preparation(seq_length=64), tally)) == []
    with pytest.raises(LoraMsError) as error:
        prepare_rows([], chatml, Preparation(seq_length=64), tally)
    assert str(error.value) == (
        "the dataset: there are no rows left (left out: 1: every assistant turn is marked as not to be learnt); "
        "give at least one"
    )


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (chat(Q, answer(), label=False), "label"),
        (chat(Q, answer(), label="true"), "label"),
        ({"prompt": "q", "completion": "a", "label": True}, "label"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, "kto_tag"),
        ({"instruction": "q", "output": "a", "label": 0}, "label"),
        (chat(Q, answer(), rejected_response="b"), "rejected_response"),
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}, "chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen"),
        ({"chosen": [answer()], "rejected": [answer()]}, "chosen"),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, "chosen"),
        ({"question": "q", "response": "a", "rejected_responses": ["b"]}, "rejected_responses"),
        ({"question": "q", "answer": "a", "label": True}, "label"),
        ({"prompt": "q", "completion": "a", "label": 0}, "label"),
    ],
)
def test_preference_data_is_refused_as_such(row, column):
    assert fault(row).startswith(f'row 1: preference data (column "{column}") cannot be learnt as answers; ')


def test_the_columns_that_would_learn_the_chosen_answers(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(LoraMsError, match=r"\(columns: {instruction: prompt, output: chosen}\)"):
        read_rows(path)
    columns = {"instruction": "prompt", "output": "chosen"}
    [row] = read([str(path)], Preparation(seq_length=99, columns=columns), Tally())
    assert [message.content for message in row.messages] == ["q", "a"]


def test_ways_out_for_preference_data(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"instruction": "q", "chosen": "a", "rejected": "b"})
    rows, _ = read_file(path, columns={"output": "chosen"})
    assert rows[0].messages[1].content == "a"
    path = lines(tmp_path / "k.jsonl", chat(Q, answer(), label=True))
    rows, tally = read_file(path, format="messages")
    assert len(rows) == 1 and tally.unused == {"k.jsonl": {"label": 1}}
    path = lines(tmp_path / "n.jsonl", {"instruction": "q", "output": "a", "rejected": None, "label": "positive"})
    assert len(read_file(path)[0]) == 1
    tally = Tally()
    rules = CleaningRules(skip_faulty=True)
    assert list(read([[chat(Q, answer(), label=True)]], Preparation(seq_length=8, clean=rules), tally)) == []
    assert tally.skipped.total() == 1


# Begin and end tokens.


@pytest.mark.parametrize(
    ("row", "labelled"),
    [
        ({"text": f"x{END_OF_TEXT}"}, [f"x{END_OF_TEXT}"]),
        ({"text": f"x{END_OF_TEXT}\n"}, [f"x{END_OF_TEXT}\n"]),
        ({"text": "x"}, [f"x{END_OF_TEXT}"]),
        ({"text": f"x{END_OF_TEXT}y"}, [f"x{END_OF_TEXT}y{END_OF_TEXT}"]),
        ({"prompt": "p", "completion": f" c{END_OF_TEXT}"}, [f" c{END_OF_TEXT}"]),
        ({"text": f"x{IM_END}"}, [f"x{IM_END}{END_OF_TEXT}"]),  # not the tokenizer's end token
    ],
)
def test_a_text_has_one_end_token(plain, row, labelled):
    (tokens,) = encode(plain, one(row))
    runs = learnt(plain, tokens)
    assert runs == labelled


@pytest.mark.parametrize(
    ("content", "written"),
    [
        (f"a{IM_END}", f"a{IM_END}"),
        (f"a{IM_END}\n", f"a{IM_END}"),
        (f"a{END_OF_TEXT}", f"a{IM_END}"),
        (f"a{IM_END}b", f"a{IM_END}b{IM_END}"),
        (IM_END, f"{IM_END}{IM_END}"),
    ],
)
def test_an_answer_has_one_end_token(chatml, content, written):
    rows = texts(chatml, chat(Q, answer(content), Q, answer(content)))
    assert [labelled for _, labelled in rows] == [[written, written]]


@pytest.mark.parametrize(
    "row",
    [{"text": "<s>his"}, {"text": "his"}, {"prompt": "<s>h", "completion": "is"}, {"prompt": "h", "completion": "is"}],
)
def test_a_text_has_one_begin_token(llama, row):
    (tokens,) = encode(llama, one(row))
    assert tokens.input_ids.tolist().count(llama.bos_token_id) == 1 and tokens.input_ids[0] == llama.bos_token_id
    assert tokens.input_ids.tolist().count(llama.eos_token_id) == 1


# Encodings, and Arrow's nulls.


def test_no_nulls_that_arrow_filled_in(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": {"z": "t"}}}]
    rows = [chat(Q, {"role": "assistant", "content": "", "tool_calls": calls}), chat(Q, answer())]
    rows[1]["messages"][1]["tool_calls"] = None
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    dataset = Dataset(table)
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["arguments"] == {"x": 1, "y": None}
    for source in (tmp_path / "d.parquet", tmp_path / "saved", dataset):
        first, second = read_rows(source)
        assert first.messages[1].tool_calls.items == calls
        assert second.messages[1] == Message("assistant", "a")
    # a null that someone wrote in JSON stays
    call = {"name": "f", "arguments": {"x": None}}
    path = lines(tmp_path / "d.jsonl", chat(Q, answer("", tool_calls=[call])))
    assert read_rows(path)[0].messages[1].tool_calls.items == [call]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_names_of_files_that_are_not_utf8(tmp_path, chatml, kind, monkeypatch):
    monkeypatch.setenv("LORA_MS_CACHE", str(tmp_path / "cache"))
    name = b"\xca\xfd\xbe\xdd".decode(errors="surrogateescape")
    path = tmp_path / f"{name}.{kind}"
    row = json.dumps({"instruction": "q", "output": "a"})
    path.write_text({"jsonl": row, "json": f"[{row}]", "csv": "instruction,output\nq,a\n"}[kind])
    where = {"jsonl": ":1", "json": "[1]", "csv": ":2"}[kind]
    store, _ = prepare([str(path)], chatml, Preparation(seq_length=64), always_cache=True)
    assert store[0].where == rf"\xca\xfd\xbe\xdd.{kind}{where}"
    store[0].where.encode()


# Placeholders.

BRACES = [
    {"instruction": "x over y in LaTeX", "output": r"\frac{{x}}{{y}} or 2^{{n}}"},
    {"instruction": "in Vue", "output": "<p>{{name}}</p>"},
    {"instruction": "{{user}}: hi", "output": "{{char}} waves"},
    chat(("user", "{{a}}"), answer("{{ b }} {{c}}")),
    {"text": "{{x}}"},
    {"prompt": "{{x}}", "completion": "y"},
]


@pytest.mark.parametrize("row", BRACES)
def test_braces_stay_where_nothing_is_to_be_filled(row):
    (kept,) = read_rows([row], keep_placeholders=True)
    texts = [m.content for m in kept.messages] if isinstance(kept, Example) else [kept.prompt, kept.completion]
    written = json.dumps(row, ensure_ascii=False)
    assert all(json.dumps(text, ensure_ascii=False)[1:-1] in written for text in texts)
    assert fault(row).endswith("or leave all such braces as they are with train_dataset.fill: False")


def test_what_has_a_value_is_filled_where_the_rest_stays():
    row = {"instruction": "Who?", "output": "{{NAME}} writes {{x}}"}
    (kept,) = read_rows([row], fill={"NAME": "Mira"}, keep_placeholders=True)
    assert kept.messages[1].content == "Mira writes {{x}}"


def test_braces_that_stay_are_counted():
    tally = Tally()
    rows = [*BRACES, {"instruction": "q", "output": " ".join(f"{{{{v{n}}}}}" for n in range(12))}]
    texts = [row for row in rows if "instruction" in row]
    list(read([texts], Preparation(seq_length=8, fill={"x": "1"}, keep_placeholders=True), tally))
    assert notes_of(tally) == [
        "placeholders left as they are, and how often: {{y}} (1), {{n}} (1), {{name}} (1), {{user}} (1), {{char}} (1), "
        "{{v0}} (1), {{v1}} (1), {{v2}} (1), {{v3}} (1), {{v4}} (1) and 7 more"
    ]


# Columns of other names.


@pytest.mark.parametrize(
    ("row", "contents", "read_as"),
    [
        ({"instruction": "q", "response": "a"}, ["q", "a"], {"response": "output"}),
        (
            {"instruction": "q", "context": "c", "response": "a"},
            ["q\nc", "a"],
            {"context": "input", "response": "output"},
        ),
        ({"question": "q", "answer": "a"}, ["q", "a"], {"question": "instruction", "answer": "output"}),
        (
            {"query": "q", "response": "a", "history": [["x", "y"]]},
            ["x", "y", "q", "a"],
            {"query": "instruction", "response": "output"},
        ),
        ({"question": "q", "context": {"a": 1}, "answer": "a"}, ["q", "a"], None),
        ({"conversations": [{"role": "user", "content": "q"}, answer()]}, ["q", "a"], {}),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"], {}),
        ({"messages": [{"role": "User", "content": "q"}, {"role": "MODEL", "content": "a"}]}, ["q", "a"], {}),
        ({"messages": [{"role": "developer", "content": "s"}, dict(role="user", content="q"), answer()]}, "sqa", {}),
        ({"input_ids": [1, 2], "labels": [1, 2], "question": "q", "answer": "a"}, None, None),
    ],
)
def test_columns_that_are_read(row, contents, read_as):
    tally = Tally()
    (found,) = read([[row]], Preparation(seq_length=8), tally)
    if contents is None:
        assert isinstance(found, TokenRow)
        return
    assert [message.content for message in found.messages] == list(contents)
    if read_as is not None:
        assert tally.read_as == ({"the dataset": read_as} if read_as else {})


def test_columns_that_are_read_are_said(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"question": "q", "answer": "a"})
    assert notes_of(read_file(path)[1]) == ['d.jsonl: "question" is read as instruction, "answer" is read as output']


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"prompt": "q", "response": "a"}, "{instruction: prompt, output: response}"),
        ({"input": "q", "output": "a"}, "{instruction: input, output: output}"),
        ({"Question": "q", "Response": "a"}, "{instruction: Question, output: Response}"),
        ({"sentence": "q", "label": "a"}, "{instruction: sentence, output: label}"),
        ({"chat": [{"role": "user", "content": "q"}]}, "{messages: chat}"),
        ({"dialogue": json.dumps([{"from": "human", "value": "q"}])}, "{messages: dialogue}"),
        ({"问题": "q", "答案": "a"}, "{instruction: 问题, output: 答案}"),
        ({"content": "x"}, "{text: content}"),
    ],
)
def test_columns_that_are_suggested_work(row, advice):
    assert f'set --train_dataset.columns "{advice}"; known formats: ' in fault(row)
    columns = dict(pair.split(": ") for pair in advice.strip("{}").split(", "))
    if "messages" in columns:
        turns = [{"role": "user", "content": "q"}, answer()]
        row = {columns["messages"]: turns}
    assert len(list(read([[row]], Preparation(seq_length=8, columns=columns), Tally()))) == 1


def test_rows_under_a_key():
    assert 'if the rows are the list under "data", write that list as the file; ' in fault({"data": [{"a": 1}]})


# Rows beyond seq_length, epochs, repeated keys.


def test_what_truncation_would_keep(chatml):
    rows = read_rows([{"instruction": "q", "output": "a" * length} for length in (4, 40, 80)])
    rows += read_rows([{"instruction": "q" * 60, "output": "a"}])
    kept, report = prepare_rows(rows, chatml, Preparation(seq_length=40))
    assert (report.dropped_too_long, report.cut_would_keep) == (3, 2)
    cut, cut_report = prepare_rows(rows, chatml, Preparation(seq_length=40, truncation="cut"))
    assert (cut_report.cut, cut_report.cut_would_keep, cut_report.dropped_too_long) == (2, 0, 1)
    assert report.cut_would_keep_tokens == cut_report.label_tokens - report.label_tokens
    line = "  truncation: cut would keep a part of 2 of the rows dropped, with {} answer tokens"
    assert line.format(report.cut_would_keep_tokens) in report.lines()


@pytest.mark.parametrize(
    ("rows", "per_step", "drop_remainder", "epochs"),
    [
        (11, 8, False, [0, 8 / 11, 1, 1 + 8 / 11, 2]),
        (11, 4, False, [0, 4 / 11, 8 / 11, 1, 1 + 4 / 11]),
        (11, 4, True, [0, 0.5, 1, 1.5, 2]),
        (8, 4, False, [0, 0.5, 1, 1.5, 2]),
        (3, 8, False, [0, 1, 2, 3, 4]),
    ],
)
def test_epochs_by_their_rows(rows, per_step, drop_remainder, epochs):
    ids = np.arange(1, 4, dtype=np.int32)
    plan = DataPlan.build(
        [TokenRow(f"row {number}", ids, ids) for number in range(rows)],
        batch_size=per_step, accumulation=1, epochs=5, seed=0, pad_id=0, seq_length=16, drop_remainder=drop_remainder,
    )  # fmt: skip
    assert [plan.epoch_of(step) for step in range(5)] == pytest.approx(epochs)


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("d.jsonl", '{"instruction": "q", "output": "a", "output": "b"}', "d.jsonl:1: the key 'output'"),
        ("d.json", '[{"instruction": "q", "output": "a"}, {"text": "a", "text": "a"}]', "d.json[2]: the key 'text'"),
        (
            "d.jsonl",
            '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}',
            "d.jsonl:1: the key 'content'",
        ),
        ("d.json", '{"text": "a", "x": {"y": [{"z": 1, "z": 2}]}}', "d.json[1]: the key 'z'"),
        ("d.jsonl", '{"text": "a"}\n{"id": 1, "text": "a", "id": 1}', "d.jsonl:2: the key 'id'"),
    ],
)
def test_repeated_keys_are_refused(tmp_path, name, text, where):
    (tmp_path / name).write_text(text)
    assert fault_of(tmp_path / name).startswith(f"{where} stands twice in one object")
    assert fault_of(tmp_path / name).endswith("; keep one of them")


def fault_of(path: Path) -> str:
    with pytest.raises(LoraMsError) as error:
        read_rows(path)
    return str(error.value)


def test_rows_of_one_conversation_have_one_source(with_template):
    rows = read_rows(
        [chat(Q, answer("b")), chat(*(turn for n in "abc" for turn in (("user", n), ("assistant", n))))] * 2
    )
    store, report = prepare_rows(rows, with_template(STRIPS), Preparation(seq_length=64))
    assert len(store) == 8 and report.conversations_split == 2
    assert store.sources().tolist() == [0, 1, 1, 1, 2, 3, 3, 3]
