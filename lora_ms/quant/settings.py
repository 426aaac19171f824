"""How a model's weights are quantised: transformers' ``quantization_config``, from YAML, Python or config.json."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_ms import limits
from lora_ms.quant.nf4 import BLOCK, NESTED_BLOCK

SKIP = "llm_int8_skip_modules"
COMPUTE = "bnb_4bit_compute_dtype"  # of the products; here the run's compute_dtype decides that
TYPES = ("float32", "float16", "bfloat16")
WRITTEN = {  # what is written besides the choices, as transformers has it
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
}
# keys of bitsandbytes' settings that change nothing here
FREE = (
    "bnb_4bit_quant_storage",
    "_load_in_4bit",
    "_load_in_8bit",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_threshold",
)
KEYS = (
    "quant_method",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    SKIP,
    COMPUTE,
    *FREE,
)
SHORT = {"nf4": False, "nf4-double": True}  # --quantize: whether the absmax are quantised, too
HEAD = "lm_head"


class Quantisation(NamedTuple):
    """Which linear layers are in NF4, and how.

    Fields:
        double: whether the absmax are quantised, too.
        skip: modules that stay whole: the beginning of a path up to a dot, as a regular expression, or its end; the
            head always does.
        compute_dtype: what the products were asked to be computed in; None: float32, transformers' default.
    """

    double: bool = False
    skip: tuple[str, ...] = ()
    compute_dtype: str | None = None

    def quantises(self, module: str) -> bool:
        """Whether the linear layer at the dotted path ``module`` is quantised."""
        return not module.endswith(HEAD) and not any(_names(pattern, module) for pattern in self.skip)

    @property
    def width(self) -> float:
        """Bytes of a quantised number: half of one, and an absmax in float32 for 64 numbers; or that in a byte, and a
        nested absmax for 256 of these."""
        return 0.5 + (1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK) if self.double else 4 / BLOCK)

    def to_config(self) -> dict[str, Any]:
        """transformers' keys."""
        skip = list(self.skip) if HEAD in self.skip or not self.skip else [HEAD, *self.skip]
        compute = self.compute_dtype or WRITTEN[COMPUTE]
        return {**WRITTEN, COMPUTE: compute, "bnb_4bit_use_double_quant": self.double, SKIP: skip or None}

    def notices(self, dtype: str) -> list[str]:
        """A line where the products were asked to be of another type than ``dtype``, which they are computed in."""
        if self.compute_dtype in (None, dtype):
            return []
        return [
            f"{COMPUTE} {self.compute_dtype} has no effect: products are computed as compute_dtype says (in Python "
            f"dtype), which is {dtype}"
        ]

    def name(self) -> str:
        """For the user, as ``--quantize`` has it."""
        return next(name for name, double in SHORT.items() if double == self.double)


def _names(pattern: str, module: str) -> bool:
    # transformers' rule: a match ends where a name does
    whole = rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
    return module.endswith(pattern) or limits.match(whole, module, pattern) is not None


def skipping_all_but(layers: Iterable[int], count: int) -> tuple[str, ...]:
    """``skip`` that leaves ``layers`` of a model of ``count`` layers."""
    chosen = set(layers)
    return (HEAD, *(f"model.layers.{layer}" for layer in range(count) if layer not in chosen))


def read_quantisation(value: Any, strict: bool = True) -> Quantisation:
    """``quantization_config``: a mapping of transformers' keys, or a name of ``SHORT``.

    strict: refuse unknown keys; config.json of a newer transformers may have some.

    Raises:
        ValueError: something else than NF4, or a value of another type.
    """
    if isinstance(value, str) and value in SHORT:
        return Quantisation(SHORT[value])
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r:.80} is none of {', '.join(SHORT)}, and no mapping of transformers' keys")
    for key in value if strict else ():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1, 0.0)[0]
            raise ValueError(f"unknown key {key!r:.80}; the nearest is {near}")
    method = value.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(f"quant_method {method!r:.80} is not supported here: bitsandbytes is")
    flags = {}
    for key in ("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant"):
        flags[key] = value.get(key) or False
        if not isinstance(flags[key], bool):
            raise ValueError(f"{key} expects True or False, got {value[key]!r:.80}")
    if flags["load_in_8bit"]:
        raise ValueError("load_in_8bit is not supported: load_in_4bit with bnb_4bit_quant_type nf4 is")
    if not flags["load_in_4bit"]:
        raise ValueError("load_in_4bit is missing: set it to True, with bnb_4bit_quant_type nf4")
    kind = value.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        default = "" if "bnb_4bit_quant_type" in value else " (transformers' default)"
        raise ValueError(f"bnb_4bit_quant_type {kind!r:.80}{default} is not supported: nf4 is")
    compute = None
    if strict and value.get(COMPUTE) is not None:  # torch's own types show themselves as torch.bfloat16
        compute = str(value[COMPUTE]).rpartition(".")[2]
        if compute not in TYPES:
            raise ValueError(f"{COMPUTE} expects one of {', '.join(TYPES)}, got {value[COMPUTE]!r:.80}")
        compute = None if compute == WRITTEN[COMPUTE] else compute
    return Quantisation(flags["bnb_4bit_use_double_quant"], _skip(value.get(SKIP)), compute)


def _skip(value: Any) -> tuple[str, ...]:
    names = value or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{SKIP} expects a list of names, got {value!r:.80}")
    for name in names:
        try:
            re.compile(name)
        except (re.error, RecursionError, OverflowError) as problem:
            raise ValueError(f"{SKIP}: {name[:80]!r} is no regular expression ({problem})") from None
    return tuple(names)
