"""What the columns of a row hold: lists and objects that may be written as JSON, flags, turns of a conversation."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

# names under which datasets have the question of Alpaca's format, ours first
QUESTION = ("instruction", "question", "query")


def from_json(value: Any) -> Any:
    """The list, object or null that a text holds as JSON; any other value as it is."""
    if isinstance(value, str) and (value.lstrip()[:1] in ("[", "{") or value.strip() == "null"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def quoted(value: Any) -> str:
    """The value as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)


def as_flag(value: Any) -> bool | None:
    """True or False, also written as 1 or 0 or as text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    if isinstance(value, bool | int | float | np.bool_ | np.number) and value in (0, 1):
        return bool(value)
    return None


def turns_of(value: Any) -> list[Any] | None:
    """A list of turns, perhaps written as JSON; None for a text."""
    if isinstance(value, str):
        value = from_json(value)
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            return None
    return value if isinstance(value, list) else None
