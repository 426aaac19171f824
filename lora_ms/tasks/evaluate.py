"""``lora-ms eval``: loss and perplexity on the label tokens of a file of rows."""

import math

from mindspore import Tensor

from lora_ms.config import RunConfig
from lora_ms.data.loader import DataPlan, prepare_rows
from lora_ms.data.tokenizer import pad_id
from lora_ms.tasks import common
from lora_ms.train.step import SummedLoss


def run(config: RunConfig) -> None:
    """Prints the mean loss over all label tokens of ``eval_dataset``, in nats, and its exponential."""
    sources = common.data_sources(config.eval_dataset, "eval")
    sizes = common.read_sizes(config)
    rows = common.rows_of(sources, config, config.eval_dataset)
    runtime = common.start(config)
    tokenizer = common.tokenizer_for(config)
    limit = common.seq_length(config, sizes.max_position_embeddings)
    kept, report = prepare_rows(rows, tokenizer=tokenizer, seq_length=limit, vocab_size=sizes.vocab_size)
    plan = DataPlan.build(
        kept,
        batch_size=config.eval_batch_size,
        accumulation=1,
        epochs=1,
        seed=0,
        shuffle=False,
        pad_id=pad_id(tokenizer),
        seq_length=limit,
        kind="packed" if config.eval_dataset.packing else "bucketed",
    )
    model = common.model_for_use(config, runtime)
    loss = SummedLoss(model, sizes.vocab_size).set_train(False)
    total = tokens = 0.0
    for step in range(plan.total_steps):
        batches, label_tokens = plan.step(step)
        total += sum(float(loss(*map(Tensor, batch[:4])).asnumpy()) for batch in batches)
        tokens += label_tokens
    if runtime.is_main:
        print(*report.lines(), sep="\n")
        mean = total / tokens
        print(f"loss {mean:.4f}  perplexity {math.exp(min(mean, 700)):.3f}  on {int(tokens):,} label tokens")
