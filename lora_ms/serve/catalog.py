"""The names that requests ask for: the model's own, and those of its adapters."""

import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_ms.data.example import Message
from lora_ms.data.template import encode_prompt, end_of_turn
from lora_ms.errors import LoraMsError
from lora_ms.serve.bodies import ChatMessage
from lora_ms.serve.faults import ApiError
from lora_ms.text import listed

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NAME = re.compile(r"[\w.:\-]+(?:/[\w.:\-]+)*")
MOST_NAME = 128  # characters


def check_name(name: str) -> str:
    """Raises LoraMsError where ``name`` cannot stand in a URL; returns it."""
    if len(name) > MOST_NAME or not NAME.fullmatch(name) or {"", ".", ".."} & {*name.split("/")}:
        raise LoraMsError(f"{name[:MOST_NAME]!r} is no name for a model: use letters, digits and . _ - : /")
    return name


@dataclass
class Served:
    """What one name stands for.

    Attributes:
        adapter: its name in the engine; None: the model without one.
        tokenizer: with the chat template that it was trained with.
        root: the folder.
        ends: ids that end an answer.
    """

    name: str
    adapter: str | None
    tokenizer: Any
    root: str
    ends: tuple[int, ...]
    created: int = field(default_factory=lambda: int(time.time()))


class Catalog:
    """What is served, by name.

    Args:
        names: of the model itself; the first is the one that answers carry where a request has none.
        tokenizer: the model's.
        ends: ids that end an answer, besides the chat template's own.
        length: most tokens of a prompt and its answer together.
    """

    def __init__(self, names: Sequence[str], tokenizer: Any, root: str, ends: Sequence[int], length: int):
        self.length = length
        self.ends = tuple(ends)
        self.base = Served(check_name(names[0]), None, tokenizer, root, self._ends(tokenizer))
        self.served = {check_name(name): copy.copy(self.base) for name in names}
        for name, served in self.served.items():
            served.name = name
        pieces = tokenizer.get_vocab()
        self.longest = max(map(len, pieces), default=1)  # characters of a token, at most

    def add(self, name: str, root: str, template: str | None) -> Served:
        """An adapter that the engine has under ``name``; template: of its folder, if it has one.

        Raises:
            LoraMsError: the name is taken, or none.
        """
        check_name(name)
        if name in self.served:
            raise LoraMsError(f"the name {name!r} is taken: give another")
        tokenizer = self.base.tokenizer
        if template is not None and template != tokenizer.chat_template:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = template
        self.served[name] = Served(name, name, tokenizer, root, self._ends(tokenizer))
        return self.served[name]

    def remove(self, name: str) -> None:
        """Takes an adapter from what is served; requests that run keep it."""
        del self.served[name]

    def find(self, name: str | None) -> Served:
        """What ``name`` stands for; None: the model itself.

        Raises:
            ApiError: no such name.
        """
        if name is None:
            return self.base
        if name not in self.served:
            there = listed([*self.served], most=8, separator=", ")
            raise ApiError(404, f"The model `{name[:MOST_NAME]}` does not exist; there are: {there}", "model")
        return self.served[name]

    def cards(self) -> list[dict[str, Any]]:
        """The list of ``GET /v1/models``."""
        return [self.card(served) for served in self.served.values()]

    def card(self, served: Served) -> dict[str, Any]:
        """One entry of it."""
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "lora_ms",
            "root": served.root,
            "parent": None if served.adapter is None else self.base.name,
            "max_model_len": self.length,
            "permission": [],
        }

    def chat_tokens(self, served: Served, messages: Sequence[ChatMessage], param: str = "messages") -> list[int]:
        """The prompt for the assistant's next turn.

        Raises:
            ApiError: a role or content that is not read, or a conversation that the template refuses or is too long.
        """
        turns = [_message(message, f"{param}.{number}") for number, message in enumerate(messages)]
        if turns[-1].role == "assistant":
            raise ApiError(400, "the last message is the assistant's: end with the user's", param)
        self._check_length(sum(len(turn.content) + len(turn.reasoning) for turn in turns), param)
        return self._encoded(lambda: encode_prompt(served.tokenizer, turns), param)

    def text_tokens(self, served: Served, text: str, special: bool, param: str = "prompt") -> list[int]:
        """A text's tokens; special: with those that the tokenizer puts around a text.

        Raises:
            ApiError: it is too long, or holds half a character.
        """
        self._check_length(len(text), param)
        return self._encoded(lambda: served.tokenizer(text, add_special_tokens=special, verbose=False).input_ids, param)

    def new_tokens(self, prompt: Sequence[int], asked: int | None, keys: tuple[str, str]) -> int:
        """How many tokens an answer to ``prompt`` has at most.

        keys: of the request: the prompt's, and the number's.

        Raises:
            ApiError: they do not fit.
        """
        room = self.length - len(prompt)
        limit = f"This model's maximum context length is {self.length} tokens"
        if not prompt:
            raise ApiError(400, "the prompt is empty: give at least one token", keys[0])
        if room < (1 if asked is None else min(asked, 1)):
            raise ApiError(400, f"{limit}, and the prompt has {len(prompt)}: shorten it", keys[0])
        if asked is not None and asked > room:
            have = f"{keys[1]} is {asked} and the prompt has {len(prompt)} tokens"
            raise ApiError(400, f"{limit}, but {have}: shorten one of them", keys[1])
        return room if asked is None else asked

    def _check_length(self, characters: int, param: str) -> None:
        """Refuses, before it is tokenised, what is too long whatever its tokens are."""
        if characters > self.length * self.longest:
            limit = f"This model's maximum context length is {self.length} tokens"
            raise ApiError(400, f"{limit}, and the prompt has {characters} characters: shorten it", param)

    def _encoded(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return encode()
        except LoraMsError as error:
            raise ApiError(400, str(error), param) from None
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the template is a program of the model's author; the tokenizer is Rust's
            raise ApiError(400, f"the prompt cannot be built: {str(error)[:200]}", param) from None

    def _ends(self, tokenizer: Any) -> tuple[int, ...]:
        return tuple(sorted({*self.ends, end_of_turn(tokenizer)}))


def _message(message: ChatMessage, where: str) -> Message:
    if message.role not in ROLES:
        known = ", ".join(ROLES)
        raise ApiError(400, f"{where}.role: {message.role[:64]!r} is not supported; there are {known}", "messages")
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                kind = part.type[:64]
                raise ApiError(400, f"{where}.content: parts of type {kind!r} are not supported: text is", "messages")
        content = "\n".join(part.text or "" for part in content)
    if content is None:
        raise ApiError(400, f"{where}.content is missing", "messages")
    return Message(ROLES[message.role], content, message.reasoning_content)
