"""The bodies of requests, as JSON has them. What a key means is OpenAI's, or vLLM's where OpenAI has none.

A key is used; or it has no effect on an answer and is accepted (``IDLE``); or it would change the answer in a way that
is not supported, and is an error unless its value asks for nothing (``REFUSED``); or it is unknown, and is named in the
answer's header. ``null`` is as good as no key everywhere.
"""

import json
import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_ms.serve.faults import ApiError
from lora_ms.serve.settings import (
    DEEPEST,
    MOST_ANSWERS,
    MOST_BIASES,
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_STOP,
    MOST_STOPS,
    MOST_VALUES,
)

Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP)]
Name = Annotated[str, Field(max_length=512)]
SAID = 12  # unknown keys that are named


class Body(BaseModel):
    """A JSON object that a client sent."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())
    IDLE: ClassVar[frozenset[str]] = frozenset()
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}  # the values that ask for nothing, besides null

    def unknown(self) -> list[str]:
        """Keys that nobody here knows, safe for a header."""
        extra = [key for key in self.model_extra or {} if key not in self.IDLE and key not in self.REFUSED]
        return [re.sub(r"[^\w.\-]", "?", key, flags=re.ASCII)[:64] for key in extra[:SAID]]

    def check_refused(self) -> None:
        """Raises ApiError where a key asks for what is not supported."""
        for key, value in (self.model_extra or {}).items():
            if key in self.REFUSED and not any(value == idle for idle in self.REFUSED[key]):
                raise ApiError(400, f"{key} is not supported: leave it out", key)


class StreamOptions(Body):
    """``stream_options``."""

    IDLE = frozenset({"include_obfuscation"})
    REFUSED = {"continuous_usage_stats": (False,)}
    include_usage: bool = False


class Asking(Body):
    """What chats and completions share."""

    IDLE = frozenset(
        "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention request_id".split()
    )
    REFUSED = {
        "best_of": (1,),
        "suffix": ("",),
        "min_tokens": (0,),
        "include_stop_str_in_output": (False,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "early_stopping": (False,),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "truncate_prompt_tokens": (),
        "prompt_logprobs": (),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_decoding_backend": (),
        "logits_processors": ([],),
        "priority": (0,),
        "spaces_between_special_tokens": (True,),
    }
    model: Name | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] = Field({}, max_length=MOST_BIASES)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of it."""
        return self.stream_options is not None and self.stream_options.include_usage

    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` by token id."""
        for key, value in self.logit_bias.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and -100 <= value <= 100):
                raise ApiError(400, "logit_bias expects token ids with numbers from -100 to 100", "logit_bias")
        return tuple((int(key), value) for key, value in self.logit_bias.items())


class ContentPart(Body):
    """A part of a message's content: text, and nothing else is read."""

    IDLE = frozenset({"cache_control", "annotations"})
    type: str
    text: str | None = None


class ChatMessage(Body):
    """One message."""

    IDLE = frozenset({"name", "annotations", "id"})
    REFUSED = {"tool_calls": ([],), "function_call": (), "tool_call_id": (), "refusal": ("",), "audio": ()}
    role: str
    content: str | Annotated[list[ContentPart], Field(max_length=MOST_PARTS)] | None = None
    reasoning_content: str = ""


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class ChatBody(Asking):
    """``POST /v1/chat/completions``."""

    IDLE = Asking.IDLE | {"parallel_tool_calls", "web_search_options"}
    REFUSED = Asking.REFUSED | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "echo": (False,),
        "mm_processor_kwargs": ({},),
    }
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)


class CompletionBody(Asking):
    """``POST /v1/completions``."""

    REFUSED = Asking.REFUSED | {"add_special_tokens": (True,)}
    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_ANSWERS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Several, of one kind."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt, or messages."""

    IDLE = frozenset({"return_token_strs"})
    REFUSED = {"add_generation_prompt": (True,), "chat_template": (), "chat_template_kwargs": ({},), "tools": ([],)}
    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class LoadBody(Body):
    """``POST /v1/load_lora_adapter``."""

    REFUSED = {"load_inplace": (False,), "is_3d_lora_weight": (False,)}
    lora_name: str = Field(min_length=1, max_length=128)
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadBody(Body):
    """``POST /v1/unload_lora_adapter``."""

    IDLE = frozenset({"lora_int_id"})
    lora_name: str = Field(min_length=1, max_length=128)


B = TypeVar("B", bound=Body)


def parse_json(data: bytes) -> Any:
    """The value of a body.

    Raises:
        ApiError: not JSON, NaN, a key twice in one object, or too deep.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError("a key stands twice in one object")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ApiError(400, f"the body is nested deeper than {DEEPEST} levels") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    level, depth, values = [value] if isinstance(value, dict | list) else [], 0, 0
    while level:
        depth += 1
        values += sum(map(len, level))
        if values > MOST_VALUES:
            raise ApiError(400, f"the body holds more than {MOST_VALUES} values")
        if depth > DEEPEST:
            raise ApiError(400, f"the body is nested deeper than {DEEPEST} levels")
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        level = [each for each in inner if isinstance(each, dict | list)]
    return value


def parse(kind: type[B], value: Any) -> B:
    """The body as ``kind``.

    Raises:
        ApiError: a value of another type or out of bounds, a key that is missing, or one that is not supported.
    """
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        body = kind.model_validate(_without_null(value))
    except ValidationError as problem:
        raise _fault(problem) from None
    _each(body, lambda part: part.check_refused())
    return body


def unknown_keys(body: Body) -> list[str]:
    """Keys of the body and of its parts that have no meaning here."""
    found: list[str] = []
    _each(body, lambda part: found.extend(part.unknown()))
    return list(dict.fromkeys(found))[:SAID]


def _each(body: Body, act: Callable[[Body], None]) -> None:
    act(body)
    for name in type(body).model_fields:
        value = getattr(body, name)
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, Body):
                _each(part, act)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _fault(problem: ValidationError) -> ApiError:
    """The first problem; of a key that may be of several types, the first that each of them has."""
    errors = problem.errors(include_url=False)
    first = errors[0]
    top = str(first["loc"][0])
    where = ".".join(str(part) for part in first["loc"] if re.fullmatch(r"\w{1,64}", str(part)))
    several = sorted({error["msg"] for error in errors if str(error["loc"][0]) == top})
    text = first["msg"] if len(several) == 1 else f"none of its types fits ({'; '.join(several)})"
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", top)
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return ApiError(400, f"{where}: {text}, got {short.repr(first['input'])}", top)
