"""What the JSON files of a model's and an adapter's folder may hold: keys that are read here, their types and bounds.

Keys that are not listed may hold anything; a key may be left out, and whoever needs it says so. Bounds are far above
what any model has, and keep a file from asking for more memory than there is.
"""

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from lora_ms.errors import LoraMsError
from lora_ms.limits import PATTERN_LENGTH

SHOWN = 5  # problems of a file that are listed
TYPES = {  # pydantic's kinds of error
    "int_type": "expects a whole number",
    "float_type": "expects a number",
    "bool_type": "expects true or false",
    "string_type": "expects text",
    "dict_type": "expects an object",
    "list_type": "expects a list",
    "finite_number": "expects a finite number",
}


def _names(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError("expects a text or a list of texts")


def _pattern(value: str) -> None:
    if len(value) > PATTERN_LENGTH:
        raise ValueError(f"expects regular expressions of at most {PATTERN_LENGTH:,} characters")
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"expects regular expressions ({value[:80]!r}: {error})") from None


def _pattern_or_names(value: Any) -> Any:
    if isinstance(value, str):
        _pattern(value)
    return _names(value)


def _patterns(value: Any) -> Any:
    for pattern in value if isinstance(value, dict) else [value] if isinstance(value, str) else _names(value):
        _pattern(pattern)
    return value


def _layers(value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    if all(type(number) is int and 0 <= number < LAYERS for number in numbers):
        return value
    raise ValueError(f"expects a layer below {LAYERS:,}, or a list of them")


def _ranks(value: Any) -> Any:
    # a rank, or AdaLoRA's mask
    for item in value.values():
        mask = isinstance(item, list) and all(isinstance(flag, bool) for flag in item)
        if not mask and not (type(item) is int and 0 <= item <= RANK):
            raise ValueError(f"expects ranks up to {RANK:,}")
    return value


def _token(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str)):
        return value
    raise ValueError("expects the text of a token, or an object with its content")


def _tokens(value: Any) -> Any:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        _token(item)
    return value


def _tokens_by_id(value: dict) -> dict:
    for number, token in value.items():
        if not (number.isascii() and number.isdecimal() and int(number[:10]) < VOCABULARY):
            raise ValueError(f"expects token ids below {VOCABULARY:,} as keys")
        _token(token)
    return value


def _templates(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    if isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
        for each in value
    ):
        return value
    raise ValueError("expects a template, or a list of them, each with name and template")


def _nothing(value: Any) -> Any:
    if value:
        raise ValueError("is not read: leave it out")
    return value


def _file_names(value: Any) -> Any:
    if all("/" not in name for name in _names(value)):
        return value
    raise ValueError("expects names of files in the folder")


LAYERS, RANK, VOCABULARY = 1000, 2**16, 2**24  # bounds
Names = Annotated[Any, AfterValidator(_names)] | None
Targets = Annotated[Any, AfterValidator(_pattern_or_names)] | None
Patterns = Annotated[Any, AfterValidator(_patterns)] | None
Layers = Annotated[Any, AfterValidator(_layers)] | None
Token = Annotated[Any, AfterValidator(_token)] | None
Tokens = Annotated[Any, AfterValidator(_tokens)] | None
Factor = Annotated[float, Field(gt=-1e6, lt=1e6)]
Probability = Annotated[float, Field(ge=0, le=1)] | None
Steps = Annotated[int, Field(ge=0, lt=2**40)] | None
Rank = Annotated[int, Field(ge=1, le=RANK)] | None


SOME = Field(max_length=20_000)  # patterns


class FolderFile(BaseModel):
    """A JSON file of a folder."""

    model_config = ConfigDict(  # built when the first such file is read: that takes 2 ms
        strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )


class ConfigJson(FolderFile):
    """config.json."""

    architectures: list[str] | None = None
    model_type: str | None = None
    hidden_act: str = "silu"
    vocab_size: int | None = Field(None, ge=1, le=VOCABULARY)
    hidden_size: int | None = Field(None, ge=1, le=2**17)
    intermediate_size: int | None = Field(None, ge=1, le=2**20)
    num_hidden_layers: int | None = Field(None, ge=1, le=LAYERS)
    num_attention_heads: int | None = Field(None, ge=1, le=2**12)
    num_key_value_heads: int | None = Field(None, ge=1, le=2**12)
    head_dim: int | None = Field(None, ge=1, le=2**12)
    rms_norm_eps: float = Field(1e-6, gt=0, lt=1)
    rope_theta: float = Field(1e4, gt=0, lt=1e15)
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = Field(2048, ge=1, le=2**30)
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = Field(4, ge=1, le=LAYERS)


class GenerationJson(FolderFile):
    """generation_config.json."""

    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, lt=1e6)
    top_k: int | None = Field(None, ge=0, le=2**31)
    top_p: Probability = None
    repetition_penalty: float | None = Field(None, gt=0, lt=1e6)


class IndexJson(FolderFile):
    """model.safetensors.index.json."""

    weight_map: dict[str, str] = Field(min_length=1)


class TokenizerJson(FolderFile):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    chat_template: Annotated[Any, AfterValidator(_templates)] | None = None
    bos_token: Token = None
    eos_token: Token = None
    pad_token: Token = None
    unk_token: Token = None
    extra_special_tokens: Tokens = None
    additional_special_tokens: Tokens = None
    added_tokens_decoder: Annotated[dict[str, Any], AfterValidator(_tokens_by_id)] | None = None
    model_max_length: float | None = Field(None, gt=0)
    # what names files of other folders to transformers
    fast_tokenizer_files: Annotated[Any, AfterValidator(_file_names)] | None = None
    init_inputs: Annotated[Any, AfterValidator(_nothing)] = None
    gguf_file: Annotated[Any, AfterValidator(_nothing)] = None


class AdapterJson(FolderFile):
    """adapter_config.json: the keys of all methods."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    target_modules: Targets = None
    exclude_modules: Targets = None
    modules_to_save: Names = None
    feedforward_modules: Targets = None
    layers_to_transform: Layers = None
    layers_pattern: Patterns = None
    r: Rank = None
    init_r: Rank = None
    target_r: Rank = None
    lora_alpha: Factor | None = None
    lora_dropout: Probability = None
    rank_pattern: Annotated[dict[str, Any], AfterValidator(_ranks), AfterValidator(_patterns), SOME] | None = None
    alpha_pattern: Annotated[dict[str, Factor], AfterValidator(_patterns), SOME] | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    tinit: Steps = None
    tfinal: Steps = None
    deltaT: Steps = None
    total_step: Steps = None
    beta1: Probability = None
    beta2: Probability = None
    orth_reg_weight: Factor | None = None


def with_keys(kind: type[FolderFile], keys: Mapping[str, Any]) -> type[FolderFile]:
    """``kind`` with more keys, by their types; each may be left out."""
    fields: dict[str, Any] = {name: (each | None, None) for name, each in keys.items()}
    return create_model(kind.__name__, __base__=kind, **fields)


def check(kind: type[FolderFile], value: dict[str, Any], file: Path | str) -> dict[str, Any]:
    """``value``, as it was read from ``file``.

    Raises:
        LoraMsError: values of another type, or out of bounds; the first are listed.
    """
    try:
        kind.model_validate(value)
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        lines = [_line(error) for error in errors[:SHOWN]]
        more = f" and {len(errors) - SHOWN:,} more" if len(errors) > SHOWN else ""
        raise LoraMsError(f"{file}: {'; '.join(lines)}{more}") from None
    return value


def _line(error: Any) -> str:
    key = ".".join(str(part)[:80] for part in error["loc"])
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return f"{key} is missing"
        case "value_error":
            text = str(context["error"])
        case "greater_than_equal" | "too_short":
            text = f"expects {context.get('ge', context.get('min_length'))} or more"
        case "greater_than":
            text = f"expects more than {context['gt']:.10g}"
        case "less_than_equal":
            text = f"expects {context['le']:,} or less"
        case "less_than":
            text = f"expects less than {context['lt']:.10g}"
        case "too_long":
            text = f"expects {context['max_length']:,} entries or fewer"
        case kind:
            text = TYPES.get(kind, error["msg"])
    return f"{key} {text}, got {reprlib.repr(error['input'])}"
