"""``lora-ms preprocess``: the rows of a dataset, tokenised, as MindRecord files; with ``--report`` only a look."""

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
from lora_ms.recipes import session as common
from lora_ms.recipes.train import DATA_REPORT

ROWS_PER_FILE = 100_000
SAMPLED_ROWS = 4096
STATE = "preprocess.json"


def run(config: RunConfig, report_only: bool, layout: str) -> None:
    """Writes ``output_dir/train-00000.mindrecord`` and so on, and ``data_report.json``.

    What a killed start has done is not done again; nor is anything where files, settings and tokenizer are the same.
    """
    output_dir = Path(config.output_dir)
    common.check_output(output_dir)
    sources = data.sources_of(config.train_dataset, "train")
    tokenizer = data.tokenizer_for(config, training=True)
    longest = common.read_sizes(config).max_position_embeddings if config.load_checkpoint else data.NO_LIMIT
    preparation = data.preparation(config, config.train_dataset, longest, None)
    store, report = prepare(sources, tokenizer, preparation, always_cache=True)
    report = replace(report, padding=padding(config, store, preparation.seq_length))
    print(*report.table(), sep="\n")
    storage.write_json(output_dir / DATA_REPORT, [report.as_json()])
    if report_only:
        return
    width = preparation.seq_length + 1 if layout == "mindformers" else None
    written = write(store, output_dir, width, pad_id(tokenizer))
    print(f"{len(store):,} rows in {written} MindRecord files: {output_dir}")


def padding(config: RunConfig, store: TokenStore, seq_length: int) -> dict[str, float]:
    """What share of the computed tokens training would fill up, from a sample of the rows."""
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
    """Writes the files that are not there yet; returns how many there are in all."""
    wanted = {"content": store.key, "rows": len(store), "width": width}
    state = storage.read_json(output_dir / STATE) if (output_dir / STATE).is_file() else {}
    done = state.get("done", 0) if {key: state.get(key) for key in wanted} == wanted else 0
    files = -(-len(store) // ROWS_PER_FILE)
    for number in range(done, files):
        rows = range(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, len(store)))
        write_mindrecord(output_dir / f"train-{number:05}.mindrecord", (store[i] for i in rows), width, pad)
        store.release()
        storage.write_json(output_dir / STATE, {**wanted, "done": number + 1})
    return files
