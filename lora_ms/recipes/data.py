"""The data of a run: the tokenizer with its template, the rows of a dataset as tokens, and the plan of the steps."""

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_ms.config import RunConfig
from lora_ms.config.sections import Dataset
from lora_ms.data.clean import CleaningRules
from lora_ms.data.example import Row
from lora_ms.data.loader import DataPlan, Source, permutation
from lora_ms.data.pipeline import Preparation, prepare, prepare_rows
from lora_ms.data.preferences import Preferences, with_mismatched
from lora_ms.data.report import Report, Tally
from lora_ms.data.store import TokenStore
from lora_ms.data.template import set_template, template_of
from lora_ms.data.templates import TEMPLATES
from lora_ms.data.tokenizer import load_tokenizer, pad_id
from lora_ms.errors import LoraMsError
from lora_ms.reading import reason
from lora_ms.runtime.device import Runtime
from lora_ms.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 1 << 30  # tokens, where the model is not known


class PreparedRows(NamedTuple):
    """A dataset as tokens."""

    store: TokenStore
    reports: list[Report]  # what became of the rows; one for each part that is mixed
    shares: list[Source]  # sizes and weights of the parts; empty where nothing is mixed
    unit: int = 1  # rows of the store that belong together; see ``DataPlan``

    @property
    def units(self) -> int:
        """Rows, where rows of the store that belong together are one."""
        return len(self.store) // self.unit

    @property
    def longest(self) -> int:
        """Tokens of the longest row, with both answers."""
        return int(self.store.input_lengths.reshape(-1, self.unit).sum(1).max())


def seq_length(config: RunConfig, longest: int) -> int:
    """The longest row in tokens: the YAML's, else 1024, or ``longest``, the model's limit, where that is lower."""
    handled = next((handler.get("seq_length") for handler in config.train_dataset.data_loader.handler), None)
    return config.model.sizes.seq_length or handled or min(1024, longest)


def tokenizer_for(config: RunConfig, training: bool = False) -> "PreTrainedTokenizerBase | None":
    """The tokenizer, with the template that the configuration asks for; None without one.

    It is ``processor.tokenizer.vocab_file``'s, else the adapter's or the checkpoint's.

    Raises:
        LoraMsError: ``vocab_file`` names nothing, or, not ``training``, the template is not the one that the adapter
            was trained with.
    """
    named = config.processor.tokenizer.vocab_file
    asked = config.processor.tokenizer.chat_template
    handlers = config.train_dataset.data_loader.handler
    if not asked and handlers and training:
        asked = "alpaca_vicuna"  # what AlpacaInstructDataHandler writes
    if named and not Path(named).exists():
        raise LoraMsError(
            f"processor.tokenizer.vocab_file {named}: no such file; leave the key out to use the tokenizer in "
            "load_checkpoint"
        )
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
        LoraMsError: the configuration names none, or one that is not there.
    """
    sources = dataset.sources
    if not sources or not sources[0]:
        raise LoraMsError(
            f"no {name} data: give --{name}_dataset_dir FILE, or {name}_dataset.data_loader.dataset_dir in the YAML"
        )
    loader = dataset.data_loader
    given_as = f"{name}_dataset_dir"
    if dataset.mix:
        given_as = f"{name}_dataset.mix"
    elif not loader.dataset_dir:
        given_as = f"{name}_dataset.data_loader.{'data_files' if loader.data_files else 'path'}"
    for source in sources:
        check_path(source, given_as)
    return sources


def check_path(source: str, given_as: str) -> None:
    """Raises LoraMsError where ``source``, the value of the flag or key ``given_as``, is no glob and leads nowhere, or
    may not be followed."""
    if glob.has_magic(source):
        return
    try:
        os.stat(os.path.expanduser(source))
    except (FileNotFoundError, NotADirectoryError):
        raise LoraMsError(f"{given_as}: {source}: no such file or folder; check the path") from None
    except (OSError, ValueError) as error:  # a folder that may not be entered, a null byte
        raise LoraMsError(f"{given_as}: {source:.80}: {reason(error)}; check the path") from None


def preparation_of(
    config: RunConfig,
    dataset: Dataset,
    longest: int,
    vocab_size: int | None,
    preferences: Preferences = "none",
) -> Preparation:
    """How the rows of ``dataset`` become tokens; those of ``train_dataset`` as the objectives need them."""
    rules = dataset.clean
    return Preparation(
        seq_length=seq_length(config, longest),
        vocab_size=vocab_size,
        format=dataset.format,
        columns=dataset.columns,
        fill=config.data_fill,
        keep_placeholders=not dataset.fill,
        split=dataset.data_loader.split or ("train" if dataset is config.train_dataset else None),
        num_samples=dataset.num_samples,
        turns=dataset.label_turns,
        truncation=dataset.truncation,
        preferences=config.preferences if dataset is config.train_dataset else preferences,
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
) -> PreparedRows:
    """The rows of ``sources`` as tokens; the parts of ``dataset.mix`` one after another."""

    def prepared(names: list[str], most: int | None) -> PreparedRows:
        asked = dataclasses.replace(preparation, num_samples=most)
        return with_partners(*prepare(names, tokenizer, asked), asked)

    if not dataset.mix:
        return prepared(sources, preparation.num_samples)
    parts = [
        prepared([source], part.num_samples or preparation.num_samples)
        for source, part in zip(sources, dataset.mix, strict=True)
    ]
    shares = [
        Source(rows.units, part.weight, part.weight if part.weight_end is None else part.weight_end)
        for rows, part in zip(parts, dataset.mix, strict=True)
    ]
    return joined_rows(parts)._replace(shares=shares)


def with_partners(store: TokenStore, report: Report, preparation: Preparation) -> PreparedRows:
    """Rows as tokens; those of preferences in twos: both answers, or the one that is judged and another row's."""
    if preparation.preferences == "labelled":
        store = with_mismatched(store, preparation.seq_length)
    return PreparedRows(store, [report], [], 1 if preparation.preferences == "none" else 2)


def joined_rows(parts: Sequence[PreparedRows]) -> PreparedRows:
    """The rows of all parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    reports = [report for part in parts for report in part.reports]
    return PreparedRows(TokenStore.join([part.store for part in parts]), reports, [], parts[0].unit)


def split_off(
    config: RunConfig, rows: PreparedRows, tokenizer: "PreTrainedTokenizerBase | None", preparation: Preparation
) -> tuple[PreparedRows, PreparedRows | None]:
    """Rows to train on, and rows to evaluate on: ``validation_split``'s, or, with do_eval, eval_dataset's.

    Raises:
        LoraMsError: nothing remains on one of the sides, or parts of a mixture would be torn apart.
    """
    share = config.train_dataset.validation_split
    if not share:
        if not config.evaluates:
            return rows, None
        sources = sources_of(config.eval_dataset, "eval")
        preparation = preparation_of(
            config, config.eval_dataset, preparation.seq_length, preparation.vocab_size, config.preferences
        )
        return rows, rows_of(config.eval_dataset, sources, tokenizer, preparation)
    if config.train_dataset.mix:
        raise LoraMsError(
            "validation_split and mix are both given: hold rows out in an eval_dataset, with do_eval: True"
        )
    store = rows.store
    source_of_row = store.sources()  # the rows of one conversation stay on one side
    total = int(source_of_row[-1]) + 1
    count = round(share * total)
    if not 0 < count < total:
        raise LoraMsError(f"validation_split {share} of {total} rows leaves {count} to evaluate on: change it")
    held_out = np.isin(source_of_row, permutation(total, config.seed, 1 << 20)[:count])
    kept = rows._replace(store=store.take(np.flatnonzero(~held_out)))
    return kept, rows._replace(store=store.take(np.flatnonzero(held_out)))


def plan_rows(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase | None",
    settings: TrainSettings,
    runtime: Runtime,
    vocab_size: int,
    tally: Tally | None = None,
    lead: Sequence[int] = (),
) -> DataPlan:
    """``plan_training`` of rows that are not yet tokens; tally: what was counted while they were read."""
    preparation = Preparation(seq_length=settings.seq_length, vocab_size=vocab_size)
    store, report = prepare_rows(rows, tokenizer, preparation, tally)
    return plan_training(PreparedRows(store, [report], []), tokenizer, settings, runtime, lead)


def plan_training(
    rows: PreparedRows,
    tokenizer: "PreTrainedTokenizerBase | None",
    settings: TrainSettings,
    runtime: Runtime,
    lead: Sequence[int] = (),
) -> DataPlan:
    """Fixes the steps and shapes of a run, and prints what became of the data.

    lead: ids that every row begins with, besides the tokens that ``settings`` allow it (``CausalLM.leading_ids``).
    """
    plan = DataPlan.build(
        rows.store.led_by(lead),
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        epochs=settings.epochs,
        seed=settings.seed,
        shuffle=settings.shuffle,
        drop_remainder=settings.drop_remainder,
        rank=runtime.data_rank,
        world=runtime.data_ranks,
        pad_id=pad_id(tokenizer),
        seq_length=(settings.seq_length + len(lead)) * rows.unit,
        max_steps=settings.max_steps,
        kind=settings.layout,
        buckets=settings.length_buckets,
        sources=rows.shares,
        prefer_many_lines=settings.adaptive_batch,
        padding_cost=runtime.operators.padding_cost,
        unit=rows.unit,
        virtual_tokens=len(lead),
    )
    padding = plan.padding()
    reports = [dataclasses.replace(report, layout=plan.describe(), padding=padding) for report in rows.reports]
    if runtime.is_main:
        print(*(line for report in reports for line in report.lines()), sep="\n")
        of_what, more = "computed tokens", ""
        if runtime.operators.padding_cost < 1:
            of_what = "slots, which the operators leave out"
        elif settings.layout == "packed" and plan.layout.kind != "packed":
            more = "; rows are not packed, which would pad more"
        elif plan.layout.kind == "packed" and settings.batch_size > 1:  # single rows are packed in no layout
            more = f" (without packing: {padding['usual']:.1%})"
        print(f"  padding: {padding[plan.layout.kind]:.1%} of the {of_what}{more}")
    plan.reports.extend(report.as_json() for report in reports)
    return plan


def held_out_plan(
    store: TokenStore,
    batch_size: int,
    tokenizer: "PreTrainedTokenizerBase | None",
    seq_length: int,
    runtime: Runtime,
    *,
    packing: bool = True,
    length_buckets: int = 4,
    lead: Sequence[int] = (),
    unit: int = 1,
) -> DataPlan:
    """One pass over rows to evaluate, without shuffling; lead: as in ``plan_training``.

    seq_length: tokens of the longest row; of one answer with its question, where rows of the store belong together.
    unit: rows of the store that belong together.
    """
    return DataPlan.build(
        store.led_by(lead),
        batch_size=batch_size,
        accumulation=1,
        epochs=1,
        seed=0,
        shuffle=False,
        rank=runtime.data_rank,
        world=runtime.data_ranks,
        pad_id=pad_id(tokenizer),
        seq_length=(seq_length + len(lead)) * unit,
        kind="packed" if packing else "bucketed",
        buckets=length_buckets,
        padding_cost=runtime.operators.padding_cost,
        unit=unit,
    )
