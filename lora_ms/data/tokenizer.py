"""Tokenizers, which are transformers' own."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ms import hf_folder
from lora_ms.errors import LoraMsError
from lora_ms.limits import limited
from lora_ms.reading import JSON_SIZE, member, opened, readable, too_large

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what transformers may open in a folder, besides config.json
FILES = (
    hf_folder.TOKENIZER_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"  # a folder of further ones
SECONDS = 60.0  # to build a tokenizer; the largest take two


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, or of a tokenizer file in one.

    No code of the directory runs, whatever its files ask for.

    Raises:
        LoraMsError: there is none, or transformers cannot read it.
    """
    # transformers advises to install torch when it is imported without; nothing here needs it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets tqdm advises to install them
        import transformers  # noqa: F401

    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not (folder / hf_folder.TOKENIZER_CONFIG).is_file():
        raise LoraMsError(f"{path}: no tokenizer here (tokenizer_config.json is missing)")
    settings = hf_folder.tokenizer_config(folder)
    check_files(folder)
    with readable(folder, "a tokenizer"), limited(f"{path}: the tokenizer", SECONDS):
        return _load(folder, settings)


def check_files(folder: Path) -> None:
    """Raises LoraMsError where a tokenizer's file lies outside its folder, is no regular file, or is too large."""
    names = [*FILES, *(f"{TEMPLATES}/{file.name}" for file in (folder / TEMPLATES).glob("*.jinja"))]
    for name in names:
        file = member(folder, name)
        if os.path.lexists(file):
            with opened(file) as stream:
                if os.fstat(stream.fileno()).st_size > JSON_SIZE:
                    raise too_large(file, JSON_SIZE)


def _load(folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    import transformers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # paths of the machine that wrote the file: transformers would read what stands there
    changes: dict[str, Any] = {key: _own(folder, settings[key]) for key in settings if key.endswith("_file")}
    before_5 = int(transformers.__version__.split(".")[0]) < 5
    extra = settings.get("extra_special_tokens")
    if before_5 and isinstance(extra, list):  # as version 5 writes them
        texts = [token["content"] if isinstance(token, dict) else token for token in extra]
        changes |= {"extra_special_tokens": {}, "additional_special_tokens": texts}
    kind = settings.get("tokenizer_class")
    if before_5 and kind == "TokenizersBackend":  # version 5's name
        return PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **changes
        )
    if kind is None and (model_type := _model_type(folder)):
        changes["tokenizer_type"] = model_type  # else transformers would look it up in config.json itself
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **changes)
    except ValueError as error:
        if "auto_map" in settings:
            raise LoraMsError(f"{folder}: the tokenizer needs code of its folder, which is never run") from error
        raise


def _own(folder: Path, value: Any) -> str | None:
    """The file of that name in the folder itself."""
    file = folder / Path(value).name if isinstance(value, str) else None
    return str(file) if file is not None and file.is_file() else None


def _model_type(folder: Path) -> str | None:
    """The kind of model that a folder's config.json names."""
    found = (folder / hf_folder.CONFIG).is_file()
    return hf_folder.model_config(folder).get("model_type") if found else None


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
