"""Tokens are kept by content: found again, built on after a kill, built anew when anything differs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lora_ms import saving
from lora_ms.data import cache, pipeline
from lora_ms.data.clean import CleaningRules
from lora_ms.data.mindrecord import write_mindrecord
from lora_ms.data.pipeline import Preparation, prepare, prepare_rows, read, read_rows
from lora_ms.data.report import Tally
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError

HOW = Preparation(seq_length=64, clean=CleaningRules(dedupe=True))


@pytest.fixture
def rows_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_MS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "d.jsonl"
    rows = [{"instruction": f"question {number % 900}", "output": "x" * (number % 60)} for number in range(1, 1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["output"]))
    return path


def same(found: TokenStore, wanted: TokenStore) -> None:
    for ours, theirs in zip(found.columns, wanted.columns, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_store_from_files_is_the_store_in_memory(rows_file, chatml):
    tally = Tally()
    wanted, wanted_report = prepare_rows(read([str(rows_file)], HOW, tally), chatml, HOW, tally)
    said: list[str] = []
    store, report = prepare([str(rows_file)], chatml, HOW, always_cache=True, say=said.append)
    same(store, wanted)
    assert report == wanted_report and report.skipped["duplicate"] == 98  # 901 to 999, but 960, which has no answer
    assert [len(row.input_ids) for row in store] == store.lengths.tolist()
    assert store.checksum() == wanted.checksum()


def test_a_second_start_reads_nothing(rows_file, chatml, monkeypatch):
    first, report = prepare([str(rows_file)], chatml, HOW, always_cache=True)
    monkeypatch.setattr(pipeline, "read", None)
    again, same_report = prepare([str(rows_file)], chatml, HOW, always_cache=True)
    same(again, first)
    assert same_report == report


def test_a_killed_build_goes_on(rows_file, chatml, monkeypatch):
    tally = Tally()
    wanted, wanted_report = prepare_rows(read([str(rows_file)], HOW, tally), chatml, HOW, tally)
    monkeypatch.setattr(pipeline, "SAVE_EVERY", 256)
    tokenise, calls = pipeline.tokenise, []

    def dies(*args):
        for number, chunk in enumerate(tokenise(*args)):
            if number == 3:
                raise KeyboardInterrupt
            calls.append(chunk)
            yield chunk

    monkeypatch.setattr(pipeline, "tokenise", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(rows_file)], chatml, HOW, always_cache=True, say=lambda line: None)
    monkeypatch.setattr(pipeline, "tokenise", tokenise)
    said: list[str] = []
    store, report = prepare([str(rows_file)], chatml, HOW, always_cache=True, say=said.append)
    assert said[0] == "going on after 768 rows that were tokenised before"
    same(store, wanted)
    assert report == wanted_report


def test_tokens_are_shared_by_models_and_checked_for_each(rows_file, chatml, monkeypatch):
    prepare([str(rows_file)], chatml, HOW, always_cache=True)
    monkeypatch.setattr(pipeline, "read", None)
    prepare([str(rows_file)], chatml, replace(HOW, vocab_size=264), always_cache=True)
    with pytest.raises(LoraMsError) as error:
        prepare([str(rows_file)], chatml, replace(HOW, vocab_size=263), always_cache=True)
    assert str(error.value).startswith("d.jsonl:1: token id 263 does not exist in a vocabulary of 263; ")


def test_anything_that_changes_tokens_changes_the_name(rows_file, chatml, plain):
    def key(tokenizer, preparation: Preparation) -> str:
        return cache.key_of([rows_file], tokenizer, asdict(preparation))

    first = key(chatml, HOW)
    assert first == key(chatml, Preparation(seq_length=64, clean=CleaningRules(dedupe=True)))
    others = {
        key(plain, HOW),
        key(chatml, Preparation(seq_length=65, clean=CleaningRules(dedupe=True))),
        key(chatml, Preparation(seq_length=64)),
    }
    rows_file.write_text(rows_file.read_text().replace("question 5", "question 6", 1))
    assert len({first, *others, key(chatml, HOW)}) == 5


@pytest.mark.parametrize("width", [None, 65])
def test_mindrecord_files_are_read_back(rows_file, chatml, tmp_path, width):
    store, _ = prepare([str(rows_file)], chatml, HOW)
    write_mindrecord(tmp_path / "out.mindrecord", list(store)[:100], width, 261)
    found = read_rows(tmp_path / "out.mindrecord")
    for ours, theirs in zip(found, store, strict=False):
        last = np.flatnonzero(theirs.labels != -100)[-1] + 1
        assert ours.labels[:last].tolist() == theirs.labels[:last].tolist()
        assert ours.input_ids[:last].tolist() == theirs.input_ids[:last].tolist()
    assert len(found) == 100


def test_mindformers_convention(rows_file, chatml, tmp_path):
    """Rows of seq_length + 1, labels unshifted, -100 where nothing is learnt."""
    import mindspore.dataset as ds

    store, _ = prepare([str(rows_file)], chatml, HOW)
    write_mindrecord(tmp_path / "mf.mindrecord", list(store)[:5], 65, 261)
    dataset = ds.MindDataset(str(tmp_path / "mf.mindrecord"), ["input_ids", "labels"], shuffle=False)
    for item, row in zip(dataset.create_dict_iterator(output_numpy=True), store, strict=False):
        assert item["input_ids"].shape == item["labels"].shape == (65,)
        length = len(row.input_ids)
        assert item["input_ids"].tolist() == row.input_ids.tolist() + [261] * (65 - length)
        assert item["labels"].tolist() == row.labels.tolist() + [-100] * (65 - length)


def kept_folder(tmp_path) -> Path:
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    return folder


@pytest.mark.parametrize("name", ["ids.bin", "labels.bin", "ends.bin", "names.bin", "report.json", saving.MARKER])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_tokens_are_made_anew(rows_file, chatml, tmp_path, name, damage):
    wanted, wanted_report = prepare([str(rows_file)], chatml, HOW, always_cache=True)
    wanted = TokenStore.of(list(wanted))
    file = kept_folder(tmp_path) / name
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    said: list[str] = []
    found, report = prepare([str(rows_file)], chatml, HOW, always_cache=True, say=said.append)
    same(found, wanted)
    assert report == wanted_report
    if (name, damage) != (saving.MARKER, "gone"):  # then it is a build that was not finished
        assert said == [f"the tokens kept in {kept_folder(tmp_path)} are damaged: tokenising the rows again"]
    assert saving.is_intact(kept_folder(tmp_path))


@pytest.mark.parametrize("name", ["ids.bin", "name_ends.bin", "state.json"])
def test_a_killed_build_that_was_damaged_begins_anew(rows_file, chatml, tmp_path, monkeypatch, name):
    tally = Tally()
    wanted, wanted_report = prepare_rows(read([str(rows_file)], HOW, tally), chatml, HOW, tally)
    monkeypatch.setattr(pipeline, "SAVE_EVERY", 256)
    tokenise = pipeline.tokenise

    def dies(*args):
        for number, chunk in enumerate(tokenise(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tokenise", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(rows_file)], chatml, HOW, always_cache=True, say=lambda line: None)
    file = kept_folder(tmp_path) / name
    data = bytearray(file.read_bytes())
    place = data.index(b'"taken": 512') + 9 if name == "state.json" else 8
    data[place] ^= 1
    file.write_bytes(data)
    said: list[str] = []
    store, report = prepare([str(rows_file)], chatml, HOW, always_cache=True, say=said.append)
    assert not said or not said[0].startswith("going on")
    same(store, wanted)
    assert report == wanted_report
