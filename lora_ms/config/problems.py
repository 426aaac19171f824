"""Says in one line what is wrong with a configuration: every problem, its dotted key, the value and what is wanted."""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lora_ms.config.callbacks import CALLBACKS
from lora_ms.config.other_words import meaning
from lora_ms.config.schema import RunConfig, key_of
from lora_ms.config.sections import MAPPING, NUMBER
from lora_ms.objectives import OBJECTIVES
from lora_ms.values import Section

NEAR = 0.8  # difflib's ratio from which one name is meant by another, among all; less finds words of another meaning
NEAR_IN_SECTION = 0.7  # among the few of a section
LISTED = 10  # errors that are described; looking for the nearest known key takes 10 ms
LISTS: dict[str, Mapping[str, type[Section]]] = {
    "callbacks": CALLBACKS,
    "objectives": OBJECTIVES,
}  # lists of sections by type
KINDS: dict[str, type[Section]] = {**CALLBACKS, **OBJECTIVES}


def describe(problem: ValidationError) -> str:
    """The first errors of ``problem`` in one line."""
    errors = problem.errors(include_url=False)
    left = len(errors) - LISTED
    more = f"; and {left:,} more fault{'s' if left > 1 else ''}" if left > 0 else ""
    return "; ".join(_describe_one(error) for error in errors[:LISTED]) + more


def _describe_one(error: Mapping[str, Any]) -> str:
    place = _place(error["loc"])
    key, value = ".".join(str(part) for part in place), error["input"]
    shown = reprlib.repr(value) if isinstance(value, dict | list) else repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key}{_nearest(error['loc'], value)}"
        case "union_tag_invalid":
            kinds = LISTS[error["loc"][0]]
            near = difflib.get_close_matches(str(value.get("type")), kinds, 1, 0.0)[0]
            return f"{key}.type expects one of {', '.join(kinds)}, got {value.get('type')!r} (nearest: {near})"
        case "union_tag_not_found":
            return f"{key}.type is missing: give one of {', '.join(LISTS[error['loc'][0]])}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key or 'the configuration'} expects a mapping of keys, got {shown}"
        case "value_error":
            text = str(error["ctx"]["error"])
            if not text.startswith(("expects", "is ")):  # a check across keys names their values itself
                return f"{key}: {text}" if key else text
        case "invalid_key":
            return f"{key} is not text: quote the key"
        case "greater_than_equal":
            text = f"expects {error['ctx']['ge']:.10g} or more"
        case "greater_than":
            text = f"expects more than {error['ctx']['gt']:.10g}"
        case "less_than_equal":
            text = f"expects {error['ctx']['le']:.10g} or less"
        case "less_than":
            text = f"expects less than {error['ctx']['lt']:.10g}"
        case _:
            text = error["msg"].replace("Input should be", "expects").replace("Field required", "is missing")
            text = text.replace("a valid list", "a list").replace("a valid tuple", "a list")
    return f"{key} {text}, got {shown}"


def _place(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without what pydantic puts into an error's place and is no key: the type of an entry of a list, behind its
    index, and of a value."""
    return tuple(
        part
        for i, part in enumerate(loc)
        if part not in (NUMBER, MAPPING) and not (i == 2 and loc[0] in LISTS and part in LISTS[loc[0]])
    )


def _nearest(loc: tuple[Any, ...], value: Any) -> str:
    """The known key that was probably meant: in the same section, else anywhere; the keys of a short section."""
    *parents, unknown = loc
    section: type[Section] = RunConfig
    for part in parents:
        section = _child(section, part) or section
    prefix = "".join(f"{part}." for part in _place(tuple(parents)))
    known = [key_of(name, field) for name, field in section.model_fields.items()]
    for name, kinds in LISTS.items():
        if unknown in kinds:
            return f"; it is the type of an entry of {name}: [{{type: {unknown}, …}}]"
    if deeper := [path for path in known_keys(section) if path.endswith(f".{unknown}")]:
        if parents:
            return f"; did you mean {prefix}{deeper[0]}?"
    word = str(unknown)
    meant, written, it = meaning(word, "" if isinstance(value, dict | list) else str(value))
    if meant:
        leaf = meant.rpartition(".")[2]
        inner = [leaf] if leaf in known else [path for path in known_keys(section) if path.endswith(f".{leaf}")]
        # a word of the evaluation's, or a kind's, means its own section wherever it stands
        here = parents and inner and leaf != "type" and "eval" not in word and "train" not in word
        return f"; in a YAML {it} {prefix + inner[0] if here else meant}{f': {written}' if written else ''}"
    if it:
        return f"; {it}"
    if near := difflib.get_close_matches(str(unknown), known, 1, NEAR_IN_SECTION):
        return f"; did you mean {prefix}{near[0]}?"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in reversed(list(known_keys(RunConfig)))}
    if near := difflib.get_close_matches(str(unknown), elsewhere, 1, NEAR):
        return f"; did you mean {elsewhere[near[0]]}?"
    return f"; {prefix.rstrip('.')} has {', '.join(known)}" if parents and len(known) <= 10 else ""


def key_place(name: str) -> str:
    """The dotted path of the key ``name``, the first where there are several; of one at the top, and of ``pet_config``,
    the name itself; "" where there is none."""
    top = {key_of(field, info) for field, info in RunConfig.model_fields.items()} | {"pet_config"}
    found = [path for path in known_keys(RunConfig) if path.endswith(f".{name}") and path.split(".")[0] not in LISTS]
    return name if name in top else next(iter(found), "")


def key_names() -> set[str]:
    """The names of all keys, without their sections."""
    return {path.rsplit(".", 1)[-1] for path in known_keys(RunConfig) if path.split(".")[0] not in LISTS}


def _child(section: type[Section], part: Any) -> type[Section] | None:
    if part in KINDS:
        return KINDS[part]
    for name, field in section.model_fields.items():
        if key_of(name, field) == part:
            return section_of(field.annotation)
    return None


def section_of(annotation: Any) -> type[Section] | None:
    """The Section among an annotation's alternatives, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_of(inner)) is not None), None)


def known_keys(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted paths of all keys, with their fields; callbacks as ``callbacks.TYPE.key``, objectives likewise."""
    keys: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        path = f"{prefix}{key_of(name, field)}"
        inner = section_of(field.annotation)
        if name in LISTS:
            for kind, entry in LISTS[name].items():
                keys |= known_keys(entry, f"{name}.{kind}.")
        elif inner is not None:
            keys |= known_keys(inner, f"{path}.")
        else:
            keys[path] = field
    return keys
