"""``lora-ms preprocess``: the rows of a dataset, tokenised, as MindRecord files; with ``--report`` only a look."""

from pathlib import Path

from lora_ms import storage
from lora_ms.config import RunConfig
from lora_ms.data.cache import prepare
from lora_ms.data.mindrecord import write_mindrecord
from lora_ms.data.store import TokenStore
from lora_ms.data.tokenizer import pad_id
from lora_ms.tasks import data
from lora_ms.tasks.finetune import check_output
from lora_ms.train.fit import DATA_REPORT

ROWS_PER_FILE = 100_000
STATE = "preprocess.json"


def run(config: RunConfig, report_only: bool, layout: str) -> None:
    """Writes ``output_dir/train-00000.mindrecord`` and so on, and ``data_report.json``.

    What a killed start has done is not done again; nor is anything where files, settings and tokenizer are the same.
    """
    output_dir = Path(config.output_dir)
    check_output(output_dir)
    sources = data.sources_of(config.train_dataset, "train")
    tokenizer = data.tokenizer_for(config, training=True)
    how = data.preparation(config, config.train_dataset, 1 << 30, None)
    store, report = prepare(sources, tokenizer, how, always=True)
    print(*report.table(), sep="\n")
    storage.write_json(output_dir / DATA_REPORT, [report.as_json()])
    if report_only:
        return
    width = how.seq_length + 1 if layout == "mindformers" else None
    written = write(store, output_dir, width, pad_id(tokenizer))
    print(f"{len(store):,} rows in {written} MindRecord files: {output_dir}")


def write(store: TokenStore, output_dir: Path, width: int | None, pad: int) -> int:
    """Writes the files that are not there yet; returns how many there are in all."""
    wanted = {"tokens_crc32": store.checksum(), "rows": len(store), "width": width}
    state = storage.read_json(output_dir / STATE) if (output_dir / STATE).is_file() else {}
    done = state.get("done", 0) if {key: state.get(key) for key in wanted} == wanted else 0
    files = -(-len(store) // ROWS_PER_FILE)
    for number in range(done, files):
        rows = range(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, len(store)))
        write_mindrecord(output_dir / f"train-{number:05}.mindrecord", (store[i] for i in rows), width, pad)
        store.release()
        storage.write_json(output_dir / STATE, {**wanted, "done": number + 1})
    return files
