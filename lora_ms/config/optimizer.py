"""``optimizer`` and ``lr_schedule``: keys, defaults, units. Keys are MindFormers', "ours" are not."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lora_ms.values import Flag, NoEffect, Number, Regex, Section, Whole


class ParamGroup(Section):
    """One of ``optimizer.groups`` (ours): some of the trainable parameters; those of an earlier group are not in it."""

    params: Regex  # adapters, head, base, or a regular expression that fits whole dotted names
    learning_rate: Number | None = Field(None, ge=0)  # the highest; None: the run's
    weight_decay: Number | None = Field(None, ge=0)


# AdamW by MindFormers' names, by bitsandbytes', and by those of transformers' TrainingArguments
AdamWType = Literal[
    "AdamW", "FP32StateAdamWeightDecay", "AdamWeightDecay", "PmAdamW",
    "AdamW8bit", "PagedAdamW", "PagedAdamW8bit",
    "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
]  # fmt: skip


class Optimizer(Section):
    """``optimizer``: all accepted types are AdamW; its state is float32, or of eight bits, in memory or in a file."""

    type: AdamWType = "AdamW"
    betas: tuple[Number, Number] = (0.9, 0.999)  # decay of the first and second moment; beta1, beta2 end up here
    beta1: Number | None = Field(None, ge=0, lt=1)
    beta2: Number | None = Field(None, ge=0, lt=1)
    eps: Number = Field(1e-8, gt=0)
    learning_rate: Number | None = Field(None, ge=0)  # used where lr_schedule has none
    weight_decay: Number = Field(0.0, ge=0)
    swap: Flag = False  # its state in the host's memory between steps; on the CPU it is there
    groups: Annotated[list[ParamGroup], BeforeValidator(lambda value: value or [])] = []  # (ours)

    @model_validator(mode="after")
    def _one_pair_of_betas(self) -> "Optimizer":
        first, second = self.betas
        pair = (first if self.beta1 is None else self.beta1, second if self.beta2 is None else self.beta2)
        if "betas" in self.model_fields_set and pair != self.betas:
            raise ValueError(f"betas {list(self.betas)} and beta1, beta2 {list(pair)} differ: give one of the two")
        if not all(0 <= beta < 1 for beta in pair):
            raise ValueError(f"betas want two numbers from 0 to below 1, got {list(pair)}")
        self.betas, self.beta1, self.beta2 = pair, None, None
        return self

    @property
    def eight_bits(self) -> bool:
        """Whether the moments are kept in eight bits."""
        return self.type.endswith("8bit")

    @property
    def paged(self) -> bool:
        """Whether the moments lie in a file."""
        return self.type.lower().startswith("paged")


LR_KINDS = {
    "ConstantWarmUpLR": "constant",
    "LinearWithWarmUpLR": "linear",
    "CosineWithWarmUpLR": "cosine",
    "constant": "constant",
    "linear": "linear",
    "cosine": "cosine",
}
LR_NOT_YET = ("CosineWithRestartsAndWarmUpLR", "PolynomialWithWarmUpLR")


def _lr_type(value: Any) -> str:
    if value in LR_NOT_YET:
        raise ValueError("is not supported yet; use CosineWithWarmUpLR or LinearWithWarmUpLR")
    if not isinstance(value, str) or value not in LR_KINDS:
        raise ValueError(f"expects one of {', '.join(LR_KINDS)}")
    return value


class LrSchedule(Section):
    """``lr_schedule``: warm-up from 0, then constant, or down to ``lr_end`` on a line or a half cosine."""

    type: Annotated[str, BeforeValidator(_lr_type)] = "CosineWithWarmUpLR"
    learning_rate: Number | None = Field(None, ge=0)  # the highest; overrides optimizer.learning_rate
    lr_end: Number = Field(0.0, ge=0)  # the last
    warmup_ratio: Number | None = Field(None, ge=0, le=1)  # share of total_steps
    warmup_steps: Whole | None = Field(None, ge=0)  # optimiser steps
    total_steps: Whole = Field(-1, ge=-1)  # optimiser steps of the whole schedule, -1: those of the run
    warmup_lr_init: NoEffect = 0.0
    num_cycles: NoEffect = 0.5

    @property
    def kind(self) -> str:
        """``constant``, ``linear`` or ``cosine``."""
        return LR_KINDS[self.type]

    @model_validator(mode="after")
    def _one_warmup(self) -> "LrSchedule":
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps} are both given: "
                "set one of them to null"
            )
        return self
