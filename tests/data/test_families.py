"""Chat templates of seven families, written after what their model cards say of them: every turn of the assistant is
learnt, once, right after the prompt that a model in use gets. The texts are golden: what is learnt is in [[ ]]."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_ms.data.example import IGNORE_INDEX
from lora_ms.data.pipeline import Preparation, prepare_rows, read_rows
from lora_ms.data.template import NO_REASONING, ChatFormat, encode_prompt, encode_rows

FOLDER = Path(__file__).parent / "families"
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
# name -> files of its templates, special tokens, end token, begin token
FAMILIES = {
    "chatml": ("chatml", IM, "<|im_end|>", None),
    "qwen2_5": ("qwen2_5", IM, "<|im_end|>", None),
    "qwen3": ("qwen3", IM, "<|im_end|>", None),
    "llama3_1": ("llama3_1", LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "deepseek_r1": ("deepseek_r1", DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0]),
    "mistral": ("mistral", ("<s>", "</s>"), "</s>", "<s>"),
    "hermes": ({"default": "chatml", "tool_use": "hermes_tool_use"}, IM, "<|im_end|>", None),
}
TAKES_TOOLS = ("qwen2_5", "qwen3", "llama3_1", "mistral", "hermes")
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def turn(role: str, content: str | None, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def call(city: str, call_id: str) -> dict:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


CONVERSATIONS = {
    "single": {"messages": [turn("user", "Who are you?"), turn("assistant", "I am Tiny.")]},
    "multi": {
        "messages": [
            turn("system", "Be short."),
            *(turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2"), turn("assistant", "a2")),
        ]
    },
    "tools": {
        "tools": [TOOL],
        "messages": [
            turn("user", "Weather in Rome?"),
            turn("assistant", None, tool_calls=[call("Rome", "abcdefgh1")]),
            turn("tool", "sunny", tool_call_id="abcdefgh1"),
            turn("assistant", "It is sunny."),
        ],
    },
    "reasoning": {
        "messages": [
            turn("user", "q1"),
            turn("assistant", "a1", reasoning_content="r1"),
            turn("user", "q2"),
            turn("assistant", "a2", reasoning_content="r2"),
        ]
    },
}
# not golden, but held to the same contract
MORE = {
    "tools, and on": {
        "tools": [TOOL],
        "messages": [
            *CONVERSATIONS["tools"]["messages"],
            turn("user", "And in Oslo?"),
            turn("assistant", None, tool_calls=[call("Oslo", "abcdefgh2")]),
            turn("tool", "rain", tool_call_id="abcdefgh2"),
            turn("assistant", "It rains."),
            turn("user", "Thanks."),
            turn("assistant", "Not at all."),
        ],
    },
    "reasoning now and then": {
        "messages": [
            turn("system", "s"),
            *(turn("user", "q1"), turn("assistant", "a1")),
            *(turn("user", "q2"), turn("assistant", "a2", reasoning_content="r2\nr2")),
            *(turn("user", "q3"), turn("assistant", "a3")),
        ]
    },
}


@pytest.fixture
def family(with_template):
    """The tokenizer of a family."""

    def make(name: str):
        files, specials, eos, bos = FAMILIES[name]
        if isinstance(files, dict):
            template = {key: (FOLDER / f"{file}.jinja").read_text() for key, file in files.items()}
        else:
            template = (FOLDER / f"{files}.jinja").read_text()
        return with_template(template, specials, eos, bos)

    return make


def shown(tokenizer, row) -> str:
    learnt = row.labels != IGNORE_INDEX
    np.testing.assert_array_equal(row.labels[learnt], row.input_ids[learnt])
    edges = np.flatnonzero(np.diff(learnt.astype(int))) + 1
    parts = []
    for part in np.split(np.arange(len(learnt)), edges):
        text = tokenizer.decode(row.input_ids[part])
        parts.append(f"[[{text}]]" if learnt[part[0]] else text)
    return "".join(parts)


def golden(name: str) -> dict[str, list[str]]:
    """Conversation -> texts of its rows; in the file they stand under "## conversation", with "----" between."""
    sections = (FOLDER / f"{name}.golden").read_text().split("## ")[1:]
    named = (section.split("\n", 1) for section in sections)
    return {title: [text.removesuffix("\n") for text in body.split("----\n")] for title, body in named}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_labelled_text_is_the_golden_one(family, name, conversation):
    tokenizer = family(name)
    (encoded,) = encode_rows(tokenizer, read_rows([CONVERSATIONS[conversation]]))
    assert [shown(tokenizer, row) for row in encoded.rows] == golden(name)[conversation]
    dropped = conversation == "reasoning" and name not in ("qwen3", "deepseek_r1")
    assert encoded.notes == ({NO_REASONING: 2} if dropped else {})


@pytest.mark.parametrize("conversation", [*CONVERSATIONS, *MORE])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_is_learnt_once_after_the_prompt_of_a_model_in_use(family, name, conversation):
    """The prompts are transformers' own renderings of the messages before a turn, as a server gets them."""
    tokenizer = family(name)
    row = (CONVERSATIONS | MORE)[conversation]
    (encoded,) = encode_rows(tokenizer, read_rows([row]))
    starts = []
    for tokens in encoded.rows:
        learnt = np.r_[False, tokens.labels != IGNORE_INDEX, False]
        edges = np.flatnonzero(learnt[1:] != learnt[:-1])
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            starts.append((tokenizer.decode(tokens.input_ids[:first]), tokenizer.decode(tokens.input_ids[first:last])))
    wanted = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    assert encoded.turns == len(wanted) == len(starts)
    for number in wanted:
        prompt = rendered(tokenizer, name, row, number)
        (answer,) = (answer for start, answer in starts if start == prompt)
        message = row["messages"][number]
        assert answer.endswith(tokenizer.eos_token)
        assert (message["content"] or "get_weather") in answer
        if "reasoning_content" in message and name in ("qwen3", "deepseek_r1"):
            assert message["reasoning_content"] in answer.split("</think>")[0]


def rendered(tokenizer, name: str, row: dict, number: int) -> str:
    """The prompt of the turn of that number. ChatML and DeepSeek take tools as text; DeepSeek takes arguments so."""
    messages = [dict(message) for message in row["messages"][:number]]
    tools = [{"type": "function", "function": tool} for tool in row.get("tools", [])]
    if tools and name not in TAKES_TOOLS:
        messages.insert(0, turn("system", json.dumps(row["tools"])))
    for message in messages:
        if "tool_calls" in message and name == "chatml":
            message["content"] = json.dumps(message.pop("tool_calls"))
        elif "tool_calls" in message and name == "deepseek_r1":
            functions = [one["function"] for one in message["tool_calls"]]
            texts = [{**function, "arguments": json.dumps(function["arguments"])} for function in functions]
            message["tool_calls"] = [{"type": "function", "function": function} for function in texts]
        elif "tool_calls" in message:
            message["content"] = ""
    taken = tools if name in TAKES_TOOLS and tools else None
    return tokenizer.apply_chat_template(messages, tools=taken, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("conversation", [*CONVERSATIONS, *MORE])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_begins_with_the_tokens_of_its_prompt(family, name, conversation):
    tokenizer = family(name)
    (example,) = read_rows([(CONVERSATIONS | MORE)[conversation]])
    (encoded,) = encode_rows(tokenizer, [example])
    prompt = encode_prompt(tokenizer, example.messages[:-1], tools=example.tools)
    last = encoded.rows[-1]
    assert last.input_ids[: len(prompt)].tolist() == prompt
    assert last.labels[len(prompt)] == last.input_ids[len(prompt)] and last.labels[len(prompt) - 1] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("name", "takes_tools", "reasoning_key", "calls", "closing"),
    [
        ("chatml", False, "", None, "<|im_end|>"),
        ("qwen2_5", True, "", (False, ""), "<|im_end|>"),
        ("qwen3", True, "reasoning_content", (False, ""), "<|im_end|>"),
        ("llama3_1", True, "", (False, ""), "<|eot_id|>"),
        ("deepseek_r1", False, "", (True, None), "<｜end▁of▁sentence｜>"),
        ("mistral", True, "", (False, ""), "</s>"),
        ("hermes", True, "", (False, ""), "<|im_end|>"),
    ],
)
def test_what_a_template_takes_is_found_out(family, name, takes_tools, reasoning_key, calls, closing):
    chat = ChatFormat.of(family(name), with_tools=True)
    found = (chat.takes_tools, chat.reasoning_key, chat.calls and tuple(chat.calls), chat.closing)
    assert found == (takes_tools, reasoning_key, calls, closing)


def test_conversations_that_become_several_rows_are_counted(family):
    rows = read_rows([CONVERSATIONS["multi"], CONVERSATIONS["single"]])
    store, report = prepare_rows(rows, family("qwen3"), Preparation(seq_length=512))
    assert (report.rows, report.kept, report.turns, report.conversations_split) == (2, 3, 3, 1)
    assert [row.where for row in store] == ["row 1", "row 1", "row 2"]
    assert (
        "  conversations that became several rows: 1; their chat template shows past turns otherwise than they are "
        "written"
    ) in report.lines()
    _, report = prepare_rows(read_rows([CONVERSATIONS["reasoning"]]), family("chatml"), Preparation(seq_length=512))
    assert f"  {NO_REASONING}: 2 of 2" in report.lines()


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "hermes"])
def test_calls_of_sharegpt_are_the_calls_of_openai(family, name):
    """As LLaMA-Factory's data has them: tools and calls as JSON in texts, in turns of their own roles."""
    openai = CONVERSATIONS["tools"]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Weather in Rome?"},
            {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": {"city": "Rome"}})},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "tools": json.dumps([TOOL]),
    }
    encoded = encode_rows(family(name), read_rows([openai]) + read_rows([sharegpt]))
    ours, theirs = ([(row.input_ids.tolist(), row.labels.tolist()) for row in each.rows] for each in encoded)
    assert ours == theirs


def test_past_reasoning_stays_where_only_tools_came_between(family):
    """Qwen3 shows the reasoning of all turns after the last question: one row holds them."""
    messages = [dict(message) for message in CONVERSATIONS["tools"]["messages"]]
    messages[1]["reasoning_content"] = "look it up"
    messages[3]["reasoning_content"] = "say it"
    tokenizer = family("qwen3")
    (encoded,) = encode_rows(tokenizer, read_rows([{"messages": messages, "tools": [TOOL]}]))
    (row,) = encoded.rows
    text = shown(tokenizer, row)
    assert "[[<think>\nlook it up\n</think>\n\n<tool_call>" in text
    assert "[[<think>\nsay it\n</think>\n\nIt is sunny.<|im_end|>]]" in text
