"""``lora-ms preprocess``: the rows of a dataset as MindRecord files of tokens; with ``--report`` only a report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_ms import saving, storage
from lora_ms.config import RunConfig
from lora_ms.data.loader import DataPlan
from lora_ms.data.mindrecord import WRITTEN_SET, write_mindrecord
from lora_ms.data.pipeline import prepare
from lora_ms.data.store import TokenStore
from lora_ms.data.tokenizer import pad_id
from lora_ms.errors import LoraMsError, WriteError
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

    The files are written in a folder of their own first, and take their places together. A run that was killed goes on
    from its last finished file, and nothing is done where files, settings and tokenizer are the same.

    report: print the report, and write no rows. layout: "rows", or "mindformers" for rows of seq_length + 1 tokens.
    """
    output_dir = Path(config.output_dir)
    check_output(output_dir)
    if config.preferences != "none":
        raise LoraMsError(
            "preprocess writes rows of one answer: rows of preferences are made tokens as a run starts, and kept then"
        )
    if config.train_dataset.mix:
        raise LoraMsError(
            "preprocess writes the rows of one dataset, and train_dataset.mix has weights: preprocess each of its "
            "parts, and mix the files that it writes"
        )
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
    """Writes the files of ``store``, unless they are there; returns their number.

    Raises WriteError where they cannot be written: what was in ``output_dir`` is as it was.
    """
    content = {"content": store.key, "rows": len(store), "width": width}
    files = -(-len(store) // ROWS_PER_FILE)
    part = saving.set_of(output_dir, WRITTEN_SET)
    done: dict[str, str] = {}
    try:
        saving.finish_set(output_dir, WRITTEN_SET)
        if state_of(output_dir, content) and saving.is_intact(output_dir, WRITTEN_SET):
            saving.delete(part)  # what is left of another run
            return files
        done = finished(part, content)
        if not done:
            saving.delete(part)
            part.mkdir()
            storage.write_json(part / STATE, {**content, "done": done})
        for number in range(len(done) // 2, files):
            name = f"train-{number:05}.mindrecord"
            for left in part.glob(f"{name}*"):  # of a process that was killed
                saving.delete(left)
            rows = range(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, len(store)))
            write_mindrecord(part / name, (store[i] for i in rows), width, pad)
            store.release()
            done |= {file: saving.digest_of(part / file, sync=True) for file in (name, f"{name}.db")}
            storage.write_json(part / STATE, {**content, "done": done})
        saving.place_set(output_dir, WRITTEN_SET, [*done, STATE])
    except (OSError, WriteError) as error:
        why = f"cannot write {error.filename or part}: {error.strerror}" if isinstance(error, OSError) else str(error)
        kept = "; the same command goes on from the last file that is finished" if done else ""
        raise WriteError(f"{why}{kept}") from None
    return files


def state_of(folder: Path, content: dict[str, object]) -> dict[str, Any]:
    """The state of the files of this content in ``folder``; empty where it holds none."""
    try:
        state = storage.read_json(folder / STATE)
    except LoraMsError:
        return {}
    return state if {key: state.get(key) for key in content} == content else {}


def finished(part: Path, content: dict[str, object]) -> dict[str, str]:
    """The first files of this content in ``part``, with their indexes, that an earlier process has finished, and their
    digests; empty where one of them has changed."""
    done = state_of(part, content).get("done", {})
    try:
        whole = not part.is_symlink() and all(saving.digest_of(part / name) == done[name] for name in done)
    except (OSError, TypeError):
        return {}
    return done if whole else {}
