"""What commands share about data: the tokenizer with its template, and the rows of a dataset as tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_ms.config import RunConfig
from lora_ms.config.sections import Dataset
from lora_ms.data.clean import CleaningRules
from lora_ms.data.loader import Source
from lora_ms.data.pipeline import Preparation, prepare
from lora_ms.data.report import Report
from lora_ms.data.store import TokenStore
from lora_ms.data.template import set_template, template_of
from lora_ms.data.templates import TEMPLATES
from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 1 << 30  # tokens: of a model that is not known


def seq_length(config: RunConfig, longest: int) -> int:
    """Longest row in tokens: the YAML's, else 1024 or what the model was made for."""
    handled = next((handler.get("seq_length") for handler in config.train_dataset.data_loader.handler), None)
    return config.model.sizes.seq_length or handled or min(1024, longest)


def tokenizer_for(config: RunConfig, training: bool = False) -> "PreTrainedTokenizerBase | None":
    """The tokenizer, with the template that the configuration asks for; None without one.

    It is ``processor.tokenizer.vocab_file``'s, else the adapter's or the checkpoint's.

    Raises:
        LoraMsError: not ``training``, and the template is not the one that the adapter was trained with.
    """
    named = config.processor.tokenizer.vocab_file
    asked = config.processor.tokenizer.chat_template
    handlers = config.train_dataset.data_loader.handler
    if not asked and handlers and training:
        asked = "alpaca_vicuna"  # what AlpacaInstructDataHandler writes
    tokenizer = load_tokenizer(named) if named else None
    for folder in (config.load_adapter, config.load_checkpoint):
        if tokenizer is None and folder and (Path(folder) / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    if asked:
        set_template(tokenizer, asked)
    if not training and not config.allow_other_template:
        _check_template(config.load_adapter, tokenizer)
    return tokenizer


def _check_template(adapter: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    if not adapter or not (Path(adapter) / "tokenizer_config.json").is_file():
        return
    trained = template_of(load_tokenizer(adapter))
    here = template_of(tokenizer)
    if trained != here:
        raise LoraMsError(
            f"load_adapter {adapter} was trained with another chat template ({_named(trained)}) than the one here "
            f"({_named(here)}): leave out processor.tokenizer.chat_template and vocab_file, or set "
            "allow_other_template: True"
        )


def _named(template: str) -> str:
    plain = template.removeprefix("{{ bos_token }}")
    return next((name for name, text in TEMPLATES.items() if text == plain), f"beginning {template[:30]!r}")


def sources_of(dataset: Dataset, name: str) -> list[str]:
    """Where the rows of ``train_dataset`` or ``eval_dataset`` are: files, folders or globs.

    Raises:
        LoraMsError: the configuration names no place.
    """
    sources = dataset.sources
    if not sources or not sources[0]:
        raise LoraMsError(
            f"no {name} data: give --{name}_dataset_dir FILE, or {name}_dataset.data_loader.dataset_dir in the YAML"
        )
    return sources


def preparation(config: RunConfig, dataset: Dataset, longest: int, vocab_size: int | None) -> Preparation:
    """How the rows of ``dataset`` become tokens."""
    rules = dataset.clean
    return Preparation(
        seq_length=seq_length(config, longest),
        vocab_size=vocab_size,
        format=dataset.format,
        columns=dataset.columns,
        fill=config.data_fill,
        split=dataset.data_loader.split or "train",
        num_samples=dataset.num_samples,
        turns=dataset.label_turns,
        truncation=dataset.truncation,
        clean=CleaningRules(
            required=tuple(rules.required),
            min_chars=rules.min_chars,
            max_chars=rules.max_chars,
            trim=rules.trim,
            dedupe=rules.dedupe,
            skip_faulty=rules.skip_faulty,
        ),
    )


def rows_of(
    dataset: Dataset, sources: list[str], tokenizer: "PreTrainedTokenizerBase | None", preparation: Preparation
) -> tuple[TokenStore, list[Report], list[Source]]:
    """The rows of a dataset as tokens, a report of each part that is mixed, and the shares of the parts (if any)."""
    if not dataset.mix:
        store, report = prepare(sources, tokenizer, preparation)
        return store, [report], []
    parts = [prepare([source], tokenizer, preparation) for source in sources]
    shares = [
        Source(len(store), part.weight, part.weight if part.weight_end is None else part.weight_end)
        for (store, _), part in zip(parts, dataset.mix, strict=True)
    ]
    return TokenStore.join([store for store, _ in parts]), [report for _, report in parts], shares
