"""What is right and wrong with an adapter's directory, found from its files and the model's, without MindSpore."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ms import saving, storage
from lora_ms.adapters import offline_merge, peft_files
from lora_ms.adapters.matching import layer_index, leaf_of, ranges
from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import TOKENIZER_CONFIG, model_config, open_model, tokenizer_config
from lora_ms.reading import member, read_text
from lora_ms.storage import Entry
from lora_ms.text import counted, listed

OK, WARNING, FAULT = "ok", "warning", "fault"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank takes; 16 by default
MERGE = "merge it instead: lora-ms merge"

Modules = Mapping[str, Mapping[str, Entry]]  # tensors of the file by module and name


class Check(NamedTuple):
    """One line of the table."""

    name: str
    status: str
    text: str


def few(names: list[str]) -> str:
    """``a, b, c and 4 more``."""
    return listed(names, most=3, separator=", ")


def check_files(adapter: Path, base: Path | None) -> Iterator[Check]:
    """Every check that the files of ``adapter`` and of the model ``base`` can answer, in the order of the table."""
    yield from check_digests(adapter)
    try:
        config, raw = peft_files.read_adapter_config(adapter), peft_files.read_settings(adapter)
        yield Check("settings", OK, config.describe())
    except LoraMsError as error:
        yield Check("settings", FAULT, str(error))
        return
    try:
        entries = peft_files.read_entries(adapter)
        peft_files.check_finite(adapter, entries)
    except LoraMsError as error:
        yield Check("tensors", FAULT, str(error))
        return
    yield from check_spelling(adapter, entries)
    modules = peft_files.by_module(entries)
    adapted = {name: tensors for name, tensors in modules.items() if config.adapts(tensors)}
    yield from check_keys(adapter, config, entries, list(adapted))
    yield from check_ranks(config, adapted)
    yield from check_idle(config, adapted, saved=any("weight" in tensors for tensors in modules.values()))
    yield from check_base(adapter, base, entries, config)
    if base is not None:
        yield from check_complete(config, set(modules), base)
    yield check_template(adapter, base)
    yield from check_vllm(config, raw, modules)


def check_digests(adapter: Path) -> Iterator[Check]:
    """Whether the files are as they were written, where we wrote them."""
    try:
        if saving.listed(adapter) is None:
            return  # another program's
        fault = saving.changed(adapter)
    except LoraMsError as error:
        fault = str(error)
    if fault:
        yield Check("digests", FAULT, fault)
    else:
        yield Check("digests", OK, f"all files are as {saving.MARKER} says")


def check_keys(
    adapter: Path, config: AdapterConfig, entries: Mapping[str, Entry], adapted: list[str]
) -> Iterator[Check]:
    """Names of tensors, and whether the patterns of the settings fit them."""
    odd = [key for key in entries if peft_files.split_key(key) is None]
    own = {*peft_files.SHARED_KEYS, *peft_files.ROOT_KEYS}
    bare = [key for key in entries if key not in own and not key.startswith(peft_files.PREFIX)]
    if odd:
        yield Check("keys", FAULT, f"{counted(len(odd), 'tensor')} of no known name: {few(odd)}")
    elif bare:
        yield Check(
            "keys", FAULT, f"{len(bare)} without the prefix {peft_files.PREFIX}, which PEFT expects: {few(bare)}"
        )
    elif not adapted:
        yield Check("keys", FAULT, f"it holds no {config.title} tensor")
    else:
        leaves = ", ".join(sorted({leaf_of(name) for name in adapted}))
        count, where = counted(len(entries), "tensor"), counted(len(adapted), "module")
        yield Check("keys", OK, f"{count}, {config.title} on {where}: {leaves}")
    try:
        peft_files.check_patterns(adapter, config, adapted)
    except LoraMsError as error:
        yield Check("patterns", FAULT, str(error))


def check_spelling(adapter: Path, entries: Mapping[str, Entry]) -> Iterator[Check]:
    """Names that PEFT reads and does not write."""
    odd = [key for key in storage.read_header(member(adapter, peft_files.WEIGHTS)) if key not in entries]
    if odd:
        text = f"{counted(len(odd), 'tensor')} spelled as PEFT reads and vLLM does not: {odd[0]}; save it again"
        yield Check("vLLM: names", WARNING, text)


def check_complete(config: AdapterConfig, held: Collection[str], base: Path) -> Iterator[Check]:
    """Whether the file holds all that the settings name."""
    try:
        names = [key.removesuffix(".weight") for key, entry in base_entries(base).items() if len(entry.shape) == 2]
        missing = missing_modules(config, held, names)
    except LoraMsError:
        return  # the table says so elsewhere
    if missing:
        yield Check("complete", FAULT, f"{peft_files.CONFIG} names modules of which it holds nothing: {missing}")


def missing_modules(config: AdapterConfig, held: Collection[str], names: Iterable[str]) -> str:
    """Which of the modules ``names`` of a model the settings name and the file, with modules ``held``, does not hold.

    ``q_proj of layers 2-3, lm_head``; empty where it holds them all.
    """
    names = list(names)
    missing = [name for name in names if config.choose(name) is not None and name not in held]
    missing += [name for name in config.modules_beside(names) if name not in held]
    missing += [name for name in config.modules_to_save if not any(module.endswith(name) for module in held)]
    layers: dict[str, list[int]] = {}
    for name in missing:
        index = layer_index(name)
        layers.setdefault(leaf_of(name), []).extend([] if index is None else [index])
    return ", ".join(f"{leaf} of layers {ranges(found)}" if found else leaf for leaf, found in sorted(layers.items()))


def shapes_of(tensors: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in tensors.items()}


def check_ranks(config: AdapterConfig, adapted: Modules) -> Iterator[Check]:
    """Ranks by the tensors against those by the settings, where the method has ranks."""
    faults: list[str] = []
    ranks: Counter[int | None] = Counter()
    for name, tensors in adapted.items():
        rank, expected = config.rank_of(shapes_of(tensors)), config.ranks(name)
        if not expected:
            return
        ranks[rank] += 1
        if rank is None:
            faults.append(f"{name}: A and B are no pair")
        elif rank not in expected:
            faults.append(f"{name}: rank {rank} by its tensors, {expected[-1]} by {peft_files.CONFIG}")
    if faults:
        yield Check("ranks", FAULT, few(faults))
    elif len(ranks) > 1:
        parts = (f"{rank} on {counted(count, 'module')}" for rank, count in sorted(ranks.items()))
        yield Check("ranks", OK, ", ".join(parts))
    else:
        found = few([str(rank) for rank in ranks])
        yield Check("ranks", OK, f"{found} everywhere, as {peft_files.CONFIG} says")


def check_idle(config: AdapterConfig, adapted: Modules, saved: bool) -> Iterator[Check]:
    """Whether the adapter changes anything; one that does not is of a run that did not train, or not saved whole.

    saved: whether the file holds whole modules besides, which may be all that was trained.
    """
    idle, count = [], 0
    for name, tensors in adapted.items():
        deciding = {tensor: entry for tensor, entry in tensors.items() if tensor in config.IDLE}
        if not deciding or config.rank_of(shapes_of(tensors)) == 0:  # AdaLoRA may leave a module nothing
            continue
        count += 1
        if any(is_filled(entry, config.IDLE[tensor]) for tensor, entry in deciding.items()):
            idle.append(name)
    title, text = config.IDLE_CHECK
    if idle and len(idle) == count:
        yield Check(title, WARNING if saved else FAULT, text)
    elif idle:
        yield Check(title, WARNING, f"{len(idle)} of {count} modules change nothing: {few(idle)}")
    else:
        yield Check(title, OK, f"all {count} modules change something")


def is_filled(entry: Entry, number: float) -> bool:
    """Whether a tensor holds nothing but ``number``."""
    return all((block == number).all() for block in storage.read_blocks(entry))


def base_entries(base: Path) -> dict[str, Entry]:
    """The tensors of the model's directory, the shared head included."""
    folder = open_model(base, model_config(base))
    return offline_merge.with_head(folder.entries, folder.tied)


def check_base(
    adapter: Path, base: Path | None, entries: Mapping[str, Entry], config: AdapterConfig
) -> Iterator[Check]:
    """The model that the adapter names, and whether the adapter fits the one that is here."""
    named = peft_files.base_name(adapter)
    if named is None:
        text = "the adapter names no model: whoever loads it must know which (base_model_name_or_path)"
        yield Check("base model", WARNING, text)
    elif os.path.isdir(named):  # unlike pathlib's, False for what can be no name
        yield Check("base model", OK, f"{named}, which is here")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        yield Check("base model", OK, f"{named}, by its name on the hub")
    else:
        yield Check("base model", WARNING, f"{named} is neither here nor a name on the hub")
    if base is None:
        yield Check("shapes", WARNING, "not compared: give --load_checkpoint with the model's folder")
        return
    try:
        faults = offline_merge.fit_faults(entries, base_entries(base), config)
    except LoraMsError as error:
        yield Check("shapes", FAULT, str(error))
        return
    if faults:
        yield Check(
            "shapes", FAULT, f"made for another model than {base}: {few(faults).replace(peft_files.PREFIX, '')}"
        )
    else:
        yield Check("shapes", OK, f"every tensor has its place in {base}")


def template_of(folder: Path) -> str | None:
    """The chat template of a directory, if any; of several, the one named default."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(member(folder, "chat_template.jinja"))
    if (folder / TOKENIZER_CONFIG).is_file():
        template = tokenizer_config(folder).get("chat_template")
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}
        return template.get("default") if isinstance(template, dict) else template
    return None


def check_template(adapter: Path, base: Path | None) -> Check:
    """Whether a chat with the adapter is put as in training. vLLM uses the model's own template unless told."""
    ours, theirs = template_of(adapter), None if base is None else template_of(base)
    if ours is None:
        where = ", nor with the model" if base is not None and theirs is None else ""
        return Check("chat template", WARNING, f"none with the adapter{where}: use the one of training")
    if theirs is not None and ours.strip() != theirs.strip():
        text = "the adapter's differs from the model's: give it to vLLM by --chat-template"
        return Check("chat template", WARNING, text)
    return Check("chat template", OK, "with the adapter" + ("" if theirs is None else ", the same as the model's"))


def check_vllm(config: AdapterConfig, raw: Mapping[str, Any], modules: Modules) -> Iterator[Check]:
    """What vLLM, which reads r and lora_alpha alone, would make of it."""
    yield from check_vllm_rank(config, modules)
    refused = config.vllm_refuses()
    if raw.get("modules_to_save"):
        refused.append(f"modules_to_save {raw['modules_to_save']}")
    if any(tensor.endswith("bias") for tensors in modules.values() for tensor in tensors):
        refused.append("trained biases")
    if refused:
        yield Check("vLLM: kind", WARNING, f"vLLM does not serve {', '.join(refused)}; {MERGE}")
    ignored = config.vllm_ignores()
    if ignored:
        yield Check("vLLM: numbers", WARNING, f"vLLM does not read {', '.join(ignored)} and computes wrongly; {MERGE}")
    if not refused and not ignored:
        yield Check("vLLM: kind", OK, "nothing that vLLM would refuse or ignore")


def check_vllm_rank(config: AdapterConfig, modules: Modules) -> Iterator[Check]:
    """Whether the largest rank, by the tensors and by the settings, is among those that vLLM serves."""
    stored = [rank for tensors in modules.values() if (rank := config.rank_of(shapes_of(tensors))) is not None]
    ranks = [*stored, *config.ranks("")]
    if not ranks:
        return
    rank = max(ranks)
    enough = next((served for served in SERVED_RANKS if served >= rank), None)
    if rank <= 16:
        yield Check("vLLM: rank", OK, f"{rank} is within the default of 16")
    elif enough is None:
        yield Check("vLLM: rank", WARNING, f"vLLM takes ranks up to {SERVED_RANKS[-1]}, not {rank}; {MERGE}")
    else:
        yield Check("vLLM: rank", WARNING, f"{rank} is over the default of 16: start it with --max-lora-rank {enough}")


def size_of(entries: Mapping[str, Entry]) -> int:
    """Numbers in the tensors."""
    return sum(int(np.prod(entry.shape)) for entry in entries.values())
