"""Tokenised rows on disk, under a name that comes from the content: what was tokenised once is not again.

A build that is killed goes on where it was: its state is written every few thousand rows.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ms import storage
from lora_ms.data.pipeline import Preparation, check_vocabulary, finish, prepare_rows, read, tokenise
from lora_ms.data.readers import find_files
from lora_ms.data.report import Report, Tally
from lora_ms.data.store import StoreWriter, TokenStore
from lora_ms.data.templates import template_of
from lora_ms.runtime import host as machine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # raised when the same rows would become other tokens
SAVE_EVERY = 20_000  # rows
SMALL = 64 << 20  # bytes of files that are tokenised in memory, without a cache
STATE, REPORT = "state.json", "report.json"


def prepare(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    how: Preparation,
    *,
    always: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[TokenStore, Report]:
    """The rows of `sources` as tokens: from the cache, or into it where the files are large or `always` is set.

    say: told of progress.
    """
    files = [file for source in sources for file in _all_files(source, how.split)]
    if not always and sum(file.stat().st_size for file in files) < SMALL:
        tally = Tally()
        return prepare_rows(read(sources, how, tally), tokenizer, how, tally)
    vocab_size, how = how.vocab_size, replace(how, vocab_size=None)  # checked below: the tokens are the same for all
    folder = machine.cache_folder() / "tokens" / key_of(files, tokenizer, how)
    with _locked(folder):
        if not (folder / REPORT).is_file():
            _build(folder, sources, tokenizer, how, say)
    store = TokenStore.load(folder)
    if vocab_size is not None:
        check_vocabulary(store, vocab_size)
    return store, Report(**storage.read_json(folder / REPORT))


def key_of(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase | None, how: Preparation) -> str:
    """A name for the tokens: from the content of the files, the tokenizer with its template, and the settings."""
    total = blake2b(f"{VERSION} {json.dumps(asdict(how), sort_keys=True, default=dict)}".encode(), digest_size=16)
    if tokenizer is not None:
        total.update(json.dumps([template_of(tokenizer), str(tokenizer.eos_token), str(tokenizer.bos_token)]).encode())
        vocabulary = sorted(tokenizer.get_vocab().items())
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(vocabulary)
        total.update(backend.encode())
    for file in files:
        with open(file, "rb") as stream:
            total.update(f"{file.name} {file.stat().st_size} ".encode())
            while piece := stream.read(1 << 20):
                total.update(piece)
    return total.hexdigest()


def _all_files(source: str, split: str) -> list[Path]:
    found = find_files(source, split)
    return [file for path in found for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]


@contextmanager
def _locked(folder: Path):
    """Holds the folder: another process, such as another card's, waits and then finds the work done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    folder: Path,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    how: Preparation,
    say: Callable[[str], None],
) -> None:
    state = storage.read_json(folder / STATE) if (folder / STATE).is_file() else {}
    written = state.get("written", {})
    tally, taken = Tally.of(state["tally"]) if state else Tally(), state.get("taken", 0)
    tally.skipped.clear()  # the rows before are read again, though not tokenised
    rows = read(sources, how, tally)
    if taken:
        say(f"going on after {taken:,} rows that were tokenised before")
        next(islice(rows, taken - 1, None), None)
    saved = 0
    with closing(StoreWriter(folder, **written)) as writer:
        for more, chunk in tokenise(rows, tokenizer, how, tally):
            for row in chunk:
                writer.add(row)
            if more - saved >= SAVE_EVERY:
                saved = more
                position = {"written": writer.flush(), "taken": taken + more, "tally": tally.state()}
                storage.write_json(folder / STATE, position)
                say(f"{taken + more:,} rows tokenised")
    store = TokenStore.load(folder)
    storage.write_json(folder / REPORT, finish(store, how, tally).as_json())
    (folder / STATE).unlink(missing_ok=True)
