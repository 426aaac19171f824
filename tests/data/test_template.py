"""Labels are exact to the token: the tables are the contract, transformers' own mask is the independent side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ms.data import template
from lora_ms.data.example import IGNORE_INDEX, Example, Message
from lora_ms.data.template import encode, encode_prompt, encode_text
from lora_ms.errors import LoraMsError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
IM_START, IM_END, END_OF_TEXT = 262, 263, 261

# Shows the reasoning of the last turn only, and gives that turn an empty one when it has none.
QWEN3_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens the reasoning in the prompt and drops it from every turn.
DEEPSEEK_LIKE = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}"
    "{% else %}A:{{ m.content.split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:<think>\n{% endif %}"
)
DEEPSEEK_LIKE_WITHOUT_OPENING = DEEPSEEK_LIKE.replace("<think>\n{% endif %}", "{% endif %}")
NO_END_TOKEN = (
    "{% for m in messages %}{{ 'Human: ' if m.role == 'user' else 'Assistant:' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}"


def example(*contents: str, system: str | None = None, input: str = "") -> Example:
    """Contents alternate between user and assistant."""
    turns = [Message(USER if index % 2 == 0 else ASSISTANT, content) for index, content in enumerate(contents)]
    return Example("row 1", tuple([Message(SYSTEM, system)] if system else []) + tuple(turns), input)


def learnt(tokenizer, row) -> list[str]:
    """The text of every run of labelled tokens; labels must repeat the ids."""
    runs, mask = [], row.labels != IGNORE_INDEX
    np.testing.assert_array_equal(row.labels[mask], row.input_ids[mask])
    for start in np.flatnonzero(mask & ~np.r_[False, mask[:-1]]):
        length = np.argmin(np.r_[mask[start:], False])
        runs.append(tokenizer.decode(row.input_ids[start : start + length]))
    return runs


def test_tokens_and_labels_of_one_turn_as_numbers(chatml):
    (row,) = encode(chatml, example("é", "is h"))
    # Byte-level pieces in order of code point: "!" is 0, so "u" is 84; the two bytes of "é" are 127 and 102.
    newline, user, assistant = 198, [84, 82, 68, 81], [64, 82, 82, 257, 83, 64, 77, 83]
    answer = [257, 256]  # "is", " h"
    head = [IM_START, *user, newline, 127, 102, IM_END, newline, IM_START, *assistant, newline]
    assert row.input_ids.tolist() == [*head, *answer, IM_END, newline]
    assert row.labels.tolist() == [-100] * len(head) + [*answer, IM_END, -100]
    assert (row.where, row.input_ids.dtype, row.labels.dtype) == ("row 1", np.int32, np.int32)


@pytest.mark.parametrize(
    "conversation, text, labelled",
    [
        (
            example("hi", "his name is"),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhis name is<|im_end|>\n",
            ["his name is<|im_end|>"],
        ),
        (
            example("hi", "yes", "so?", "no", system="be short"),
            "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            "yes<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n",
            ["yes<|im_end|>", "no<|im_end|>"],
        ),
        (
            example("你是谁?", "臣妾是甄嬛,\n家父是大理寺少卿。"),
            "<|im_start|>user\n你是谁?<|im_end|>\n<|im_start|>assistant\n臣妾是甄嬛,\n家父是大理寺少卿。<|im_end|>\n",
            ["臣妾是甄嬛,\n家父是大理寺少卿。<|im_end|>"],
        ),
    ],
    ids=["single turn", "multi-turn with system", "Chinese"],
)
def test_chat_template(chatml, conversation, text, labelled):
    (row,) = encode(chatml, conversation)
    assert chatml.decode(row.input_ids) == text
    assert learnt(chatml, row) == labelled
    independent = chatml.apply_chat_template(
        [message._asdict() for message in conversation.messages], return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.input_ids.tolist() == independent["input_ids"]
    assert (row.labels != IGNORE_INDEX).astype(int).tolist() == independent["assistant_masks"]


def test_alpaca_input_joins_the_question_in_a_chat_template(chatml):
    (row,) = encode(chatml, example("Translate.\n谢谢", "thanks", input="谢谢"))
    assert chatml.decode(row.input_ids) == (
        "<|im_start|>user\nTranslate.\n谢谢<|im_end|>\n<|im_start|>assistant\nthanks<|im_end|>\n"
    )


ALPACA = "Below is an instruction that describes a task"
COMPLETE = "Write a response that appropriately completes the request.\n\n"


@pytest.mark.parametrize(
    "conversation, text, labelled",
    [
        (
            example("Say hi.", "hi"),
            f"{ALPACA}. {COMPLETE}### Instruction:\nSay hi.\n\n### Response:\nhi<|endoftext|>",
            ["hi<|endoftext|>"],
        ),
        (
            example("翻译\n谢谢", "thanks", input="谢谢"),
            f"{ALPACA}, paired with an input that provides further context. {COMPLETE}"
            "### Instruction:\n翻译\n\n### Input:\n谢谢\n\n### Response:\nthanks<|endoftext|>",
            ["thanks<|endoftext|>"],
        ),
        (
            example("a", "b", "c", "d", system="你是一个助手。"),
            "你是一个助手。\n\n### Instruction:\na\n\n### Response:\nb<|endoftext|>\n\n"
            "### Instruction:\nc\n\n### Response:\nd<|endoftext|>",
            ["b<|endoftext|>", "d<|endoftext|>"],
        ),
    ],
    ids=["without input", "with input", "history and system"],
)
def test_alpaca_prompt_without_a_chat_template(plain, conversation, text, labelled):
    (row,) = encode(plain, conversation)
    assert plain.decode(row.input_ids) == text
    assert learnt(plain, row) == labelled


def test_alpaca_prompt_has_bos_where_the_tokenizer_adds_it(llama):
    (row,) = encode(llama, example("Say his", "his 名"))
    text = f"{ALPACA}. {COMPLETE}### Instruction:\nSay his\n\n### Response:\nhis 名"
    whole = llama(text).input_ids  # the tokenizer's own BOS and prefix space, nothing of ours
    assert row.input_ids.tolist() == [*whole, llama.eos_token_id]
    assert whole[0] == llama.bos_token_id
    assert row.labels[-1] == llama.eos_token_id
    assert np.count_nonzero(row.labels != IGNORE_INDEX) == len(["h", "is", "▁", *"名".encode(), "</s>"])
    assert row.labels[0] == IGNORE_INDEX


@pytest.mark.parametrize(
    "template, contents",
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}", ("a", "b")),
        ("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", ("a", "b", "c", "d")),
        (NO_END_TOKEN, ("a", "b", "c", "d")),
        (QWEN3_LIKE, ("a", "b", "c", "d")),
        (DEEPSEEK_LIKE, ("a", "<think>x</think>b")),
        (None, ("a", "b")),
    ],
    ids=["ChatML", "eos", "no end token", "Qwen3", "DeepSeek", "Alpaca"],
)
def test_the_last_labelled_token_is_an_end_token(with_template, template, contents):
    tokenizer = with_template(template)
    for row in encode(tokenizer, example(*contents)):
        last = np.flatnonzero(row.labels != IGNORE_INDEX)[-1]
        assert row.labels[last] in (END_OF_TEXT, IM_END)
        assert row.labels[last] == row.input_ids[last]


def test_eos_is_appended_where_the_template_ends_with_none(with_template):
    tokenizer = with_template(NO_END_TOKEN)
    (row,) = encode(tokenizer, example("hi", "yes", "so", "no"))
    assert tokenizer.decode(row.input_ids) == "Human: hi\nAssistant:yes\nHuman: so\nAssistant:no\n<|endoftext|>"
    assert learnt(tokenizer, row) == ["yes\n", "no\n<|endoftext|>"]


def test_no_end_token_at_all_is_an_error(with_template):
    tokenizer = with_template(NO_END_TOKEN)
    tokenizer.eos_token = None
    with pytest.raises(LoraMsError) as error:
        encode(tokenizer, example("hi", "yes"))
    assert str(error.value) == "the tokenizer has no end token; set eos_token in its tokenizer_config.json"


def test_a_token_that_would_reach_over_the_boundary_is_split_as_in_generation(with_template):
    # The prompt ends in a newline and the answer begins with two: tokenised whole, the first two are one token.
    tokenizer = with_template(
        "{% for m in messages %}{{ '\n' if m.role == 'assistant' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    )
    assert tokenizer.tokenize("\n\n\nb") == ["ĊĊ", "Ċ", "b"]
    (row,) = encode(tokenizer, example("a", "\n\nb"))
    prompt = encode_prompt(tokenizer, [Message(USER, "a")])
    assert row.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["a", "<|im_end|>", "Ċ", "Ċ", "Ċ", "b", "<|im_end|>"]
    assert learnt(tokenizer, row) == ["\n\nb<|im_end|>"]


def test_a_turn_whose_reasoning_the_template_drops_later_gets_a_row_of_its_own(with_template):
    tokenizer = with_template(QWEN3_LIKE)
    first, second = encode(tokenizer, example("a", "<think>\nx\n</think>\n\nb", "c", "d"))
    assert tokenizer.decode(first.input_ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\nb<|im_end|>\n"
    )
    assert learnt(tokenizer, first) == ["<think>\nx\n</think>\n\nb<|im_end|>"]
    assert tokenizer.decode(second.input_ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n"
    )
    assert learnt(tokenizer, second) == ["<think>\n\n</think>\n\nd<|im_end|>"]


@pytest.mark.parametrize(
    "answer, labelled",
    [
        ("<think>\nwhy\n</think>\n\nb", "why\n</think>\n\nb<|endoftext|>"),
        ("<think>why</think>b", "why</think>b<|endoftext|>"),
        ("b", "\n</think>\n\nb<|endoftext|>"),
    ],
    ids=["reasoning", "reasoning without newlines", "none"],
)
def test_a_prompt_that_opens_the_reasoning_is_continued_by_the_answer(with_template, answer, labelled):
    tokenizer = with_template(DEEPSEEK_LIKE)
    first, row = encode(tokenizer, example("a", "x", "c", answer))
    assert tokenizer.decode(first.input_ids) == "U:aA:<think>\n\n</think>\n\nx<|endoftext|>"
    assert tokenizer.decode(row.input_ids) == f"U:aA:x<|endoftext|>U:cA:<think>\n{labelled}"
    assert learnt(tokenizer, row) == [labelled]


@pytest.mark.parametrize(
    "contents, expected",
    [
        (
            ("a", "<think>x</think>b"),
            [("U:aA:<think>x</think>b<|endoftext|>", ["<think>x</think>b<|endoftext|>"])],
        ),
        (
            ("a", "b", "c", "d"),
            [("U:aA:b<|endoftext|>U:cA:d<|endoftext|>", ["b<|endoftext|>", "d<|endoftext|>"])],
        ),
        (
            ("a", "b", "c", "<think>x</think>d", "e", "f"),
            [
                ("U:aA:b<|endoftext|>U:cA:<think>x</think>d<|endoftext|>", ["<think>x</think>d<|endoftext|>"]),
                ("U:aA:b<|endoftext|>U:cA:d<|endoftext|>U:eA:f<|endoftext|>", ["b<|endoftext|>", "f<|endoftext|>"]),
            ],
        ),
    ],
    ids=["in the last turn", "none", "in a past turn, which gets a row of its own"],
)
def test_reasoning_that_the_template_drops_from_every_turn(with_template, contents, expected):
    tokenizer = with_template(DEEPSEEK_LIKE_WITHOUT_OPENING)
    rows = encode(tokenizer, example(*contents))
    assert [(tokenizer.decode(row.input_ids), learnt(tokenizer, row)) for row in rows] == expected


@pytest.mark.parametrize("name", ["chatml", "plain", "llama"])
def test_training_and_chat_share_the_prompt(request, name):
    tokenizer = request.getfixturevalue(name)
    conversation = example("你好", "is his", "a\nb", "c", system="s")
    (row,) = encode(tokenizer, conversation)
    prompt = encode_prompt(tokenizer, conversation.messages[:-1])
    assert row.input_ids[: len(prompt)].tolist() == prompt
    assert np.all(row.labels[len(prompt) - 1 :][:1] == IGNORE_INDEX)
    assert row.labels[len(prompt)] == row.input_ids[len(prompt)]


def test_prompt_of_an_alpaca_row_with_input(plain):
    conversation = example("翻译\n谢谢", "thanks", input="谢谢")
    (row,) = encode(plain, conversation)
    prompt = encode_prompt(plain, conversation.messages[:-1], input="谢谢")
    assert row.input_ids[: len(prompt)].tolist() == prompt
    assert set(row.labels[: len(prompt)]) == {IGNORE_INDEX}


def test_encode_text(chatml, llama):
    assert chatml.decode(encode_text(chatml, "你是谁", system="s")) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n你是谁<|im_end|>\n<|im_start|>assistant\n"
    )
    assert llama.decode(encode_text(llama, "his")) == (
        f"<s> {ALPACA}. {COMPLETE}### Instruction:\nhis\n\n### Response:\n"
    )


def test_text_that_holds_the_end_token_keeps_its_label(plain):
    # pad = eos masked by id would lose both; here labels go by position.
    (row,) = encode(plain, example("a", "b<|endoftext|>c"))
    assert learnt(plain, row) == ["b<|endoftext|>c<|endoftext|>"]


def test_a_template_that_refuses_the_messages_is_one_line(with_template):
    with pytest.raises(LoraMsError) as error:
        encode(with_template(REFUSES_SYSTEM), example("a", "b", system="s"))
    assert str(error.value) == "row 1: the chat template refuses the messages: no system"


def split_at(tokenizer, text: str, edges: list[int]) -> tuple[list[int], list[int]]:
    """What the positions of edges are, by tokenising all the text before each."""
    done, start, positions = [], 0, []
    rest = tokenizer(text, add_special_tokens=False).input_ids
    for edge in edges:
        head = tokenizer(text[start:edge], add_special_tokens=False).input_ids
        positions.append(len(done) + len(head))
        if head != rest[: len(head)]:
            done, start = [*done, *head], edge
            rest = tokenizer(text[edge:], add_special_tokens=False).input_ids
    return [*done, *rest], positions


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_edges_are_where_all_the_text_before_them_ends(chatml, llama, data):
    tokenizer = data.draw(st.sampled_from((chatml, llama)))
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    words = st.sampled_from([*special, " is", "is", "h", " ", "\n", "\n\n", "é", "user", "<", "|"])
    text = "".join(data.draw(st.lists(words, max_size=14)))
    edges = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=5)))
    assert template._tokenise(tokenizer, text, edges) == split_at(tokenizer, text, edges)


def test_a_long_conversation_is_not_tokenised_anew_for_each_turn(chatml, monkeypatch):
    read = []
    ids = template._ids
    monkeypatch.setattr(
        template, "_ids", lambda tokenizer, texts: read.extend(map(len, texts)) or ids(tokenizer, texts)
    )
    for turns in (20, 200):
        read.clear()
        encode_prompt(chatml, example(*["is h is h"] * turns, "h").messages)
        assert sum(read) < 120 * turns
