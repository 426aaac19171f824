"""Tokenizers, which are transformers' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, or of a tokenizer file in one.

    Raises:
        LoraMsError: there is none, or transformers cannot read it.
    """
    # transformers advises to install torch when it is imported without; nothing here needs it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not (folder / "tokenizer_config.json").is_file():
        raise LoraMsError(f"{path}: no tokenizer here (tokenizer_config.json is missing)")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoraMsError(f"{path}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from error


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Id to fill rows with. Padding goes by length, so any id will do; 0 where the tokenizer has none."""
    if tokenizer is None or tokenizer.pad_token_id is None:
        return 0
    return tokenizer.pad_token_id
