"""Text as it streams is the text of all tokens: no half characters, and nothing of a stop string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_ms.infer.text_stream import StopStrings, TextStream

MODEL = "examples/tiny/model"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def byte_fallback():
    """As Llama 2's: words with a mark for the space before them, and bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "a"]
    backend = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def streamed(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.add(token) for token in tokens), stream.finish()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_the_parts_are_the_text(tokenizer, text):
    tokens = tokenizer(text).input_ids
    parts = streamed(TextStream(tokenizer), tokens)
    assert "".join(parts) == text == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 2047), max_size=40))
@example(tokens=[129, *[0] * 8, 908])  # a character's bytes around special tokens,
@example(tokens=[*[97] * 5, 129, 908, 97, 97])  # and among bytes of none
def test_any_tokens_give_their_text(tokenizer, tokens):
    parts = streamed(TextStream(tokenizer), tokens)
    assert "".join(parts) == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=100, deadline=None)
@given(text=st.text("a世界🙂é Hello", max_size=12))
def test_bytes_of_characters_wait_for_their_last(byte_fallback, text):
    tokens = byte_fallback(text).input_ids
    parts = streamed(TextStream(byte_fallback), tokens)
    assert "".join(parts) == byte_fallback.decode(tokens)
    assert "\ufffd" not in "".join(parts)


def test_a_completion_keeps_the_space_before_its_first_word(byte_fallback):
    hello, world = byte_fallback.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert "".join(streamed(TextStream(byte_fallback, prompt=[hello]), [world])) == " world"
    assert "".join(streamed(TextStream(byte_fallback), [world])) == "world"


def test_an_emoji_comes_whole(tokenizer):
    tokens = tokenizer("🙂").input_ids
    assert len(tokens) > 1
    assert streamed(TextStream(tokenizer), tokens) == [*[""] * (len(tokens) - 1), "🙂", ""]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text("ab#", max_size=4), max_size=8),
    stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_never_show(parts, stops):
    strings, shown = StopStrings(stops), ""
    for part in parts:
        shown += strings.add(part)
        assert not any(stop in shown for stop in stops)
    shown += strings.flush()
    whole = "".join(parts)
    assert whole.startswith(shown)
    assert strings.found == any(stop in whole for stop in stops)
    if not strings.found:
        assert shown == whole
    else:
        assert any(whole.startswith(shown + stop) for stop in stops)


def test_a_stop_string_in_the_middle_of_a_token(tokenizer):
    tokens = tokenizer("one two END three").input_ids
    stream = TextStream(tokenizer, ["END"])
    shown = ""
    for token in tokens:
        shown += stream.add(token)
        assert "E" not in shown
    assert (shown + stream.finish(), stream.stopped) == ("one two ", True)
