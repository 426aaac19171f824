"""The rotary settings of config.json, as transformers reads them, in the layouts before and since its version 5, and of
MindFormers' YAML."""

from collections.abc import Mapping
from typing import Any

from lora_ms.errors import LoraMsError
from lora_ms.nn.rope import magnitude

ROPE_TYPES: dict[str, tuple[str, ...]] = {  # and the numbers that each needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# MindFormers' names of all but NTK
EXTEND_METHODS = {"PI": "linear", "linear": "linear", "DYNAMIC_NTK": "dynamic", "YARN": "yarn", "LLAMA3": "llama3"}
MOST = 1e15  # of a number
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")


def rope(hf: Mapping[str, Any]) -> tuple[float, dict | None]:
    """Base and scaling from ``rope_theta`` and ``rope_scaling``, or from ``rope_parameters`` (since transformers 5).

    Where both stand, rope_scaling counts, as in transformers: model cards tell their readers to add it.

    Raises:
        LoraMsError: a scaling that is not computed, numbers that are missing, or two settings that exclude each other.
    """
    older, newer = (hf.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    for key, found in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
            raise LoraMsError(f"config.json: {key} {found} is not supported: one set of numbers for all layers is")
    chosen = older or newer
    theta = chosen.get("rope_theta", hf.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < MOST:
        raise LoraMsError(f"config.json: rope_theta expects a number above 0, got {theta!r}")
    if older and newer:
        check_agree(older, newer, theta)
    if chosen.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1):
        raise LoraMsError("config.json: partial_rotary_factor is not supported; whole heads are rotated")
    kind = kind_of(chosen)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise LoraMsError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    numbers = dict(chosen)
    longest = hf.get("max_position_embeddings", 2048)
    if "original_max_position_embeddings" in ROPE_TYPES[kind]:
        numbers.setdefault("original_max_position_embeddings", longest)
        if "original_max_position_embeddings" in hf:
            numbers["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    if kind == "yarn" and "factor" in numbers and numbers["factor"] is None:
        numbers["factor"] = longest / numbers["original_max_position_embeddings"]
    return float(theta), scaling_of(kind, numbers, "config.json: rope_type")


def kind_of(settings: Mapping[str, Any]) -> str:
    return settings.get("rope_type", settings.get("type", "default"))


def check_agree(older: Mapping[str, Any], newer: Mapping[str, Any], theta: float) -> None:
    """Raises LoraMsError where rope_scaling, which counts, loses what rope_parameters says."""
    lost = newer.get("rope_theta", theta)
    if lost != theta:
        raise LoraMsError(
            f"config.json: rope_scaling takes the place of rope_parameters, and rope_theta would be {theta:g} in place "
            f"of {lost:g}: write the scaling into rope_parameters, beside its rope_theta"
        )
    if kind_of(newer) not in ("default", kind_of(older)):
        raise LoraMsError(
            f"config.json: rope_scaling is {kind_of(older)} and rope_parameters {kind_of(newer)}: take one of them out"
        )


def scaling_of(kind: str, numbers: Mapping[str, Any], where: str) -> dict | None:
    """``rope_scaling`` with what its kind reads, and nothing else; None for the default.

    where: how errors begin, before the kind.

    Raises:
        LoraMsError: a number is missing, or is none.
    """
    needed = ROPE_TYPES[kind]
    missing = [key for key in needed if numbers.get(key) is None]
    if missing:
        raise LoraMsError(f"{where} {kind} needs {', '.join(missing)}")
    options = YARN_OPTIONS if kind == "yarn" else ()
    found = {key: numbers[key] for key in (*needed, *options) if numbers.get(key) is not None}
    for key, value in found.items():
        right = isinstance(value, bool) == (key == "truncate") and isinstance(value, (int, float))
        if not right or not abs(value) < MOST or (key in needed and value <= 0):
            raise LoraMsError(f"{where} {kind}: {key} {value!r} is out of range")
    return None if kind == "default" else {"rope_type": kind, **found}


def mindformers_rope(
    theta: float | None, extend_method: str, scaling_factor: float | Mapping[str, Any] | None, longest: int
) -> tuple[float | None, dict | None]:
    """Base and scaling from MindFormers' keys; longest: the model's ``max_position_embeddings``, in tokens.

    NTK is a larger base. DYNAMIC_NTK is config.json's rope_type dynamic (MindFormers' own grows in powers of two).

    Raises:
        LoraMsError: keys of scaling_factor that are unknown, missing or out of range.
    """
    if extend_method == "NTK":
        if isinstance(scaling_factor, Mapping) or theta is None:
            raise LoraMsError("extend_method NTK needs theta, and a number in scaling_factor to multiply it by")
        return theta * (scaling_factor or 1.0), None
    if extend_method not in EXTEND_METHODS:
        return theta, None
    kind = EXTEND_METHODS[extend_method]
    numbers = dict(scaling_factor) if isinstance(scaling_factor, Mapping) else {"factor": scaling_factor or 1.0}
    if "original_max_position_embedding" in numbers:
        numbers["original_max_position_embeddings"] = numbers.pop("original_max_position_embedding")
    known = (*ROPE_TYPES[kind], *(YARN_OPTIONS if kind == "yarn" else ()))
    unknown = [key for key in numbers if key not in known]
    if unknown:
        raise LoraMsError(
            f"scaling_factor: {unknown[0]} is unknown to extend_method {extend_method}; known: {', '.join(known)}"
        )
    numbers.setdefault("original_max_position_embeddings", longest)
    scaling = scaling_of(kind, numbers, "scaling_factor: extend_method")
    if scaling is not None and ("mscale" in scaling or "mscale_all_dim" in scaling):
        # MindFormers takes their ratio even where one of them is 0
        first = magnitude(scaling["factor"], scaling.pop("mscale", 1.0))
        scaling["attention_factor"] = first / magnitude(scaling["factor"], scaling.pop("mscale_all_dim", 0.0))
    return theta, scaling


def longest_text(max_position_embeddings: int, scaling: Mapping[str, Any] | None) -> int:
    """Tokens that a model takes: ``max_position_embeddings``, or what its scaling stretches them to, as in vLLM.

    Llama 3.1's config.json has the stretched length there already.
    """
    kind, factor = ("default", 1) if scaling is None else (scaling["rope_type"], scaling["factor"])
    if kind in ("linear", "dynamic"):
        return int(max_position_embeddings * factor)
    if kind == "yarn" and scaling is not None:
        return max(max_position_embeddings, int(scaling["original_max_position_embeddings"] * factor))
    return max_position_embeddings
