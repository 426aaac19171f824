"""Questions with a known answer, and how near a model's answers come to it."""

from dataclasses import dataclass

import numpy as np

from lora_ms.data.example import IGNORE_INDEX, Completion, Example, Preference, Row
from lora_ms.data.template import encode, encode_prompt
from lora_ms.errors import LoraMsError


@dataclass(frozen=True)
class Question:
    """One row: what comes before its last answer, and that answer."""

    where: str
    tokens: list[int]
    prompt: str
    reference: str


def question_of(tokenizer, row: Row) -> Question:
    """The last answer of a row taken off.

    Raises:
        LoraMsError: nothing comes before the answer.
    """
    if isinstance(row, Preference):
        row = row.chosen
    if isinstance(row, Example):
        before = row.messages[:-1]
        answer = row.messages[-1]
        reference = answer.content or ("" if answer.tool_calls is None else answer.tool_calls.text)
        tokens = encode_prompt(tokenizer, before, row.input, row.tools)
        return Question(row.where, tokens, prompt=before[-1].content, reference=reference)
    token_row = encode(tokenizer, row)[0] if isinstance(row, Completion) else row
    labelled = np.flatnonzero(token_row.labels != IGNORE_INDEX)
    breaks = np.flatnonzero(np.diff(labelled) > 1)  # the last unbroken run of labels is the last answer
    first = 0
    if len(breaks):
        first = int(labelled[breaks[-1] + 1])
    elif len(labelled):
        first = int(labelled[0])
    if first == 0:
        raise LoraMsError(f"{row.where}: no question comes before an answer: give rows with both")
    ids = token_row.input_ids.tolist()
    question = ids[:first]
    if isinstance(row, Completion):
        return Question(row.where, question, row.prompt, row.completion)
    answer_ids = ids[first : labelled[-1] + 1]
    prompt, reference = (tokenizer.decode(part, skip_special_tokens=True) for part in (question, answer_ids))
    return Question(row.where, question, prompt, reference)


def is_match(answer: str, reference: str) -> bool:
    """Whether they are equal but for white space around them."""
    return answer.strip() == reference.strip()


def chrf(answers: list[str], references: list[str]) -> float | None:
    """Character F-score of all answers together (Popović, 2015), 0 to 100; None where sacrebleu is not installed."""
    try:
        from sacrebleu import corpus_chrf
    except ImportError:
        return None
    return float(corpus_chrf(answers, [references]).score)
