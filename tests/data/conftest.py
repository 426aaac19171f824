"""Tiny tokenizers, made by hand so that every id is known: one id per byte, a few merges, the special tokens."""

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# {% generation %} marks what transformers' own return_assistant_tokens_mask takes for the assistant's.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "h"), ("i", "s"), ("Ċ", "Ċ"), ("è", "°"), ("è°", "ģ")]


def byte_level(
    chat_template: str | dict[str, str] | None,
    specials: Sequence[str] = SPECIALS,
    eos_token: str = SPECIALS[0],
    bos_token: str | None = None,
) -> PreTrainedTokenizerFast:
    """bos_token: written by templates alone."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As Llama 3 has it: offsets leave white space out.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    others = [token for token in specials if token not in (eos_token, bos_token)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos_token, bos_token=bos_token, additional_special_tokens=others
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def chatml():
    return byte_level(CHATML)


@pytest.fixture(scope="session")
def plain():
    """No chat template, no BOS: Qwen's base models are like this."""
    return byte_level(None)


@pytest.fixture
def with_template():
    """Make a tokenizer with a template of the test's own."""
    return byte_level


@pytest.fixture(scope="session")
def llama():
    """SentencePiece-like: "▁" for spaces, one put before the text, bytes for what is unknown, BOS by default."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *map(chr, range(33, 127)), "▁h", "Re", "is"]
    merges = [("▁", "h"), ("R", "e"), ("i", "s")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
