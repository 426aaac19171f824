"""Where tokenised rows are kept on disk: a folder named by everything that decides them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ms import saving
from lora_ms.data.template import template_of
from lora_ms.errors import WriteError
from lora_ms.runtime import host

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 5  # raised when the same rows would become other tokens


def folder_of(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase | None, preparation: Mapping[str, Any]) -> Path:
    """The folder of the tokens that these files become."""
    return host.cache_folder("tokens") / key_of(files, tokenizer, preparation)


def key_of(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase | None, preparation: Mapping[str, Any]) -> str:
    """A name for the tokens: a digest of the files' contents, the tokenizer with its template, and the preparation.

    preparation: the fields of a ``pipeline.Preparation``.
    """
    settings = json.dumps(preparation, sort_keys=True, default=dict)
    digest = blake2b(f"{VERSION} {settings}".encode(), digest_size=16)
    if tokenizer is not None:
        texts = [tokenizer.chat_template or template_of(tokenizer), str(tokenizer.eos_token), str(tokenizer.bos_token)]
        digest.update(json.dumps(texts).encode())
        if tokenizer.is_fast:
            digest.update(tokenizer.backend_tokenizer.to_str().encode())
        else:
            digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for file in files:
        with open(file, "rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size} ".encode(errors="surrogateescape"))
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder: another process, such as another card's, waits and then finds the work done.

    Raises:
        WriteError: a file in it cannot be used, here or in the block.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with saving.locked(folder, wait=True):
            yield
    except OSError as error:
        raise WriteError(f"cannot use the cache {folder}: {error.strerror}: {error.filename or ''}") from None
