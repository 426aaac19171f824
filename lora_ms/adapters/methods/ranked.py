"""What VeRA and MiSS share: one rank for all modules, and a dropout of their own on the adapter's input."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

from lora_ms.adapters.methods.base import AdapterConfig, head_notes, option
from lora_ms.errors import LoraMsError
from lora_ms.values import Bounds, Number, Whole

Config = TypeVar("Config", bound="RankedConfig")


class RankSpec(NamedTuple):
    """The adapter on one module."""

    lora_rank: int


@dataclass(frozen=True, repr=False)
class RankedConfig(AdapterConfig):
    """The options of both."""

    NAME: ClassVar[str]  # in lines for the user
    SPEC_KEYS: ClassVar[Mapping[str, frozenset[str]]] = {"lora_rank": frozenset(("lora_rank",))}

    lora_rank: int = option(64, Whole, Bounds(ge=1))
    lora_dropout: float = option(0.0, Number, Bounds(ge=0, lt=1))

    def spec(self, name: str) -> RankSpec:
        return RankSpec(self.lora_rank)

    def notes(self, names: Iterable[str], adapted: Iterable[str]) -> list[str]:
        return head_notes(self.lora_dropout, adapted)

    def ranks(self, name: str) -> tuple[int, ...]:
        return (self.lora_rank,)

    @classmethod
    def check_bias(cls, peft: Mapping[str, Any]) -> None:
        """Raises LoraMsError where a parsed adapter_config.json asks for trained biases."""
        if peft.get("bias") not in (None, "none"):
            raise LoraMsError(f"bias {peft['bias']} of {cls.NAME} is not supported: train it with bias none")

    def continued(self: Config, keys: Any, given: Collection[str]) -> Config:
        return replace(self, lora_dropout=keys.lora_dropout) if "lora_dropout" in given else self

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def separate_dropout(self) -> bool:
        return True
