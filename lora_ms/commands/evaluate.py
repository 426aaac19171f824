"""``lora-ms eval``: the loss of held-out rows, and the answers to a file of questions."""

from pathlib import Path

from lora_ms.config import RunConfig
from lora_ms.infer.sampling import Sampling
from lora_ms.recipes import data, session
from lora_ms.recipes.adapter import check_parallel
from lora_ms.recipes.evaluate import Quiz, has_label_tokens, plan_of
from lora_ms.recipes.forgetting import read_sets, scorer_of
from lora_ms.recipes.generate import model_for_use, speaker_for
from lora_ms.recipes.model import read_sizes
from lora_ms.recipes.tasks import Tasks
from lora_ms.train.evaluation import Evaluator


def run(config: RunConfig) -> None:
    """Prints the scores of ``eval_dataset``'s label tokens, of ``evaluation.sets`` and ``evaluation.tasks``, and of the
    answers to ``evaluation.prompts_file``."""
    if config.backend == "mindformers":
        from lora_ms.recipes import mindformers  # makes a temporary folder when it is imported

        mindformers.evaluate(config)
    else:
        evaluate(config)


def evaluate(config: RunConfig) -> None:
    """The scores of our own model."""
    dataset = config.eval_dataset
    sources = data.sources_of(dataset, "eval") if has_label_tokens(config) else []
    for key in ("prompts_file", "tasks"):
        if getattr(config.evaluation, key):
            session.check_alone(config, f"evaluation.{key}")
            session.check_output(Path(config.output_dir))
    quiz = Quiz(config) if config.evaluation.prompts_file else None
    tasks = Tasks(config) if config.evaluation.tasks else None
    sizes = read_sizes(config)
    check_parallel(config, sizes)
    tokenizer = data.tokenizer_for(config)
    preparation = data.preparation_of(config, dataset, sizes.max_position_embeddings, sizes.vocab_size)
    sets = read_sets(config, tokenizer, preparation)
    if sources:
        rows = data.rows_of(dataset, sources, tokenizer, preparation)
    runtime = session.start(config)
    model = model_for_use(config, runtime)
    if sources:
        plan = plan_of(config, rows.store, tokenizer, preparation.seq_length, runtime, model.leading_ids)
        scores = Evaluator(model, plan, sizes.vocab_size, runtime).scores()
        if runtime.is_main:
            print(*(line for report in rows.reports for line in report.lines()), sep="\n")
            print(scores.line())
    if sets:
        scorer = scorer_of(config, model, sets, tokenizer, preparation.seq_length, runtime)
        found = scorer.scores()
        if runtime.is_main:
            print(*(line for one in sets.values() for line in one.lines), sep="\n")
            for name, one in found.items():
                print(f"{name}: loss {one['loss']:.4f}  accuracy {one['accuracy']:.1%}  ({sets[name].metric})")
    if quiz is not None:
        quiz.run(speaker_for(config, model, Sampling()), runtime.is_main)  # Sampling(): always the most likely token
    if tasks is not None and runtime.is_main:
        tasks.run(speaker_for(config, model, Sampling()))
