"""Held-out rows and questions: what a run evaluates, and what ``lora-ms eval`` asks a model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_ms import saving
from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.data.loader import DataPlan
from lora_ms.data.pipeline import Preparation, read
from lora_ms.data.report import Tally
from lora_ms.data.store import TokenStore
from lora_ms.data.template import encode_prompt
from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import check_prompts
from lora_ms.infer.generate import Generator, Speaker
from lora_ms.infer.questions import Question, chrf, is_match, question_of
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import CausalLM
from lora_ms.objectives.base import ObjectiveKeys
from lora_ms.recipes.data import NO_LIMIT, PreparedRows, held_out_plan, tokenizer_for
from lora_ms.recipes.objectives import preference_term
from lora_ms.runtime.device import Runtime
from lora_ms.train.evaluation import Evaluator, PreferenceEvaluator

PREDICTIONS = "predictions.jsonl"


def plan_of(
    config: RunConfig, store: TokenStore, tokenizer, seq_length: int, runtime: Runtime, lead: Sequence[int] = ()
) -> DataPlan:
    """One pass over rows of at most ``seq_length`` tokens behind ``lead``, laid out as ``eval_dataset`` says."""
    dataset = config.eval_dataset
    return held_out_plan(
        store,
        config.eval_batch_size,
        tokenizer,
        seq_length,
        runtime,
        packing=dataset.packing,
        length_buckets=dataset.length_buckets,
        lead=lead,
    )


def evaluator_for(
    config: RunConfig,
    model: CausalLM,
    held_out: PreparedRows,
    tokenizer,
    seq_length: int,
    runtime: Runtime,
    *,
    references: NDArray[np.float64] | None = None,
) -> Evaluator:
    """What a run evaluates with: the loss of ``held_out``, and the answers to ``evaluation.prompts``.

    references: ``reference_log_probs`` of ``held_out``.
    """
    samples = SampleAnswers(config, model, tokenizer) if config.evaluation.prompts else None
    dataset = config.eval_dataset
    plan = held_out_plan(
        held_out.store,
        config.eval_batch_size,
        tokenizer,
        seq_length,
        runtime,
        packing=dataset.packing and not any(keys.compares_rows for keys in config.objectives),
        length_buckets=dataset.length_buckets,
        lead=model.leading_ids,
        unit=held_out.unit,
    )
    return evaluator_of(config.objectives, model, plan, held_out, runtime, references=references, sample=samples)


def evaluator_of(
    terms: Sequence[ObjectiveKeys],
    model: CausalLM,
    plan: DataPlan,
    rows: PreparedRows,
    runtime: Runtime,
    *,
    references: NDArray[np.float64] | None,
    sample: "SampleAnswers | None" = None,
) -> Evaluator:
    """The evaluator of ``plan``, one pass over ``rows``: of answers, or, where ``terms`` say so, of preferences.

    references: ``reference_log_probs`` of ``rows``.
    """
    compared = preference_term(terms, rows, plan.usual_lines, references)
    if compared is None:
        return Evaluator(model, plan, model.config.vocab_size, runtime, sample)
    plan = replace(plan, terms=[compared.rows])
    return PreferenceEvaluator(model, plan, model.config.vocab_size, runtime, sample, comparison=compared.cell)


class SampleAnswers:
    """Greedy answers of ``model`` to ``evaluation.prompts``, in one batch; graphs are compiled once."""

    def __init__(self, config: RunConfig, model: CausalLM, tokenizer):
        if tokenizer is None:
            raise LoraMsError("evaluation.prompts need a tokenizer, and load_checkpoint has none: take the prompts out")
        self.prompts = config.evaluation.prompts
        self.speaker = Speaker(
            Generator(model),
            tokenizer,
            Sampling(),
            max_new_tokens=config.evaluation.max_new_tokens,
            max_length=model.config.longest,
        )
        self.tokens = [encode_prompt(tokenizer, [Message("user", prompt)]) for prompt in self.prompts]
        check_prompts(self.tokens, model.config.vocab_size)
        for number, tokens in enumerate(self.tokens, 1):
            self.speaker.limit(tokens, number, len(self.tokens))  # now, rather than in the middle of the run

    def __call__(self) -> list[dict[str, str]]:
        answers = self.speaker.continued(self.tokens)
        return [{"prompt": p, "answer": a} for p, a in zip(self.prompts, answers, strict=True)]


def read_questions(file: str, tokenizer, preparation: Preparation, name: str) -> list[Question]:
    """The questions of a file of rows with answers; ``name``: of the setting, for errors.

    Raises:
        LoraMsError: a row that is none.
    """
    try:
        return [question_of(tokenizer, row) for row in read([file], preparation, Tally())]
    except LoraMsError as error:
        raise LoraMsError(f"{name} {file}: {str(error).removeprefix(f'{file}: ')}") from None


class Quiz:
    """The questions of ``evaluation.prompts_file``, and the scores of a model's answers to them."""

    def __init__(self, config: RunConfig):
        file = config.evaluation.prompts_file
        tokenizer = tokenizer_for(config)
        if tokenizer is None:
            raise LoraMsError("prompts_file needs a tokenizer: load_checkpoint must be a Hugging Face folder with one")
        dataset = config.eval_dataset
        preparation = Preparation(
            seq_length=NO_LIMIT,
            format=dataset.format,
            columns=dataset.columns,
            fill=config.data_fill,
            keep_placeholders=not dataset.fill,
            split=dataset.data_loader.split,
            num_samples=dataset.num_samples,
        )
        self.questions = read_questions(file, tokenizer, preparation, "prompts_file")
        self.batch_size = config.eval_batch_size
        self.path = Path(config.output_dir) / PREDICTIONS

    def ask(self, speaker: Speaker) -> list[str]:
        """The model's answers, in batches of one size: questions of similar length together, the last batch padded.

        Raises:
            LoraMsError: a question leaves no room for an answer.
        """
        by_length = sorted(range(len(self.questions)), key=lambda i: len(self.questions[i].tokens))
        longest = self.questions[by_length[-1]]
        if len(longest.tokens) >= speaker.max_length:
            found = f"{len(longest.tokens)} tokens, and the model takes {speaker.max_length}"
            raise LoraMsError(f"{longest.where}: the question has {found} with the answer: shorten it")
        answers: dict[int, str] = {}
        size = min(self.batch_size, len(by_length))
        for start in range(0, len(by_length), size):
            taken = by_length[start : start + size]
            prompts = [self.questions[i].tokens for i in taken]
            filling = [prompts[-1]] * (size - len(taken))
            answers |= zip(taken, speaker.continued([*prompts, *filling])[: len(taken)], strict=True)
        return [answers[i] for i in range(len(self.questions))]

    def run(self, speaker: Speaker, is_main: bool) -> None:
        """Asks; on the main rank also writes ``predictions.jsonl`` and prints the scores."""
        if not is_main:
            self.ask(speaker)
            return
        answers = self.ask(speaker)
        matches = [is_match(answer, q.reference) for q, answer in zip(self.questions, answers, strict=True)]
        score = chrf(answers, [q.reference for q in self.questions])
        exact = f"exact match {sum(matches) / len(matches):.1%} ({sum(matches):,} of {len(matches):,})"
        print(exact if score is None else f"{exact}  chrF {score:.1f}")
        if score is None:
            print("chrF is left out: it needs sacrebleu (pip install sacrebleu)")
        with saving.new_file(self.path) as part, open(part, "w", encoding="utf-8") as file:
            for q, answer, match in zip(self.questions, answers, matches, strict=True):
                line = {"row": q.where, "prompt": q.prompt, "answer": answer, "reference": q.reference}
                file.write(json.dumps({**line, "exact_match": match}, ensure_ascii=False) + "\n")
        print(f"answers: {self.path}")


def has_label_tokens(config: RunConfig) -> bool:
    """Whether ``lora-ms eval`` has rows whose labels it scores: always, unless only a ``prompts_file``,
    ``sets`` or ``tasks`` are given."""
    others = config.evaluation.prompts_file or config.evaluation.sets or config.evaluation.tasks
    return bool(config.eval_dataset.sources) or not others
