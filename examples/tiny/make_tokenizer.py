"""Train the bundled tiny model's tokenizer: byte-level BPE of exactly 2048 tokens, in ChatML.

    python make_tokenizer.py --corpus DIR --out MODEL_DIR

DIR is what make_corpus.py wrote. MODEL_DIR gets tokenizer.json and tokenizer_config.json, which
``transformers.AutoTokenizer`` loads. Digits and Chinese characters are split singly: a number is then read digit by
digit, and a character is the same token wherever it stands. A model this small needs that to carry over what it learns.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
HAN_WEIGHT = 1000  # makes every Chinese character that occurs commoner than any merge of rare English pieces
EXAMPLE_WEIGHT = 20  # the example datasets are small beside the corpus; their English words deserve tokens too
MAX_LENGTH = 512  # tokens; the model's context

# No system prompt unless one is given: what a row says is all that the model sees.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def strings(value: object) -> Iterator[str]:
    """Every string within a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def texts_of(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [text for line in lines for text in strings(json.loads(line))]


def training_texts(corpus: Path) -> Iterator[str]:
    """The corpus once, the example datasets several times, and each Chinese character often enough to be a token."""
    own = texts_of(corpus / "train.jsonl")
    # A placeholder is replaced before training, so it must not win tokens of its own.
    examples = [
        re.sub(r"\{\{\w+\}\}", "", text) for path in sorted(EXAMPLES.glob("*.jsonl")) for text in texts_of(path)
    ]
    yield from own
    for _ in range(EXAMPLE_WEIGHT):
        yield from examples
    characters = sorted({c for text in own + examples for c in re.findall(r"[^\x00-\x7f]", text)})
    for character in characters:
        yield character * HAN_WEIGHT


def train(corpus: Path) -> Tokenizer:
    """A byte-level BPE tokenizer with ``VOCAB_SIZE`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\p{N}|\p{Han}|[\u3000-\u303f\uff00-\uffef\u2010-\u2027]"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(training_texts(corpus), trainer=trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(
            f"error: the corpus gives {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: "
            "make it with make_corpus.py and without --limit"
        )
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> PreTrainedTokenizerFast:
    """Write the transformers tokenizer directory; files of the same name are replaced, others are left."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=AddedToken("<|im_end|>", normalized=False, special=True),
        pad_token=AddedToken("<|endoftext|>", normalized=False, special=True),
        additional_special_tokens=["<|im_start|>"],
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as partial:
        # One file holds the template, so that a copy of tokenizer_config.json alone carries it.
        wrapped.save_pretrained(partial, save_jinja_files=False)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.move(Path(partial) / name, out / name)
    return wrapped


def mean_tokens(tokenizer: PreTrainedTokenizerFast, corpus: Path) -> float:
    """Mean length of a training row in tokens, its template included."""
    with (corpus / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    return sum(len(ids) for ids in tokenizer(rows)["input_ids"]) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model's tokenizer.")
    parser.add_argument("--corpus", type=Path, required=True, help="the folder that make_corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    args = parser.parse_args()
    if not (args.corpus / "train.jsonl").is_file():
        parser.error(f"no train.jsonl in {args.corpus}: run make_corpus.py --out {args.corpus} first")
    tokenizer = save(train(args.corpus), args.out)
    print(f"{len(tokenizer)} tokens in {args.out}; {mean_tokens(tokenizer, args.corpus):.1f} tokens a row")


if __name__ == "__main__":
    main()
