"""What a Hugging Face model folder holds, as transformers reads it.

Folders in the wild spell names in several ways, hold a head that config.json calls tied, or say in
generation_config.json alone which tokens end an answer. Every command reads them here, without MindSpore.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import VOCABULARY, ConfigJson, GenerationJson, TokenizerJson, check
from lora_ms.quant.folder import StoredNF4, split
from lora_ms.quant.int4_folder import StoredInt4, split_groups
from lora_ms.reading import CONFIG_SIZE, member, read_json
from lora_ms.storage import Entry

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
TIED = ("SmolLM3ForCausalLM",)  # architectures whose head is the embedding where config.json does not say
BIASED = {"Qwen2ForCausalLM": ("q_proj", "k_proj", "v_proj")}  # layers that have a bias, by architecture
BARE = ("embed_tokens.", "layers.", "norm.")  # how names begin that were saved from the decoder without its head
CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")  # generation_config.json's and ours


class ModelFolder(NamedTuple):
    """The weights of a folder.

    Fields:
        entries: tensors by transformers' names; the head only where it is another tensor than the embedding.
        tied: whether the head is the embedding.
        notices: lines for the user.
        quantised: of the entries, those that are stored in four bits; their shapes are those of the weights, and
            ``storage`` does not read them.
    """

    entries: dict[str, Entry]
    tied: bool
    notices: tuple[str, ...] = ()
    quantised: Mapping[str, StoredNF4 | StoredInt4] = {}


def model_config(path: Path) -> dict[str, Any]:
    """config.json of folder ``path``.

    Raises:
        LoraMsError: it cannot be read, or a value is out of bounds.
    """
    return check(ConfigJson, read_json(member(path, CONFIG), CONFIG_SIZE), path / CONFIG)


def tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json of folder ``path``. Raises as ``model_config``."""
    return check(TokenizerJson, read_json(member(path, TOKENIZER_CONFIG), CONFIG_SIZE), path / TOKENIZER_CONFIG)


def base_name(path: Path) -> str:
    """What an adapter names as its model: ``owner/name`` of a folder in the cache of Hugging Face's hub, else the path.

    There a model lies in ``models--OWNER--NAME/snapshots/COMMIT``.
    """
    parts = path.absolute().parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1)
    return str(path)


def says_tied(hf: Mapping[str, Any]) -> bool:
    """Whether config.json ``hf`` says that the head is the embedding; its family decides where it does not say."""
    architecture = (hf.get("architectures") or [""])[0]
    return bool(hf.get("tie_word_embeddings", architecture in TIED))


def open_model(path: Path, hf: Mapping[str, Any]) -> ModelFolder:
    """The weights of folder ``path``, whose config.json is ``hf``.

    Where config.json says tied and the folder holds both tensors, they decide: equal ones are tied, others are not.

    Raises:
        LoraMsError: no weights, or files that contradict each other.
    """
    biased = BIASED.get((hf.get("architectures") or [""])[0], ())
    entries, in_groups = split_groups(full_names(storage.open_dir(path)), hf.get("quantization_config"), biased)
    entries, in_nf4 = split(entries)
    quantised: dict[str, StoredNF4 | StoredInt4] = {**in_groups, **in_nf4}
    entries |= {name: weight.entry for name, weight in quantised.items()}
    folder = _with_head(path, hf, entries)
    return folder._replace(quantised=quantised)


def _with_head(path: Path, hf: Mapping[str, Any], entries: dict[str, Entry]) -> ModelFolder:
    if not says_tied(hf) or HEAD not in entries:
        return ModelFolder(entries, says_tied(hf))
    if EMBEDDING not in entries:
        entries[EMBEDDING] = entries.pop(HEAD)
        return ModelFolder(entries, True)
    if same_numbers(entries[HEAD], entries[EMBEDDING]):
        del entries[HEAD]
        return ModelFolder(entries, True)
    return ModelFolder(entries, False, (untied_notice(path),))


def untied_notice(path: Path) -> str:
    """What is said of a head that config.json calls tied and that is not."""
    return f"{path}: lm_head.weight is not the embedding, although tie_word_embeddings is true: it is used as stored"


def full_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """``entries`` with ``model.`` before the names that lack it; a name that is taken then stays as it is."""
    full = {}
    for name, entry in entries.items():
        wanted = f"model.{name}" if name.startswith(BARE) else name
        full[name if wanted != name and wanted in entries else wanted] = entry
    return full


def same_numbers(one: Entry, other: Entry) -> bool:
    """Whether two tensors are equal, number for number."""
    if one.shape != other.shape:
        return False
    read = storage.read_words if one.dtype == other.dtype else storage.read_blocks
    return all(np.array_equal(x, y) for x, y in zip(read(one), read(other), strict=True))


def is_tied(path: Path, hf: Mapping[str, Any]) -> bool:
    """``ModelFolder.tied``; of a folder without readable weights, what config.json says."""
    try:
        return open_model(path, hf).tied
    except LoraMsError:
        return says_tied(hf)


def generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json of a folder; empty where there is none."""
    if not (path / GENERATION).is_file():
        return {}
    return check(GenerationJson, read_json(member(path, GENERATION), CONFIG_SIZE), path / GENERATION)


def end_tokens(settings: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """``eos_token_id`` of a config.json or generation_config.json: none, one or several ids.

    Raises:
        LoraMsError: something else.
    """
    ids = settings.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int and 0 <= token < VOCABULARY for token in ids):
        raise LoraMsError(f"{where}: eos_token_id {settings['eos_token_id']!r}: give a token id or a list of them")
    return tuple(ids)


def sampling_defaults(path: Path) -> dict[str, Any]:
    """How the authors of a model want it sampled: the keys of ``SAMPLING`` that generation_config.json sets."""
    found = generation_config(path)
    return {name: found[name] for name in SAMPLING if found.get(name) is not None}
