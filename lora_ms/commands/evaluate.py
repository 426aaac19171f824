"""Held-out rows: ``lora-ms eval``, and the evaluations of a run."""

import json
from pathlib import Path

from lora_ms import storage
from lora_ms.commands import predict
from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.data.loader import DataPlan
from lora_ms.data.pipeline import Preparation, read
from lora_ms.data.report import Tally
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.infer.chat import Speaker
from lora_ms.infer.generate import Generator
from lora_ms.infer.questions import chrf, is_match, question_of
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import CausalLM
from lora_ms.recipes import data, parallel
from lora_ms.recipes import session as common
from lora_ms.recipes.train import held_out_plan
from lora_ms.runtime.device import Runtime
from lora_ms.train.evaluation import Evaluator

PREDICTIONS = "predictions.jsonl"


def plan_of(config: RunConfig, store: TokenStore, tokenizer, limit: int, runtime: Runtime) -> DataPlan:
    """One pass over the rows, without shuffling."""
    how = config.eval_dataset
    return held_out_plan(store, config.eval_batch_size, tokenizer, limit, runtime, how.packing, how.length_buckets)


class Samples:
    """Greedy answers of ``model`` to ``evaluation.prompts``, in one batch; graphs are compiled once."""

    def __init__(self, config: RunConfig, model: CausalLM, tokenizer):
        if tokenizer is None:
            raise LoraMsError("evaluation.prompts need a tokenizer, and load_checkpoint has none: take the prompts out")
        self.prompts = config.evaluation.prompts
        limit = model.config.max_position_embeddings
        self.speaker = Speaker(Generator(model), tokenizer, Sampling(), config.evaluation.max_new_tokens, limit)

    def __call__(self) -> list[dict[str, str]]:
        answers = self.speaker.answers([[Message("user", prompt)] for prompt in self.prompts])
        return [{"prompt": p, "answer": a} for p, a in zip(self.prompts, answers, strict=True)]


def evaluator_for(
    config: RunConfig, model: CausalLM, held_out: TokenStore, tokenizer, limit: int, runtime: Runtime
) -> Evaluator:
    """What a run evaluates with; ``limit``: tokens of the longest row."""
    samples = Samples(config, model, tokenizer) if config.evaluation.prompts else None
    plan = plan_of(config, held_out, tokenizer, limit, runtime)
    return Evaluator(model, plan, model.config.vocab_size, runtime, samples)


class Quiz:
    """The questions of ``evaluation.prompts_file``, put to a model."""

    def __init__(self, config: RunConfig):
        file, tokenizer = config.evaluation.prompts_file, data.tokenizer_for(config)
        if tokenizer is None:
            raise LoraMsError("prompts_file needs a tokenizer: load_checkpoint must be a Hugging Face folder with one")
        dataset = config.eval_dataset
        preparation = Preparation(
            seq_length=data.NO_LIMIT,
            format=dataset.format,
            columns=dataset.columns,
            fill=config.data_fill,
            num_samples=dataset.num_samples,
        )
        rows = read([file], preparation, Tally())
        try:
            self.questions = [question_of(tokenizer, row) for row in rows]
        except LoraMsError as error:
            raise LoraMsError(f"prompts_file {file}: {str(error).removeprefix(f'{file}: ')}") from None
        self.batch, self.path = config.eval_batch_size, Path(config.output_dir) / PREDICTIONS

    def ask(self, speaker: Speaker) -> list[str]:
        """The model's answers, in batches of one size: questions of like length together, the last batch filled up.

        Raises:
            LoraMsError: a question leaves no room for an answer.
        """
        by_length = sorted(range(len(self.questions)), key=lambda i: len(self.questions[i].tokens))
        longest = self.questions[by_length[-1]]
        if len(longest.tokens) >= speaker.max_length:
            found = f"{len(longest.tokens)} tokens, and the model takes {speaker.max_length}"
            raise LoraMsError(f"{longest.where}: the question has {found} with the answer: shorten it")
        answers: dict[int, str] = {}
        size = min(self.batch, len(by_length))
        for start in range(0, len(by_length), size):
            taken = by_length[start : start + size]
            prompts = [self.questions[i].tokens for i in taken]
            spare = [prompts[-1]] * (size - len(taken))
            answers |= zip(taken, speaker.continued([*prompts, *spare])[: len(taken)], strict=True)
        return [answers[i] for i in range(len(self.questions))]

    def run(self, speaker: Speaker, is_main: bool) -> None:
        """Asks, writes ``predictions.jsonl`` and prints the scores, on the main rank."""
        if not is_main:
            self.ask(speaker)
            return
        with storage.whole(self.path) as part, open(part, "w", encoding="utf-8") as file:
            answers = self.ask(speaker)
            matches = [is_match(answer, q.reference) for q, answer in zip(self.questions, answers, strict=True)]
            for q, answer, match in zip(self.questions, answers, matches, strict=True):
                line = {"row": q.where, "prompt": q.prompt, "answer": answer, "reference": q.reference}
                file.write(json.dumps({**line, "exact_match": match}, ensure_ascii=False) + "\n")
        score = chrf(answers, [q.reference for q in self.questions])
        share = f"exact match {sum(matches) / len(matches):.1%} ({sum(matches):,} of {len(matches):,})"
        print(share if score is None else f"{share}  chrF {score:.1f}")
        if score is None:
            print("chrF is left out: it needs sacrebleu (pip install sacrebleu)")
        print(f"answers: {self.path}")


def scored(config: RunConfig) -> bool:
    """Whether ``lora-ms eval`` has label tokens to score: always, but where there are only prompts."""
    return bool(config.eval_dataset.sources) or not config.evaluation.prompts_file


def run(config: RunConfig) -> None:
    """Prints the scores of ``eval_dataset``'s label tokens, and of the answers to ``evaluation.prompts_file``."""
    sources = data.sources_of(config.eval_dataset, "eval") if scored(config) else []
    if config.evaluation.prompts_file:
        parallel.check_alone(config, "evaluation.prompts_file")
        common.check_output(Path(config.output_dir))
    quiz = Quiz(config) if config.evaluation.prompts_file else None
    sizes = common.read_sizes(config)
    parallel.check(config, sizes)
    if sources:
        tokenizer = data.tokenizer_for(config)
        how = data.preparation(config, config.eval_dataset, sizes.max_position_embeddings, sizes.vocab_size)
        store, reports, _ = data.rows_of(config.eval_dataset, sources, tokenizer, how)
    runtime = common.start(config)
    model = common.model_for_use(config, runtime)
    if sources:
        plan = plan_of(config, store, tokenizer, how.seq_length, runtime)
        scores = Evaluator(model, plan, sizes.vocab_size, runtime).scores()
        if runtime.is_main:
            print(*(text for report in reports for text in report.lines()), sep="\n")
            print(scores.line())
    if quiz is not None:
        speaker = predict.speaker_for(config, model)
        speaker.sampling = Sampling()  # the likeliest token always
        quiz.run(speaker, runtime.is_main)
