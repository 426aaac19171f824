"""What is right and wrong with an adapter's directory, found from its files and the model's, without MindSpore."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ms import storage
from lora_ms.adapters import lowrank
from lora_ms.adapters import offline_merge as hf_merge
from lora_ms.adapters import peft_files as files
from lora_ms.adapters.config import AdaLoraConfig, LoraConfig
from lora_ms.adapters.matching import by_pattern, layer_index, leaf_of, place_of, ranges
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import open_model
from lora_ms.storage import Entry

OK, WARNING, FAULT = "ok", "warning", "fault"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank takes; 16 by default
B_FACTORS = ("lora_B.weight", "lora_B", "lora_embedding_B")
MERGE = "merge it instead: lora-ms merge"


class Check(NamedTuple):
    """One line of the table."""

    name: str
    status: str
    text: str


def listed(names: list[str], most: int = 3) -> str:
    """``a, b, c and 4 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, thing: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def check_files(adapter: Path, base: Path | None) -> Iterator[Check]:
    """Every check that the files of ``adapter`` and of the model ``base`` can answer, in the order of the table."""
    try:
        config, raw = files.read_adapter_config(adapter), storage.read_json(adapter / files.CONFIG)
        yield Check("settings", OK, settings_text(config))
    except LoraMsError as error:
        yield Check("settings", FAULT, str(error))
        return
    try:
        entries = files.read_entries(adapter)
        files.check_finite(adapter, entries)
    except LoraMsError as error:
        yield Check("tensors", FAULT, str(error))
        return
    yield from check_spelling(adapter, entries)
    modules = hf_merge.modules_of(entries)
    lora = [name for name, tensors in modules.items() if any(factor.startswith("lora_") for factor in tensors)]
    yield from check_keys(adapter, config, entries, lora)
    yield check_ranks(config, modules)
    yield check_b(modules)
    yield from check_base(adapter, base, entries, config)
    if base is not None:
        yield from check_complete(config, set(modules), base)
    yield check_template(adapter, base)
    yield from check_vllm(config, raw, modules)


def settings_text(config: LoraConfig) -> str:
    kind = "AdaLoRA" if isinstance(config, AdaLoraConfig) else "DoRA" if config.use_dora else "LoRA"
    if config.use_rslora:
        kind += " with rsLoRA"
    if isinstance(config.init_lora_weights, str):
        kind += f", begun by {config.init_lora_weights}"
    rank, alpha = config.lora_rank, config.lora_alpha
    return f"{kind}, rank {rank}, alpha {alpha:g}, scaling {lowrank.scaling_of(rank, alpha, config.use_rslora):g}"


def check_keys(adapter: Path, config: LoraConfig, entries: Mapping[str, Entry], lora: list[str]) -> Iterator[Check]:
    """Names of tensors, and whether the patterns of the settings fit them."""
    odd = [key for key in entries if files.split_key(key) is None]
    bare = [key for key in entries if not key.startswith(files.PREFIX)]
    if odd:
        yield Check("keys", FAULT, f"{counted(len(odd), 'tensor')} of no known name: {listed(odd)}")
    elif bare:
        yield Check("keys", FAULT, f"{len(bare)} without the prefix {files.PREFIX}, which PEFT wants: {listed(bare)}")
    elif not lora:
        yield Check("keys", FAULT, "it holds no LoRA tensor")
    else:
        leaves = ", ".join(sorted({leaf_of(name) for name in lora}))
        yield Check("keys", OK, f"{counted(len(entries), 'tensor')}, LoRA on {counted(len(lora), 'module')}: {leaves}")
    try:
        files.check_patterns(adapter, config, lora)
    except LoraMsError as error:
        yield Check("patterns", FAULT, str(error))


def check_spelling(adapter: Path, entries: Mapping[str, Entry]) -> Iterator[Check]:
    """Names that PEFT reads and does not write."""
    odd = [key for key in storage.read_header(adapter / files.WEIGHTS) if key not in entries]
    if odd:
        text = f"{counted(len(odd), 'tensor')} spelled as PEFT reads and vLLM does not: {odd[0]}; save it again"
        yield Check("vLLM: names", WARNING, text)


def check_complete(config: LoraConfig, held: Collection[str], base: Path) -> Iterator[Check]:
    """Whether the file holds all that the settings name."""
    try:
        names = [key.removesuffix(".weight") for key, entry in base_entries(base).items() if len(entry.shape) == 2]
        missing = missing_modules(config, held, names)
    except (LoraMsError, re.error):
        return  # said elsewhere in the table
    if missing:
        yield Check("complete", FAULT, f"{files.CONFIG} names modules of which it holds nothing: {missing}")


def missing_modules(config: LoraConfig, held: Collection[str], names: Iterable[str]) -> str:
    """Which of the modules ``names`` of a model the settings name and the file, with modules ``held``, does not hold.

    ``q_proj of layers 2-3, lm_head``; empty where it holds them all.
    """
    wanted = [name for name in names if place_of(name, config) is not None]
    missing = [name for name in wanted if name not in held]
    missing += [name for name in config.modules_to_save if not any(module.endswith(name) for module in held)]
    layers: dict[str, list[int]] = {}
    for name in missing:
        index = layer_index(name)
        layers.setdefault(leaf_of(name), []).extend([] if index is None else [index])
    return ", ".join(f"{leaf} of layers {ranges(found)}" if found else leaf for leaf, found in sorted(layers.items()))


def rank_of(tensors: Mapping[str, Entry]) -> int | None:
    """The rank by the tensors of a module; None where they are no pair."""
    for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if a in tensors and b in tensors and len(tensors[a].shape) == len(tensors[b].shape) == 2:
            rank = tensors[a].shape[0]
            return rank if rank == tensors[b].shape[1] else None
    return None


def check_ranks(config: LoraConfig, modules: Mapping[str, Mapping[str, Entry]]) -> Check:
    """Ranks by the tensors against those by the settings."""
    faults: list[str] = []
    ranks: Counter[int | None] = Counter()
    for name, tensors in modules.items():
        if not any(factor.startswith("lora_") for factor in tensors):
            continue
        rank, wanted = rank_of(tensors), [int(by_pattern(name, config.rank_pattern, config.lora_rank))]
        if isinstance(config, AdaLoraConfig) and name in config.kept:
            wanted.append(sum(config.kept[name]))
        ranks[rank] += 1
        if rank is None:
            faults.append(f"{name}: A and B are no pair")
        elif rank not in wanted:
            faults.append(f"{name}: rank {rank} by its tensors, {wanted[-1]} by {files.CONFIG}")
    if faults:
        return Check("ranks", FAULT, listed(faults))
    if len(ranks) > 1:
        parts = (f"{rank} on {counted(count, 'module')}" for rank, count in sorted(ranks.items()))
        return Check("ranks", OK, ", ".join(parts))
    return Check("ranks", OK, f"{listed([str(rank) for rank in ranks])} everywhere, as {files.CONFIG} says")


def check_b(modules: Mapping[str, Mapping[str, Entry]]) -> Check:
    """An adapter whose B are zero has learnt nothing: the file is of a run that did not train, or not saved whole."""
    zero, count = [], 0
    for name, tensors in modules.items():
        pair = [entry for factor, entry in tensors.items() if factor in (*B_FACTORS, "lora_embedding_A", "lora_E")]
        if not pair or rank_of(tensors) == 0:  # AdaLoRA may leave a module nothing
            continue
        count += 1
        if not all(any(block.any() for block in storage.read_blocks(entry)) for entry in pair):
            zero.append(name)
    saved = any("weight" in tensors for tensors in modules.values())
    if zero and len(zero) == count:
        return Check("B not zero", WARNING if saved else FAULT, "every B is zero: LoRA changes nothing")
    if zero:
        return Check("B not zero", WARNING, f"{len(zero)} of {count} modules change nothing: {listed(zero)}")
    return Check("B not zero", OK, f"all {count} modules change something")


def base_entries(base: Path) -> dict[str, Entry]:
    """The tensors of the model's directory, the shared head included."""
    folder = open_model(base, storage.read_json(base / "config.json"))
    return hf_merge.with_head(folder.entries, folder.tied)


def check_base(adapter: Path, base: Path | None, entries: Mapping[str, Entry], config: LoraConfig) -> Iterator[Check]:
    """The model that the adapter names, and whether the adapter fits the one that is here."""
    named = files.base_name(adapter)
    if named is None:
        text = "the adapter names no model: whoever loads it must know which (base_model_name_or_path)"
        yield Check("base model", WARNING, text)
    elif Path(named).is_dir():
        yield Check("base model", OK, f"{named}, which is here")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        yield Check("base model", OK, f"{named}, by its name on the hub")
    else:
        yield Check("base model", WARNING, f"{named} is neither here nor a name on the hub")
    if base is None:
        yield Check("shapes", WARNING, "not compared: give --load_checkpoint with the model's folder")
        return
    try:
        faults = hf_merge.fit_faults(entries, base_entries(base), config)
    except LoraMsError as error:
        yield Check("shapes", FAULT, str(error))
        return
    if faults:
        yield Check("shapes", FAULT, f"made for another model than {base}: {listed(faults).replace(files.PREFIX, '')}")
    else:
        yield Check("shapes", OK, f"every tensor has its place in {base}")


def template_of(folder: Path) -> str | None:
    """The chat template of a directory, if any; of several, the one named default."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        template = storage.read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}.get("default")
        return template
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


def check_vllm(
    config: LoraConfig, raw: Mapping[str, Any], modules: Mapping[str, Mapping[str, Entry]]
) -> Iterator[Check]:
    """What vLLM, which reads r and lora_alpha alone, would make of it."""
    ranks = [rank for tensors in modules.values() if (rank := rank_of(tensors)) is not None]
    rank = max([*ranks, config.lora_rank])
    enough = next((served for served in SERVED_RANKS if served >= rank), None)
    if rank <= 16:
        yield Check("vLLM: rank", OK, f"{rank} is within the default of 16")
    elif enough is None:
        yield Check("vLLM: rank", WARNING, f"vLLM takes ranks up to {SERVED_RANKS[-1]}, not {rank}; {MERGE}")
    else:
        yield Check("vLLM: rank", WARNING, f"{rank} is over the default of 16: start it with --max-lora-rank {enough}")
    trained = sorted({factor for tensors in modules.values() for factor in tensors if factor.endswith("bias")})
    refused = {
        "AdaLoRA": isinstance(config, AdaLoraConfig),
        "DoRA": config.use_dora,
        f"modules_to_save {raw.get('modules_to_save')}": bool(raw.get("modules_to_save")),
        "trained biases": bool(trained),
    }
    faults = [name for name, found in refused.items() if found]
    if faults:
        yield Check("vLLM: kind", WARNING, f"vLLM does not serve {', '.join(faults)}; {MERGE}")
    wrong = {
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        f"init_lora_weights {config.init_lora_weights}": lowrank.takes_out(str(config.init_lora_weights)),
    }
    ignored = [name for name, found in wrong.items() if found]
    if ignored:
        yield Check("vLLM: numbers", WARNING, f"vLLM does not read {', '.join(ignored)} and computes wrongly; {MERGE}")
    if not faults and not ignored:
        yield Check("vLLM: kind", OK, "nothing that vLLM would refuse or ignore")


def size_of(entries: Mapping[str, Entry]) -> int:
    """Numbers in the tensors."""
    return sum(int(np.prod(entry.shape)) for entry in entries.values())
