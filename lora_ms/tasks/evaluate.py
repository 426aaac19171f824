"""Held-out rows: ``lora-ms eval``, and the evaluations of a run."""

from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.data.loader import DataPlan
from lora_ms.data.store import TokenStore
from lora_ms.data.tokenizer import pad_id
from lora_ms.errors import LoraMsError
from lora_ms.infer.chat import Speaker
from lora_ms.infer.generate import Generator
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import CausalLM
from lora_ms.runtime import Runtime
from lora_ms.tasks import common, data
from lora_ms.train.evaluation import Evaluator


def plan_of(config: RunConfig, store: TokenStore, tokenizer, limit: int, runtime: Runtime) -> DataPlan:
    """One pass over the rows, without shuffling."""
    return DataPlan.build(
        store,
        batch_size=config.eval_batch_size,
        accumulation=1,
        epochs=1,
        seed=0,
        shuffle=False,
        rank=runtime.rank,
        world=runtime.world,
        pad_id=pad_id(tokenizer),
        seq_length=limit,
        kind="packed" if config.eval_dataset.packing else "bucketed",
        buckets=config.eval_dataset.length_buckets,
    )


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
    return Evaluator(model, plan, model.config.vocab_size, samples)


def run(config: RunConfig) -> None:
    """Prints the scores of ``eval_dataset``'s label tokens."""
    if config.backend == "mindformers":
        from lora_ms.tasks import bridge

        return bridge.evaluate_model(config)
    sources = data.sources_of(config.eval_dataset, "eval")
    sizes = common.read_sizes(config)
    tokenizer = data.tokenizer_for(config)
    how = data.preparation(config, config.eval_dataset, sizes.max_position_embeddings, sizes.vocab_size)
    store, reports, _ = data.rows_of(config.eval_dataset, sources, tokenizer, how)
    runtime = common.start(config)
    plan = plan_of(config, store, tokenizer, how.seq_length, runtime)
    scores = Evaluator(common.model_for_use(config, runtime), plan, sizes.vocab_size).scores()
    if runtime.is_main:
        print(*(text for report in reports for text in report.lines()), sep="\n")
        print(scores.line())
