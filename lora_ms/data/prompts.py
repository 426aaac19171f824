"""Rows of questions without answers: what a model is asked, one conversation each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_ms.data.choices import QUESTION
from lora_ms.data.example import Message, RowFault
from lora_ms.data.formats import check_characters
from lora_ms.data.readers import read_as

ROLES = ("system", "user", "assistant")


class PromptRow(NamedTuple):
    """One conversation that ends with a question."""

    where: str
    shown: Any  # the text, or the list of messages, as the row has it
    messages: tuple[Message, ...]
    input: str = ""  # see ``Example``
    system: str = ""  # where it stands beside the text


def read_prompts(source: str) -> list[PromptRow]:
    """The rows of a file, folder or glob, each with a text under one of ``QUESTION``'s keys, or ``messages``.

    Raises:
        LoraMsError: a row that is none, with its file and line.
    """
    return read_as(source, _checked)


def _checked(where: str, row: Any) -> PromptRow:
    found = _prompt_row(where, row)
    for turn in found.messages:
        check_characters(turn.content)
    return found


def _prompt_row(where: str, row: Any) -> PromptRow:
    keys = [key for key in ("messages", *QUESTION) if isinstance(row, Mapping) and row.get(key) is not None]
    if len(keys) != 1:
        has = ", ".join(keys) if keys else "none of them"
        raise RowFault(f"the row has {has}", f"give one of messages, {', '.join(QUESTION)}")
    (key,) = keys
    value = row[key]
    if key != "messages":
        if not isinstance(value, str) or not value.strip():
            raise RowFault(f"{key} is no text", "write the question")
        if row.get("history"):
            raise RowFault("a row with history", "give its turns as messages")
        more, system = (row.get(name) or "" for name in ("input", "system"))
        if not isinstance(more, str) or not isinstance(system, str):
            raise RowFault("input or system is no text", "correct the row")
        text = f"{value}\n{more}" if more else value
        turns = (Message("system", system), Message("user", text)) if system else (Message("user", text),)
        return PromptRow(where, text, turns, more, system)
    found = value if isinstance(value, list) else []
    if not found or not all(isinstance(turn, Mapping) for turn in found):
        raise RowFault("messages is no list of objects with role and content", "correct the row")
    shown = [{"role": turn.get("role"), "content": turn.get("content")} for turn in found]
    for number, turn in enumerate(shown, start=1):
        if turn["role"] not in ROLES or not isinstance(turn["content"], str):
            raise RowFault(f"message {number} has no content, or no role of {', '.join(ROLES)}", "correct the row")
    if shown[-1]["role"] != "user":
        raise RowFault(
            f"the last message is the {shown[-1]['role']}'s",
            "end with the user's; lora-ms eval --prompts_file compares answers with those of a file",
        )
    return PromptRow(where, shown, tuple(Message(turn["role"], turn["content"]) for turn in shown))
