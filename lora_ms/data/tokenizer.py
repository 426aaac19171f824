"""Tokenizers, which are transformers' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ms.errors import LoraMsError
from lora_ms.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, or of a tokenizer file in one.

    Raises:
        LoraMsError: there is none, or transformers cannot read it.
    """
    # transformers advises to install torch when it is imported without; nothing here needs it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not (folder / "tokenizer_config.json").is_file():
        raise LoraMsError(f"{path}: no tokenizer here (tokenizer_config.json is missing)")
    try:
        if int(transformers.__version__.split(".")[0]) < 5:
            return _load(folder)
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise LoraMsError(f"{path}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from error


def _load(folder: Path) -> PreTrainedTokenizerBase:
    """With transformers 4, which does not know what version 5 writes: a list of extra tokens, a class of a new name."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = read_json(folder / "tokenizer_config.json")
    extra = settings.get("extra_special_tokens")
    changes: dict[str, Any] = {}
    if isinstance(extra, list):
        texts = [token["content"] if isinstance(token, dict) else token for token in extra]
        changes = {"extra_special_tokens": {}, "additional_special_tokens": texts}
    kind = PreTrainedTokenizerFast if settings.get("tokenizer_class") == "TokenizersBackend" else AutoTokenizer
    return kind.from_pretrained(str(folder), local_files_only=True, **changes)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer's files into ``folder``. Raises OSError."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no other
        raise OSError(f"the tokenizer: {error}") from None


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Id to fill rows with. Padding goes by length, so any id will do; 0 where the tokenizer has none."""
    if tokenizer is None or tokenizer.pad_token_id is None:
        return 0
    return tokenizer.pad_token_id
