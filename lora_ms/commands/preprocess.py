"""``lora-ms preprocess``: the rows of a dataset as MindRecord files of tokens; with ``--report`` only a report."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.config import RunConfig
from lora_ms.data.loader import DataPlan
from lora_ms.data.mindrecord import write_mindrecord
from lora_ms.data.pipeline import prepare
from lora_ms.data.store import TokenStore
from lora_ms.data.tokenizer import pad_id
from lora_ms.recipes import data
from lora_ms.recipes.model import read_sizes
from lora_ms.recipes.outputs import DATA_REPORT
from lora_ms.recipes.session import check_output
from lora_ms.train.log import locked_output

ROWS_PER_FILE = 100_000
SAMPLED_ROWS = 4096  # from which padding is estimated
STATE = "preprocess.json"  # how far the files are written


def run(config: RunConfig, report: bool, layout: str) -> None:
    """Writes ``output_dir/train-00000.mindrecord`` and so on, and ``data_report.json``.

    A run that was killed is continued, and nothing is done where files, settings and tokenizer are the same.

    report: print the report, and write no rows. layout: "rows", or "mindformers" for rows of seq_length + 1 tokens.
    """
    output_dir = Path(config.output_dir)
    check_output(output_dir)
    sources = data.sources_of(config.train_dataset, "train")
    tokenizer = data.tokenizer_for(config, training=True)
    longest = data.NO_LIMIT
    vocab_size = None  # of a model that is not known
    if config.load_checkpoint:
        sizes = read_sizes(config)
        longest = sizes.max_position_embeddings
        vocab_size = sizes.vocab_size
    preparation = data.preparation_of(config, config.train_dataset, longest, vocab_size)
    store, found = prepare(sources, tokenizer, preparation, always_cache=True)
    found = replace(found, padding=padding(config, store, preparation.seq_length))
    print(*found.table(), sep="\n")
    with locked_output(output_dir):
        storage.write_json(output_dir / DATA_REPORT, [found.as_json()])
        if report:
            return
        width = preparation.seq_length + 1 if layout == "mindformers" else None
        written = write(store, output_dir, width, pad_id(tokenizer))
    print(f"{len(store):,} rows in {written} MindRecord files: {output_dir}")


def padding(config: RunConfig, store: TokenStore, seq_length: int) -> dict[str, float]:
    """The share of padding in the tokens that training would compute, from a sample of the rows."""
    sample = store.take(np.random.default_rng(0).permutation(len(store))[:SAMPLED_ROWS])
    plan = DataPlan.build(
        sample,
        batch_size=config.batch_size,
        accumulation=config.runner_config.gradient_accumulation_steps,
        epochs=1,
        seed=config.seed,
        pad_id=0,
        seq_length=seq_length,
        kind="packed" if config.train_dataset.packing else "bucketed",
        buckets=config.train_dataset.length_buckets,
    )
    return plan.padding()


def write(store: TokenStore, output_dir: Path, width: int | None, pad: int) -> int:
    """Writes the files that do not exist yet; returns the number of all."""
    content = {"content": store.key, "rows": len(store), "width": width}
    state = storage.read_json(output_dir / STATE) if (output_dir / STATE).is_file() else {}
    done = state.get("done") if {key: state.get(key) for key in content} == content else 0
    done = done if type(done) is int and done >= 0 else 0
    files = -(-len(store) // ROWS_PER_FILE)
    for number in range(done, files):
        rows = range(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, len(store)))
        write_mindrecord(output_dir / f"train-{number:05}.mindrecord", (store[i] for i in rows), width, pad)
        store.release()
        storage.write_json(output_dir / STATE, {**content, "done": number + 1})
    return files
