"""What the command line is given in these tests: the reference Qwen2, rows of its tokens, a tokenizer of its size."""

import json
import shutil
from pathlib import Path

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def token_rows(golden) -> list[dict]:
    """Eight rows of 5 to 16 tokens with unshifted labels."""
    values = golden("trace_qwen2")
    ids, labels = values["input_ids"].reshape(-1, 16), values["labels"].reshape(-1, 16)
    lengths = values["lengths"].ravel()[:8].tolist()
    return [{"input_ids": ids[i, :n].tolist(), "labels": labels[i, :n].tolist()} for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def rows_file(token_rows, tmp_path_factory) -> Path:
    """The same as a file."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", token_rows)


@pytest.fixture(scope="session")
def model(reference) -> Path:
    """The reference Qwen2 (vocabulary 128, end token 2), which has no tokenizer."""
    return reference / "models" / "qwen2"


@pytest.fixture(scope="session")
def text_model(model, tmp_path_factory) -> Path:
    """The same with a tokenizer of 99 entries: three special tokens, then one for each printable ASCII character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(model, folder)
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=pieces[2], pad_token=pieces[0], additional_special_tokens=[pieces[1]]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder
