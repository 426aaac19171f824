"""A GGUF's vocabulary as a tokenizer of Hugging Face's, and the reverse.

Two kinds: byte-level BPE, whose way of cutting a text into words llama.cpp knows by a name (``tokenizer.ggml.pre``),
and SentencePiece's BPE (Llama 2), whose merges follow from the scores of its pieces.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ms.errors import LoraMsError
from lora_ms.gguf.files import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens in a GGUF
SPACE = "\u2581"  # SentencePiece's sign for a space
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name -> how a text is cut: a regular expression (None: GPT-2's own), and whether digits stand alone
CUTS: dict[str, tuple[str | None, bool]] = {
    "llama-bpe": (_WORDS.replace("DIGITS", r"\p{N}{1,3}"), False),
    "qwen2": (_WORDS.replace("DIGITS", r"\p{N}"), False),
    "smollm": (None, True),
    "gpt-2": (None, False),
}
SAME_CUT = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "default": "gpt-2"}
COMPOSED = ("qwen2",)  # texts are composed (NFC) before they are cut


def tokenizer_of(file: GgufFile, longest: int) -> "PreTrainedTokenizerBase":
    """The tokenizer that ``file`` describes. longest: tokens that the model takes.

    Raises:
        LoraMsError: a kind that is not known, or tokens that contradict each other.
    """
    from transformers import PreTrainedTokenizerFast

    kind = file.value("tokenizer.ggml.model", str)
    tokens = texts_of(file, "tokenizer.ggml.tokens")
    kinds = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(set(tokens)) != len(tokens):
        raise file.fault("tokenizer.ggml.tokens holds a token twice")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise file.fault("tokenizer.ggml.token_type and tokens are of different lengths")
    if kind == "gpt2":
        backend = _byte_level(file, tokens)
    elif kind == "llama":
        backend = _sentence_piece(file, tokens)
    else:
        raise file.fault(
            f"its tokenizer is of the kind {kind!r}, and gpt2 and llama are read: give --load_checkpoint, a folder "
            "with the model's tokenizer"
        )
    named = {
        name: tokens[number]
        for name, number in (
            ("bos_token", _id(file, "bos", tokens)),
            ("eos_token", _id(file, "eos", tokens)),
            ("unk_token", _id(file, "unknown", tokens)),
            ("pad_token", _id(file, "padding", tokens)),
        )
        if number is not None
    }
    _add_tokens(backend, tokens, kinds)
    if file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in named:
        backend.post_processor = _begins_with(named["bos_token"], tokens)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=longest, clean_up_tokenization_spaces=False, **named
    )
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def texts_of(file: GgufFile, key: str) -> list[str]:
    """A list of texts. Raises LoraMsError where it is something else."""
    found = file.metadata.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise file.fault(f"{key} is missing, or no list of texts")
    return found


def _id(file: GgufFile, name: str, tokens: list[str]) -> int | None:
    number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
        raise file.fault(f"tokenizer.ggml.{name}_token_id {number!r:.40} is no token of {len(tokens):,}")
    return number


def _byte_level(file: GgufFile, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    cut = SAME_CUT.get(pre, pre)
    if cut not in CUTS:
        raise file.fault(
            f"its texts are cut in the way {pre!r}, and {', '.join((*CUTS, *SAME_CUT))} are known: give "
            "--load_checkpoint, a folder with the model's tokenizer"
        )
    merges = [tuple(line.split(" ")) for line in texts_of(file, "tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in merges):
        raise file.fault("tokenizer.ggml.merges holds a line that is no pair")
    backend = Tokenizer(
        models.BPE(
            vocab={text: number for number, text in enumerate(tokens)},
            merges=merges,
            ignore_merges=cut == "llama-bpe",
        )
    )
    words, digits = CUTS[cut]
    parts: list[Any] = []
    if digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if words is not None:
        parts.append(pre_tokenizers.Split(Regex(words), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if cut in COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(file: GgufFile, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise file.fault("tokenizer.ggml.scores and tokens are of different lengths")
    vocab = {text: number for number, text in enumerate(tokens)}
    unknown = _id(file, "unknown", tokens)
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_of(vocab, scores),
            unk_token=tokens[0 if unknown is None else unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def merges_of(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every way to make a piece of two others, the best-scored piece first."""
    found = []
    for piece, number in vocab.items():
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in vocab and right in vocab:
                found.append((-scores[number], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(backend: Any, tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    special = [text for text, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL)]
    plain = [text for text, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in plain])


def _begins_with(text: str, tokens: list[str]) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{text} $A", pair=f"{text} $A {text}:1 $B:1", special_tokens=[(text, tokens.index(text))]
    )


# --- the reverse


def metadata_of(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, where: Path) -> dict[str, Any]:
    """A tokenizer as a GGUF holds it, filled up to ``vocab_size`` tokens.

    Raises:
        LoraMsError: llama.cpp has no name for the way in which it cuts a text.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = state["model"]
    if model["type"] != "BPE":
        raise LoraMsError(f"{where}: the tokenizer is of the kind {model['type']}; GGUF is written for BPE")
    vocab: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in state["added_tokens"]}
    vocab |= {text: token["id"] for text, token in added.items()}
    if max(vocab.values()) >= vocab_size:
        raise LoraMsError(f"{where}: the tokenizer has token {max(vocab.values())}, the model {vocab_size} of them")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    pieces = _is_sentence_piece(state)
    for text, number in vocab.items():
        tokens[number] = text
        kinds[number] = _kind(text, added.get(text), pieces, tokenizer.unk_token)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    if pieces:
        found["tokenizer.ggml.pre"] = "default"
        found["tokenizer.ggml.scores"] = _scores(tokens, merges)
        found["tokenizer.ggml.add_space_prefix"] = "Prepend" in json.dumps(state["normalizer"]) or _prepends(state)
    else:
        found["tokenizer.ggml.pre"] = cut_of(state, where)
        if merges:
            found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    ids = (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id))
    for name, number in (*ids, ("unknown", tokenizer.unk_token_id)):
        if number is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = int(number)
    probe = tokenizer("a").input_ids
    begins = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
    found["tokenizer.ggml.add_bos_token"] = bool(begins)
    return found


def _kind(text: str, added: Mapping[str, Any] | None, pieces: bool, unknown: str | None) -> int:
    if pieces and text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    if pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return NORMAL


def _is_sentence_piece(state: Mapping[str, Any]) -> bool:
    return bool(state["model"].get("byte_fallback")) and SPACE in json.dumps(
        [state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False
    )


def _prepends(state: Mapping[str, Any]) -> bool:
    return (state["pre_tokenizer"] or {}).get("prepend_scheme", "never") != "never"


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that make the merges again: a piece that is made earlier has a higher one."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank[text]) if text in rank else -1e6 if len(text) == 1 else 0.0 for text in tokens]


def cut_of(state: Mapping[str, Any], where: Path) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer cuts a text into words.

    Raises:
        LoraMsError: it has none.
    """
    pre = state["pre_tokenizer"] or {}
    parts = pre.get("pretokenizers", [pre])
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    plain = kinds[-1] == "ByteLevel" and not last.get("add_prefix_space")
    for name, (words, digits) in CUTS.items():
        wanted = ["Digits"] * digits + ["Split"] * (words is not None) + ["ByteLevel"]
        if not plain or kinds != wanted or last.get("use_regex", True) != (words is None):
            continue
        if digits and not parts[0].get("individual_digits"):
            continue
        split = next((part for part in parts if part.get("type") == "Split"), None)
        if split is None or split.get("pattern") == {"Regex": words}:
            return name
    raise LoraMsError(
        f"{where}: its tokenizer cuts a text in a way that llama.cpp has no name for ({', '.join(map(str, kinds))}): "
        "the model would be fed other tokens there than it was trained on, so no GGUF is written"
    )
