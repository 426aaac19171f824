"""MindRecord files of ``lora-ms preprocess`` take their places together, and a run that was killed goes on."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from mindspore.dataset import MindDataset

from lora_ms import saving
from lora_ms.bridge.settings import dataset
from lora_ms.commands import preprocess
from lora_ms.config import load_config
from lora_ms.data import mindrecord
from lora_ms.data.example import TokenRow
from lora_ms.data.mindrecord import WRITTEN_SET
from lora_ms.data.pipeline import read_rows
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.recipes.mindformers_network import MindRecordRows, rows_of
from lora_ms.recipes.model import read_sizes

FILES = [f"train-0000{number}.mindrecord{end}" for number in range(3) for end in ("", ".db")]


@pytest.fixture(autouse=True)
def two_rows_per_file(monkeypatch):
    monkeypatch.setattr(preprocess, "ROWS_PER_FILE", 2)


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names of the files that are written."""
    names = []

    def write(path, rows, width, pad):
        names.append(path.name)
        mindrecord.write_mindrecord(path, rows, width, pad)

    monkeypatch.setattr(preprocess, "write_mindrecord", write)
    return names


@pytest.fixture
def killed_at(monkeypatch):
    """``killed_at(name)``: a process that writes this file ends in the middle of it."""

    def set_up(name):
        def write(path, rows, width, pad):
            if path.name == name:
                path.write_text("half")
                path.with_name(f"{name}.db-journal").write_text("half")
                raise SystemExit(137)
            mindrecord.write_mindrecord(path, rows, width, pad)

        monkeypatch.setattr(preprocess, "write_mindrecord", write)

    return set_up


def store(first: int, rows: int) -> TokenStore:
    made = TokenStore.of([TokenRow("row", ids, ids) for ids in np.arange(first, first + rows, dtype=np.int32)[:, None]])
    return TokenStore(made.columns, f"{first} to {first + rows}")


def write(folder: Path, first: int, rows: int, width: int | None = None) -> int:
    return preprocess.write(store(first, rows), folder, width, 0)


def ids_in(folder: Path) -> list[int]:
    return [int(row.input_ids[0]) for row in read_rows(folder)]


def test_files_are_replaced_together(tmp_path):
    assert write(tmp_path, 10, 5) == 3
    (tmp_path / "notes.txt").write_text("precious")
    assert ids_in(tmp_path) == [10, 11, 12, 13, 14]
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, preprocess.STATE, WRITTEN_SET, "notes.txt"])
    assert write(tmp_path, 20, 3) == 2
    assert ids_in(tmp_path) == [20, 21, 22]
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES[:4], preprocess.STATE, WRITTEN_SET, "notes.txt"])


def test_what_is_there_is_not_written_again_unless_it_has_changed(tmp_path, written):
    write(tmp_path, 10, 3)
    assert written == [FILES[0], FILES[2]]
    assert write(tmp_path, 10, 3) == 2 and len(written) == 2
    with open(tmp_path / FILES[2], "r+b") as file:
        file.seek(100)
        file.write(b"\0")
    write(tmp_path, 10, 3)
    assert len(written) == 4 and ids_in(tmp_path) == [10, 11, 12]


def test_a_killed_run_leaves_the_old_and_goes_on(tmp_path, killed_at, request):
    write(tmp_path, 10, 3)
    killed_at(FILES[4])
    with pytest.raises(SystemExit):
        write(tmp_path, 20, 5)
    assert ids_in(tmp_path) == [10, 11, 12]
    written = request.getfixturevalue("written")
    assert write(tmp_path, 20, 5) == 3 and written == [FILES[4]]
    assert ids_in(tmp_path) == [20, 21, 22, 23, 24]
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, preprocess.STATE, WRITTEN_SET])


@pytest.mark.parametrize("what", ["other rows", "a damaged file", "a missing file", "a damaged state", "a link"])
def test_what_a_killed_run_has_finished_is_not_taken_blindly(tmp_path, killed_at, request, what):
    out = tmp_path / "out"
    out.mkdir()
    killed_at(FILES[2])
    with pytest.raises(SystemExit):
        write(out, 20, 3)
    part = saving.set_of(out, WRITTEN_SET)
    first = 20
    if what == "other rows":
        first = 30
    elif what == "a damaged file":
        (part / FILES[1]).write_bytes(b"damaged")
    elif what == "a missing file":
        (part / FILES[0]).unlink()
    elif what == "a damaged state":
        (part / preprocess.STATE).write_text('{"done": 3')
    else:
        part.rename(tmp_path / "elsewhere")
        part.symlink_to(tmp_path / "elsewhere")
    written = request.getfixturevalue("written")
    write(out, first, 3)
    assert written == [FILES[0], FILES[2]] and ids_in(out) == [first, first + 1, first + 2]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    write(tmp_path, 10, 3)

    def fail(path, rows, width, pad):
        if path.name == FILES[2]:
            raise WriteError(f"cannot write {path}: No space left on device")
        mindrecord.write_mindrecord(path, rows, width, pad)

    monkeypatch.setattr(preprocess, "write_mindrecord", fail)
    with pytest.raises(WriteError) as caught:
        write(tmp_path, 20, 3)
    assert str(caught.value) == (
        f"cannot write {saving.set_of(tmp_path, WRITTEN_SET) / FILES[2]}: No space left on device; the same command "
        "goes on from the last file that is finished"
    )
    assert ids_in(tmp_path) == [10, 11, 12]


def test_files_that_are_on_their_way_are_not_read(tmp_path, monkeypatch):
    write(tmp_path, 10, 3)
    real = os.replace

    def replace(source, target):
        if Path(target).name == FILES[3]:
            raise OSError(5, "Input/output error", str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(WriteError, match="Input/output error"):
            write(tmp_path, 20, 3)
    with pytest.raises(LoraMsError, match="preprocess ended before all files were in their place; run it once more"):
        ids_in(tmp_path)
    write(tmp_path, 20, 3)
    assert ids_in(tmp_path) == [20, 21, 22]


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path, 10, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in FILES[:2]} == {0o640}


@pytest.fixture
def rows_for_mindformers(reference, tmp_path):
    """``rows_for_mindformers(source)``: of five tokens, seq_length and one more."""

    def read(source) -> MindRecordRows:
        options = [f"train_dataset.data_loader.dataset_dir={source}", "model.model_config.seq_length=4"]
        config = load_config(None, options=[*options, f"load_checkpoint={reference / 'models' / 'qwen2'}"])
        return rows_of(config, "train", read_sizes(config), None, tmp_path / "mindformers")

    return read


@pytest.mark.parametrize("source", ["data", "data/*.mindrecord"])
def test_mindformers_reads_all_files_where_they_are(tmp_path, rows_for_mindformers, source):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", 10, 5, width=5)
    rows = rows_for_mindformers(tmp_path / source)
    assert rows.count == 5 and rows.files == [tmp_path / "data" / name for name in FILES[::2]]
    loader = dataset({}, list(map(str, rows.files)), train=True)["data_loader"]
    read = MindDataset(loader["dataset_files"], shuffle=False).create_dict_iterator(1, True)
    assert [row["input_ids"].tolist() for row in read] == [[first, 0, 0, 0, 0] for first in range(10, 15)]
    assert not (tmp_path / "mindformers").exists()


@pytest.mark.parametrize("source", [".", "*.mindrecord"])
def test_files_of_two_widths_are_written_once_more(tmp_path, rows_for_mindformers, source):
    ids = np.arange(1, 4, dtype=np.int32)
    for name, width in (("a", 5), ("b", 7)):
        mindrecord.write_mindrecord(tmp_path / f"{name}.mindrecord", [TokenRow("row", ids, ids)], width, 0)
    rows = rows_for_mindformers(tmp_path / source)
    assert rows == MindRecordRows([tmp_path / "mindformers" / "train.mindrecord"], 2)
    read = MindDataset(str(rows.files[0]), shuffle=False).create_dict_iterator(1, True)
    assert [row["input_ids"].tolist() for row in read] == [[1, 2, 3, 0, 0]] * 2


def test_rows_of_their_own_lengths_are_written_once_more(tmp_path, rows_for_mindformers):
    row = TokenRow("row", np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    for name in ("a", "b"):
        mindrecord.write_mindrecord(tmp_path / f"{name}.mindrecord", [row], None, 0)
    rows = rows_for_mindformers(tmp_path)
    assert rows == MindRecordRows([tmp_path / "mindformers" / "train.mindrecord"], 2)
