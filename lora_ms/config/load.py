"""Builds a RunConfig from a YAML and what overrides it, and writes one back.

Order, later wins: defaults, YAML, preset, named flags, ``--options a.b=v``, free-form ``--a.b.c v``.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lora_ms import saving
from lora_ms.bundled import bundled
from lora_ms.config.presets import LOW_MEMORY, PRESETS
from lora_ms.config.problems import describe
from lora_ms.config.schema import MINDFORMERS_SECTIONS, RunConfig, key_of, move_pet_config, without_effect
from lora_ms.errors import LoraMsError
from lora_ms.reading import read_bytes
from lora_ms.values import Section

PET_CONFIG = ("model", "model_config", "pet_config")
YAML_SIZE = 10**6  # bytes
MOST_VALUES = 100_000  # of a YAML; MindFormers' have some 200
NO_PET_CONFIG = (
    "pet_config is missing: add model.model_config.pet_config, {} for LoRA as it is by default, or null to train all "
    "parameters"
)


def load_config(
    path: str | None,
    *,
    preset: str | None = None,
    flags: Mapping[str, object] | None = None,
    options: Sequence[str] = (),
    free_form: Sequence[str] = (),
) -> RunConfig:
    """Read ``path`` and apply the overrides.

    Args:
        path: YAML file in MindFormers' schema; None starts from the defaults, which train a LoRA adapter.
        preset: a name from PRESETS.
        flags: dotted key -> value, taken as it is; None keeps the YAML's value.
        options: ``"a.b=v"`` each, v read as YAML.
        free_form: ``"a.b.c=v"`` each, v read as YAML.

    Raises:
        LoraMsError: unreadable file, unknown key, wrong value, or a fine-tuning YAML that says nothing of pet_config.
    """
    data = {} if path is None else _without_repeated_datasets(move_pet_config(read_yaml(path)))
    if preset is not None:
        if preset not in PRESETS:
            raise LoraMsError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
        if _trains_all(data):
            raise LoraMsError(f"--preset {preset} is for adapters, and pet_config is null: leave one of them out")
        for section, values in PRESETS[preset].items():
            for key, value in values.items():
                _set(data, f"{section}.{key}", value)
    named = [(key, given, "named flag") for key, given in (flags or {}).items() if given is not None]
    optional = [(*_split_override(text), "--options") for text in options]
    free = [(*_split_override(text), "flag of a key") for text in free_form]
    overrides: list[tuple[str, Any, str]] = [*named, *optional, *free]
    for dotted, override, _ in overrides:
        _set(data, dotted, override)
    missing = ""
    if data.get("run_mode", "finetune") in ("finetune", "train") and _add_pet_config(data) and path is not None:
        missing = NO_PET_CONFIG
    lower_memory(data)
    theirs = {}
    if data.get("backend") == "mindformers":
        theirs = {key: data.pop(key) for key in MINDFORMERS_SECTIONS if data.get(key) is not None}
    try:
        config = RunConfig.model_validate(data)
        if missing:
            raise LoraMsError(f"{path}: {missing}")
        config.mindformers_sections.update(theirs)
        config.taken_back.extend(_taken_back(overrides))
        return config
    except ValidationError as problem:
        overridden = preset or options or free_form or any(key != "run_mode" for key, _, _ in named)
        source = f"{path or 'configuration'}{' with the command line' if path and overridden else ''}"
        raise LoraMsError(f"{source}: {describe(problem)}{missing and f'; {missing}'}") from problem


def _trains_all(data: Mapping[str, Any]) -> bool:
    """Whether a YAML says ``pet_config: null``."""
    here: Any = data
    for part in PET_CONFIG[:-1]:
        here = _section(here, part)
    return PET_CONFIG[-1] in here and here[PET_CONFIG[-1]] is None


def lower_memory(data: dict[str, Any]) -> None:
    """Fills in what ``context.low_memory`` asks for; the batch becomes micro-batches of one row, the step stays."""
    context = data.get("context")
    if not isinstance(context, dict) or str(context.get("low_memory", False)) not in ("True", "true"):
        return
    for key, value in LOW_MEMORY.items():
        *sections, name = key.split(".")
        place = data
        for section in sections:
            place = _section(place, section)
        if place.get(name) is None:
            _set(data, key, value)
    runner = _section(data, "runner_config")
    rows = runner.get("batch_size") or _section(data, "train_dataset").get("batch_size") or 1
    steps = runner.get("gradient_accumulation_steps", 1)
    if type(rows) is int and rows > 1 and type(steps) is int:
        _set(data, "runner_config.gradient_accumulation_steps", rows * steps)
        _set(data, "runner_config.batch_size", 1)


def _section(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key; an empty one where the schema will find something else."""
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def dump_config(config: RunConfig, path: str) -> None:
    """Write the resolved YAML; load_config reads an equal RunConfig from it. Keys without effect are left out where
    they have their default value, and those that were not given where that counts: with backend mindformers, all.

    Raises:
        WriteError: the file cannot be written.
    """
    ours = _plain(config)
    if config.backend == "mindformers":  # it is told what was given
        ours = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    text = yaml.safe_dump({**ours, **config.mindformers_sections}, sort_keys=False, allow_unicode=True)
    with saving.new_file(Path(path)) as part:
        part.write_text(text, encoding="utf-8")


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        LoraMsError: missing or unreadable file, bad YAML (line and column), a key given twice, no mapping.
    """
    if not os.path.exists(path):
        path = str(bundled(path) or path)  # configs/… of the package, from any folder
    if not os.path.exists(path):
        raise LoraMsError(f"cannot read config {path}: No such file or directory")
    text = read_bytes(Path(path), YAML_SIZE)
    try:
        data = parse_yaml(text.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise LoraMsError(f"{path} is not UTF-8 text (byte {problem.start}): save it as UTF-8") from problem
    except ValueError as problem:
        raise LoraMsError(f"{path} is not valid YAML: {problem}") from problem
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise LoraMsError(f"{path}: the top level expects a mapping (key: value), got {type(data).__name__}")
    return data


def parse_yaml(text: str) -> Any:
    """What ``text`` holds as YAML, its aliases written out.

    Raises:
        ValueError: it holds no YAML, a value that is none of its type, or more than any configuration.
    """
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return _unshared(loader.construct_document(node))
    except yaml.YAMLError as problem:
        raise ValueError(_yaml_problem(problem)) from problem
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as problem:  # of !!int "" and the like
        raise ValueError(f"a value is none of its type ({problem})") from problem


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values ``node`` stands for, with aliases written out. Raises YAMLError for more than MOST_VALUES."""
    if node in known:
        if not known[node]:
            raise yaml.composer.ComposerError(None, None, "an anchor contains itself", node.start_mark)
        return known[node]
    known[node] = 0  # not known yet
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    size = 1 + sum(_size(part, known) for part in inner)
    if size > MOST_VALUES:
        problem = f"more than {MOST_VALUES:,} values, with those that aliases repeat"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    known[node] = size
    return size


def _unshared(value: Any) -> Any:
    """A copy in which YAML aliases share nothing: overriding train_dataset leaves an aliased eval_dataset alone."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a whole number of more than 64 bits")
    return value


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_problem(problem: yaml.YAMLError) -> str:
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        mark = problem.problem_mark
        return f"{problem.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return str(problem).replace("\n", " ")


def _without_repeated_datasets(data: dict[str, Any]) -> dict[str, Any]:
    """Drop ``train_dataset_task.dataset_config`` where it repeats ``train_dataset``, as MindFormers' YAMLs write it."""
    for name in ("train_dataset", "eval_dataset"):
        task = data.get(f"{name}_task")
        if isinstance(task, dict) and "dataset_config" in task and task["dataset_config"] == data.get(name):
            del task["dataset_config"]
    return data


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise LoraMsError(f"override {text!r} expects the form section.key=value")
    try:
        return key, parse_yaml(value)
    except ValueError as problem:
        raise LoraMsError(f"override {text[:200]!r} is not valid YAML ({problem}): quote the value") from problem


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a number steps into a list. ``pet_config`` stands for its place in MindFormers' schema, and
    where there are no callbacks, those that its YAMLs have can be set."""
    parts = key.split(".")
    if parts[0] == "pet_config":
        parts = [*PET_CONFIG, *parts[1:]]
    if parts[0] == "callbacks" and len(parts) > 1 and data.get("callbacks") is None:
        data["callbacks"] = [{"type": "MFLossMonitor"}, {"type": "CheckpointMonitor"}]
    here: Any = data
    for depth, name in enumerate(parts):
        part: Any = name
        last = depth == len(parts) - 1
        where = ".".join(parts[:depth])
        if isinstance(here, list):
            if not name.isdecimal() or int(name) >= len(here):
                raise LoraMsError(f"override {key}: {where} is a list of {len(here)}, counted from 0; got {name!r}")
            part = int(name)
        elif not isinstance(here, dict):
            raise LoraMsError(f"override {key}: {where} is {here!r}, not a section")
        if last:
            old = here[part] if isinstance(here, list) else here.get(part)
            if isinstance(value, dict) and isinstance(old, dict):
                for name, inner in value.items():
                    _set(here[part], str(name), inner)
            else:
                here[part] = value
        else:
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = here[part]


def _leaves(key: str, value: Any) -> dict[str, Any]:
    """The dotted keys that an override sets, those of a mapping one by one."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {path: leaf for name, inner in value.items() for path, leaf in _leaves(f"{key}.{name}", inner).items()}


def _taken_back(overrides: Sequence[tuple[str, Any, str]]) -> list[str]:
    """A line for each value of the command line that a later one replaces."""
    lines = []
    seen: dict[str, tuple[Any, str]] = {}
    for key, value, how in overrides:
        for path, leaf in _leaves(key, value).items():
            path = (
                path.removeprefix("model.model_config.") if path.startswith("model.model_config.pet_config") else path
            )
            for other, (old, before) in seen.items():
                whole = other == path or other.startswith(f"{path}.") or path.startswith(f"{other}.")
                if whole and old != leaf:
                    lines.append(f"{path}: {leaf} ({how}) takes the place of {other}: {old} ({before})")
            seen[path] = (leaf, how)
    return lines


def _add_pet_config(data: dict[str, Any]) -> bool:
    """Puts an empty ``pet_config`` where there is none; whether that was so."""
    here: Any = data
    for part in PET_CONFIG:
        if not isinstance(here, dict):
            return False  # the schema says what is wrong with it
        if here.get(part) is None and part != PET_CONFIG[-1]:
            here[part] = {}
        elif part not in here:
            here[part] = {}
            return True
        here = here[part]
    return False


def _plain(section: Section) -> dict[str, Any]:
    """What YAML can write of ``section``, without the keys that say nothing."""
    plain = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        key, value = key_of(name, field), getattr(section, name)
        if name in section.given_counts():
            if name not in section.model_fields_set:
                del plain[key]
        elif isinstance(value, Section):
            plain[key] = _plain(value)
            if not plain[key] and name != "pet_config":  # an empty one is LoRA, none is an error
                del plain[key]
        elif name == "callbacks":
            plain[key] = [_plain(callback) for callback in value]
        elif name != "pet_config" and (value is None or without_effect(field)):
            if value == field.get_default(call_default_factory=True):
                del plain[key]
    return plain
