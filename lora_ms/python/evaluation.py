"""A model's answers to a file of questions, judged by a function or by one of ours."""

import os
from collections.abc import Callable
from typing import Any

from mindspore import nn

from lora_ms.data.pipeline import Preparation
from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Generator, Speaker
from lora_ms.infer.questions import chrf, is_match
from lora_ms.infer.sampling import Sampling
from lora_ms.python.peft_model import PeftModel
from lora_ms.recipes.data import NO_LIMIT
from lora_ms.recipes.evaluate import read_questions

Judge = Callable[[str, str], float]  # (answer, reference) -> its score
JUDGES: dict[str, Judge] = {"exact": is_match, "contains": lambda answer, reference: reference.strip() in answer}
CHRF = "chrf"


def evaluate_custom(
    model: nn.Cell | PeftModel,
    tokenizer,
    test_file: str | os.PathLike[str],
    judge: str | Judge = "exact",
    max_new_tokens: int = 64,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Greedy answers to the questions of ``test_file``, and their mean score.

    Args:
        model: a model of ``AutoModelForCausalLM``, or a ``PeftModel``.
        tokenizer: its chat template is applied to the questions.
        test_file: rows with answers, in any format that training reads.
        judge: ``exact`` (equal but for white space around), ``contains`` (the answer contains the reference), ``chrf``
            (the character F-score of all answers together, 0 to 100), or a function of an answer and its reference.
        max_new_tokens: longest answer, in tokens.
        num_samples: use only the first rows.

    Returns:
        ``score``, ``rows`` (their number), and ``answers``: of each row ``row``, ``prompt``, ``answer``, ``reference``,
        and ``score`` but for ``chrf``.

    Raises:
        LoraMsError: an unknown judge, a row without question or answer, or a question that is too long.
    """
    function = judge if callable(judge) else JUDGES.get(judge)
    if function is None and judge != CHRF:
        raise LoraMsError(f"judge {judge!r} is none of {', '.join((*JUDGES, CHRF))}, and no function")
    preparation = Preparation(seq_length=NO_LIMIT, split=None, num_samples=num_samples)
    questions = read_questions(os.fspath(test_file), tokenizer, preparation, "test_file")
    if not questions:
        raise LoraMsError(f"test_file {os.fspath(test_file)}: all rows are left out, so there is no question")
    cell = model.model if isinstance(model, PeftModel) else model
    speaker = Speaker(Generator(cell), tokenizer, Sampling(), max_new_tokens, cell.config.longest)
    answers = [answer.text for answer in speaker.in_turn([question.tokens for question in questions])]
    found: list[dict[str, Any]] = [
        {"row": question.where, "prompt": question.prompt, "answer": answer, "reference": question.reference}
        for question, answer in zip(questions, answers, strict=True)
    ]
    if function is None:
        score = chrf(answers, [question.reference for question in questions])
        if score is None:
            raise LoraMsError("judge chrf needs sacrebleu: pip install 'lora_ms[eval]'")
    else:
        for one in found:
            one["score"] = float(function(one["answer"], one["reference"]))
        score = sum(one["score"] for one in found) / len(found)
    return {"score": score, "rows": len(found), "answers": found}
