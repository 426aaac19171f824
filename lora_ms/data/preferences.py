"""Rows of preferences: two answers of which one is liked, or one answer and whether it is liked.

Each is read as one or two ordinary rows, so that questions, turns, tools and templates are what they are elsewhere:

    question columns + chosen, rejected     texts, turns ({from, value} or {role, content}), or lists of turns
    chosen, rejected                        two whole conversations that differ in the last turn
    an ordinary row + label or kto_tag      true or false
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_ms.data.columns import QUESTION, as_flag, from_json, quoted, turns_of
from lora_ms.data.example import IGNORE_INDEX, Completion, Example, Preference, Row, RowFault, TokenRow
from lora_ms.data.store import TokenStore

Preferences = Literal["none", "pairs", "labelled"]
CONVERSATIONS = ("messages", "conversations")
LABELS = ("label", "kto_tag")
ROLES_OF_ANSWERS = ("assistant", "gpt", "bot", "model")
BOTH = "a row has a question, a chosen answer and a rejected one"


class Answer(NamedTuple):
    """One answer, as an ordinary row has it."""

    value: Mapping[str, Any]
    liked: bool


def answers_of(value: Any, kind: Preferences) -> list[Answer]:
    """The ordinary rows that a row stands for: itself where ``kind`` is none.

    Raises:
        RowFault: it is no row of that kind.
    """
    if kind == "none" or not isinstance(value, Mapping):
        return [Answer(value, True)]
    return _pair(value) if kind == "pairs" else [_labelled(value)]


def _labelled(value: Mapping[str, Any]) -> Answer:
    if value.get("rejected") is not None:
        raise RowFault('two answers ("rejected")', "kto learns from single answers: for pairs take dpo, orpo or simpo")
    key = next((key for key in LABELS if value.get(key) is not None), None)
    if key is None:
        raise RowFault(
            'no label: "label" is missing', "say in every row whether its answer is liked: label: true or false"
        )
    liked = as_flag(value[key])
    if liked is None:
        raise RowFault(f"{key} is {quoted(value[key])}", "an answer is liked or not: give true or false")
    return Answer({name: item for name, item in value.items() if name != key}, liked)


def _pair(value: Mapping[str, Any]) -> list[Answer]:
    given = [_given(value.get(key)) for key in ("chosen", "rejected")]
    for key, item in zip(("chosen", "rejected"), given, strict=True):
        if item is None or not (item.strip() if isinstance(item, str) else item):
            state = "missing" if value.get(key) is None else "empty"
            raise RowFault(f'no {key} answer: "{key}" is {state}', BOTH)
    rest = {key: item for key, item in value.items() if key not in ("chosen", "rejected")}
    forms = [isinstance(item, str) for item in given]
    if forms[0] != forms[1]:
        raise RowFault(
            "chosen is a text and rejected a list of turns, or the other way round", "give both answers in one form"
        )
    answers = [_texts(rest, item) if forms[0] else _turns(rest, item) for item in given]
    return [Answer(answers[0], True), Answer(answers[1], False)]


def _given(value: Any) -> Any:
    """An answer. Turns may be written as JSON; any other text is one, also where it is JSON."""
    found = from_json(value)
    turns = found if isinstance(found, list) else [found]
    roles = bool(turns) and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns)
    return value if isinstance(value, str) and found is not None and not roles else found


def _conversation(rest: Mapping[str, Any]) -> str | None:
    """The column that holds the turns of the question."""
    return next((key for key in CONVERSATIONS if rest.get(key) is not None), None)


def _texts(rest: Mapping[str, Any], answer: str) -> Mapping[str, Any]:
    """The ordinary row of an answer that is a text."""
    key = _conversation(rest)
    if key is not None:
        turns = turns_of(rest[key])
        return {**rest, key: [*(turns or []), {"role": "assistant", "content": answer}]}
    if rest.get("prompt") is None:
        if all(rest.get(name) is None for name in (*QUESTION, "input")):
            raise RowFault("there is no question beside chosen and rejected", BOTH)
        if all(rest.get(name) is None for name in QUESTION):
            rest = {**{name: value for name, value in rest.items() if name != "input"}, "instruction": rest["input"]}
        return {**rest, "output": answer}
    turns = turns_of(rest["prompt"])
    if turns is None:
        return {**rest, "completion": answer}
    return {**_without_question(rest), "messages": [*turns, {"role": "assistant", "content": answer}]}


def _turns(rest: Mapping[str, Any], answer: Any) -> Mapping[str, Any]:
    """The ordinary row of an answer that is a turn, or a list of turns: the last ones, or the whole conversation."""
    turns = [answer] if isinstance(answer, Mapping) else turns_of(answer)
    if turns is None or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowFault("chosen and rejected are no texts, turns or lists of turns", BOTH)
    key = _conversation(rest)
    before = [] if key is None else turns_of(rest[key]) or []
    whole = str(turns[0].get("role", turns[0].get("from"))).lower() not in ROLES_OF_ANSWERS  # the question is in it
    if key is not None and not (whole and before[:1] == turns[:1]):
        return {**rest, key: [*before, *turns]}
    plain = _without_question(rest)
    if whole:
        return {**plain, "messages": turns}
    prompt = rest.get("prompt")
    question = turns_of(prompt)
    if question is not None:
        return {**plain, "messages": [*question, *turns]}
    if isinstance(prompt, str):
        return {**plain, "messages": [{"role": "user", "content": prompt}, *turns]}
    if len(turns) == 1:  # beside instruction
        return {**rest, "output": turns[0].get("content", turns[0].get("value"))}
    raise RowFault("there is no question before the answers", BOTH)


def _without_question(rest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in rest.items() if key not in ("prompt", *CONVERSATIONS)}


def joined(rows: Sequence[Row], answers: Sequence[Answer]) -> Row:
    """What ``rows``, into which ``answers`` were parsed, are together.

    Raises:
        RowFault: they are no two answers to one question, or no texts.
    """
    texts = [
        replace(row, liked=answer.liked)
        for row, answer in zip(rows, answers, strict=True)
        if isinstance(row, Example | Completion)
    ]
    if len(texts) < len(rows):
        raise RowFault("preferences as token ids are not read", "give texts or messages")
    if len(texts) == 1:
        return texts[0]
    chosen, rejected = texts
    if _question(chosen) != _question(rejected):
        raise RowFault("chosen and rejected answer different questions", "they may differ in the last answer alone")
    if _answer(chosen) == _answer(rejected):
        raise RowFault("chosen and rejected are equal", "remove the row")
    return Preference(chosen.where, chosen, rejected)


def _question(row: Example | Completion) -> Any:
    return row.prompt if isinstance(row, Completion) else row.messages[:-1]


def _answer(row: Example | Completion) -> Any:
    return row.completion if isinstance(row, Completion) else row.messages[-1]


def texts_of(row: Row) -> list[Example | Completion]:
    """The texts of a row, in the order of their rows of tokens; none for a row that came as tokens."""
    if isinstance(row, Preference):
        return [row.chosen, row.rejected]
    return [] if isinstance(row, TokenRow) else [row]


def with_mismatched(store: TokenStore, seq_length: int) -> TokenStore:
    """Each row followed by its question with the answer of the row before it, of ``seq_length`` tokens at most: what
    KTO compares its answers with."""
    found: list[TokenRow] = []
    for index in range(len(store)):
        row, other = store[index], store[index - 1 if index else len(store) - 1]
        start, answer = int(row.learnt[0]), int(other.learnt[0])
        ids = np.concatenate([row.input_ids[:start], other.input_ids[answer:]])[:seq_length]
        labels = np.concatenate([row.labels[:start], other.labels[answer:]])[:seq_length]
        if (labels != IGNORE_INDEX).any():
            found += [row, TokenRow(row.where, ids, labels, row.liked)]
        else:  # no room for another's answer: its own
            found += [row, row]
    return TokenStore.of(found)
