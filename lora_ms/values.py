"""The kinds of value that a YAML key holds: read strictly, with errors that say what is wanted.

Sections of the configuration are made of these types, and so are the options of the methods (``adapters.methods``),
which are Python arguments and keys of ``pet_config`` at once.
"""

import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

REPORTS = ("tensorboard", "wandb", "swanlab", "mlflow")  # of report_to


class Section(BaseModel):
    """One mapping of the YAML. An unknown key is an error; an empty section (``trainer:``) means its defaults."""

    # protected_namespaces: pydantic reserves names that begin with model_; MindFormers has model_name, model_parallel.
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @classmethod
    def given_counts(cls) -> Container[str]:
        """Fields of which it makes a difference whether they were given, even where their value is the default."""
        return ()

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        return {} if data is None else data


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in ("True", "true", "False", "false"):
        return value in ("True", "true")
    raise ValueError("expects True or False")


def _whole(value: Any) -> int:
    if type(value) is int:  # bool is an int in Python, not in a YAML
        return value
    raise ValueError("expects a whole number")


def _number(value: Any) -> int | float:
    if isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 reads 1e-5 as text
        except ValueError:
            raise ValueError("expects a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("expects a number")
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("expects text (put it in quotes)")


def _path(value: Any) -> str:
    return "" if value is None else _text(value)


def _folder(value: Any) -> str:
    if value is None or not _text(value).strip():
        raise ValueError("expects the name of a folder")
    return value


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]  # one entry; iterating it would give its characters
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    raise ValueError("expects a list of texts")


def _reports(value: Any) -> list[str]:
    names = [name for name in _texts(value) if name != "none"]
    if any(name not in REPORTS for name in names):
        raise ValueError(f"expects none or {', '.join(REPORTS)} (MindSpore's summaries: SummaryMonitor in callbacks)")
    return names


def _targets(value: Any) -> str | list[str]:
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as problem:
            raise ValueError(f"expects a regular expression ({problem})") from None
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item for item in value):
        return list(value)
    raise ValueError("expects a regular expression, a list of module names, or all-linear")


def _regex(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expects a regular expression")
    return str(_targets(value))


def _exclusions(value: Any) -> str | list[str]:
    return [] if value in (None, [], "") else _targets(value)


def _layers(value: Any) -> list[int]:
    numbers: list[int] = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        for part in item.split(",") if isinstance(item, str) else [str(item)]:
            found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if not found or int(found[2] or found[1]) < int(found[1]):
                raise ValueError('expects layers such as 3, [0, 1, 8] or "0-3,8", counted from 0')
            numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError("expects at least one layer, and each once")
    return sorted(numbers)


def _pattern(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("expects a mapping of module names, as regular expressions, to numbers")
    for key in value:
        try:
            re.compile(key)
        except re.error as problem:
            raise ValueError(f"expects regular expressions as keys ({key!r}: {problem})") from None
    return value


def _scaling(value: Any) -> float | dict[str, Any]:
    return value if isinstance(value, dict) else float(_number(value))


def _token_ids(value: Any) -> int | list[int]:
    if type(value) is int or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return value
    raise ValueError("expects a token number or a list of them")


def _memory(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?GB", value):
        return value
    raise ValueError('expects a size such as "59GB"')


def _recompute(value: Any) -> bool | int | list[int]:
    # MindFormers also takes the number of layers of each pipeline stage; the only stage here has them all
    counts = value if isinstance(value, list) else [value]
    if counts and all(type(count) is int and count >= 0 for count in counts):
        return sum(counts)
    if isinstance(value, str) and re.fullmatch(r"[\d,\s-]+", value):
        return _layers(value)
    try:
        return _flag(value)
    except ValueError:
        raise ValueError('expects True, False, a number of layers, or layers such as "0-10,12"') from None


Flag = Annotated[bool, BeforeValidator(_flag)]
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
WholeOrNumber = Annotated[int | float, BeforeValidator(_number)]  # 16 stays 16 and is written back as 16
Text = Annotated[str, BeforeValidator(_text)]
Path = Annotated[str, BeforeValidator(_path)]  # null and "" both mean "none"
Folder = Annotated[str, BeforeValidator(_folder)]
Texts = Annotated[list[str], BeforeValidator(_texts)]
Reports = Annotated[list[str], BeforeValidator(_reports)]
Targets = Annotated[str | list[str], BeforeValidator(_targets)]
Regex = Annotated[str, BeforeValidator(_regex)]
Exclusions = Annotated[str | list[str], BeforeValidator(_exclusions)]  # as Targets, or nothing
Layers = Annotated[list[int], BeforeValidator(_layers)]  # indices, or texts such as "0-10"
Scaling = Annotated[float | dict[str, Any], BeforeValidator(_scaling)]
TokenIds = Annotated[int | list[int], BeforeValidator(_token_ids)]
Memory = Annotated[str, BeforeValidator(_memory)]
# all or none, the first N layers, or these ones
Recompute = Annotated[bool | int | list[int], BeforeValidator(_recompute)]


def read_with(read: Callable[[Any], Any], kind: Any) -> Any:
    """The type ``kind`` of what ``read`` returns for a YAML value; ``read`` raises ValueError with what is wanted."""
    return Annotated[kind, BeforeValidator(read)]


def pattern_of(kind: Any) -> Any:
    """The type of a mapping from regular expressions, for the end of a module's path, to values of type ``kind``."""
    return Annotated[dict[str, kind], BeforeValidator(_pattern)]


@dataclass(frozen=True)
class Bounds:
    """The range of a number; None: no bound on that side."""

    ge: float | None = None  # at least
    gt: float | None = None  # above
    lt: float | None = None  # below

    def __bool__(self) -> bool:
        return any(bound is not None for bound in (self.ge, self.gt, self.lt))

    def on(self, kind: Any) -> Any:
        """The YAML type ``kind`` kept within the range."""
        return Annotated[kind, Field(ge=self.ge, gt=self.gt, lt=self.lt)] if self else kind

    def contains(self, value: float) -> bool:
        above = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        return above and (self.lt is None or value < self.lt)

    def __str__(self) -> str:
        if self.lt is None:
            return f"at least {self.ge:g}" if self.gt is None else f"above {self.gt:g}"
        return f"in [{self.ge:g}, {self.lt:g})" if self.gt is None else f"between {self.gt:g} and {self.lt:g}"


NO_EFFECT = "no effect"
# A key that MindFormers knows and that nothing here reads: any value is accepted, one that differs from the default is
# reported by RunConfig.notices(). The default is what happens here, or MindFormers' own where nothing corresponds.
NoEffect = Annotated[Any, NO_EFFECT]
