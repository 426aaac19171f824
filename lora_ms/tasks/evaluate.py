"""``lora-ms eval``: loss and perplexity on the label tokens of a file of rows."""

import math

from lora_ms.config import RunConfig
from lora_ms.data.loader import DataPlan
from lora_ms.data.store import TokenStore
from lora_ms.data.tokenizer import pad_id
from lora_ms.tasks import common, data
from lora_ms.train.fit import mean_loss


def plan_of(config: RunConfig, store: TokenStore, tokenizer, limit: int) -> DataPlan:
    """One pass over the rows, without shuffling."""
    return DataPlan.build(
        store,
        batch_size=config.eval_batch_size,
        accumulation=1,
        epochs=1,
        seed=0,
        shuffle=False,
        pad_id=pad_id(tokenizer),
        seq_length=limit,
        kind="packed" if config.eval_dataset.packing else "bucketed",
        buckets=config.eval_dataset.length_buckets,
    )


def line(mean: float, tokens: int) -> str:
    """The result, for people."""
    return f"loss {mean:.4f}  perplexity {math.exp(min(mean, 700)):.3f}  on {tokens:,} label tokens"


def run(config: RunConfig) -> None:
    """Prints the mean loss over all label tokens of ``eval_dataset``, in nats, and its exponential."""
    sources = data.sources_of(config.eval_dataset, "eval")
    sizes = common.read_sizes(config)
    tokenizer = data.tokenizer_for(config)
    how = data.preparation(config, config.eval_dataset, sizes.max_position_embeddings, sizes.vocab_size)
    store, reports, _ = data.rows_of(config.eval_dataset, sources, tokenizer, how)
    runtime = common.start(config)
    plan = plan_of(config, store, tokenizer, how.seq_length)
    result = mean_loss(common.model_for_use(config, runtime), plan, sizes.vocab_size)
    if runtime.is_main:
        print(*(text for report in reports for text in report.lines()), sep="\n")
        print(line(*result))
