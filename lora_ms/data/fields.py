"""One field of a row: read strictly, with faults that say what is wrong and what to do."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


class RowFault(Exception):
    """A row that cannot be used: `text` says what is wrong with it, `advice` what to do."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.text = text
        self.advice = advice

    @property
    def kind(self) -> str:
        """What is wrong, in words that many rows share."""
        return re.sub(r"\([^()]*\)|\d+", "…", self.text.split(":")[0])


def text_of(row: Mapping[str, Any], key: str, fill: Mapping[str, str], name: str | None = None) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault(f"{name or quoted(key)} is {type(value).__name__}, not text", "put it in quotation marks")
    return filled(value, fill)


def list_of(row: Mapping[str, Any], key: str) -> list[Any]:
    value = _unquoted(row.get(key))
    if value is None or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise RowFault(f'"{key}" is {type(value).__name__}, not a list', "correct the row")
    return list(value)


def filled(text: str, fill: Mapping[str, str]) -> str:
    # One pass, so that a text about templates keeps its own braces with fill {"name": "{{name}}"}.
    def replace(match: re.Match[str]) -> str:
        key = match[1]
        if key not in fill:
            raise RowFault(f"the placeholder {match[0]} is not filled", f"add --fill {key}=VALUE")
        return str(fill[key])  # an override such as AGE=5 arrives as a number

    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair, which no tokenizer takes
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowFault(f"the text holds {half}, half of a character", "remove it") from error
    return PLACEHOLDER.sub(replace, text)


def int_array(name: str, values: Any) -> NDArray[np.int64]:
    try:
        array = np.asarray(_unquoted(values))
    except ValueError:  # a ragged list of lists
        array = np.asarray([None])
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RowFault(f"{name} is no list of whole numbers", "give a flat list of token ids")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise RowFault(f"{name} holds a number beyond 32 bits", "give a flat list of token ids")
    return array.astype(np.int64)


def _unquoted(value: Any) -> Any:
    """A list that a CSV file holds as JSON; all else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return value


def quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
