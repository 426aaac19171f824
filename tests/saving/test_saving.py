"""Files and folders are whole or not at all, hold their digests, and are removed by their writer alone."""

import os
import random
import re
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lora_ms import saving, storage
from lora_ms.errors import LoraMsError, WriteError


def fill(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text)


def make(folder: Path, **texts: str) -> Path:
    with saving.new_folder(folder) as part:
        fill(part, **texts)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in saving.files_of(folder) if name != saving.MARKER}


# --- files


def test_a_file_is_replaced_or_as_it_was(tmp_path):
    file = tmp_path / "new" / "a.json"
    storage.write_json(file, {"v": 1})
    with pytest.raises(ValueError), saving.new_file(file) as part:
        part.write_text("half")
        raise ValueError
    assert storage.read_json(file) == {"v": 1} and os.listdir(file.parent) == ["a.json"]


def test_a_planted_link_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    for name in (f"{saving.PART}a.json", "a.json"):
        (tmp_path / name).symlink_to(target)
    storage.write_json(tmp_path / "a.json", {})
    assert target.read_text() == "precious" and not (tmp_path / "a.json").is_symlink()
    (tmp_path / "log").symlink_to(target)
    with pytest.raises(OSError):
        saving.append(tmp_path / "log", "more")
    assert target.read_text() == "precious"


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(WriteError, match=r"^cannot write .*a\.json: "):
        storage.write_json(tmp_path / "a.json", {})


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        storage.write_tensors(tmp_path / "t.safetensors", {"a": np.zeros(3, np.float32)})
        make(tmp_path / "folder", a="1")
        saving.append(tmp_path / "log", "x")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path, *tmp_path.rglob("*")) if p != tmp_path}
    assert modes.pop("folder") == 0o777 & ~mask
    assert set(modes.values()) == {0o666 & ~mask}


def test_tensors_are_written_as_the_library_writes_them(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"层.{n}": rng.standard_normal((n, 3)).astype(np.float32) for n in (11, 2, 5, 0)}
    storage.write_tensors(tmp_path / "t.safetensors", tensors)
    assert (tmp_path / "t.safetensors").read_bytes() == save(tensors, {"format": "pt"})
    view = np.arange(12, dtype=np.float32).reshape(3, 4).T
    storage.write_tensors(tmp_path / "v.safetensors", {"v": view})
    (entry,) = storage.read_header(tmp_path / "v.safetensors").values()
    np.testing.assert_array_equal(storage.read(entry, np.float32), view)


def test_a_line_that_does_not_fit_leaves_none(tmp_path, monkeypatch):
    saving.append(tmp_path / "m", "one\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space"):
        saving.append(tmp_path / "m", "two and more\n")
    monkeypatch.undo()
    saving.append(tmp_path / "m", "three\n")
    assert (tmp_path / "m").read_text() == "one\nthree\n"


# --- folders


def test_a_folder_is_replaced_or_as_it_was(tmp_path):
    folder = make(tmp_path / "f", a="1", b="1")
    with pytest.raises(RuntimeError), saving.new_folder(folder) as part:
        fill(part, a="2")
        raise RuntimeError
    assert contents(folder) == {"a": "1", "b": "1"}
    make(folder, a="2", c="2")
    assert contents(folder) == {"a": "2", "c": "2"}  # what was ours is gone
    assert os.listdir(tmp_path) == ["f"]


def test_weights_that_we_wrote_are_never_lost(tmp_path):
    folder = make(tmp_path / "f", **{"model.safetensors": "1", "config.json": "1"})
    with pytest.raises(WriteError, match="it holds model.safetensors, which would be gone: give another folder"):
        make(folder, **{"adapter_model.safetensors": "2"})
    assert contents(folder) == {"model.safetensors": "1", "config.json": "1"} and os.listdir(tmp_path) == ["f"]
    with saving.new_folder(folder, beside=True) as part:
        fill(part, **{"model.gguf": "3"})
    assert contents(folder) == {"model.safetensors": "1", "config.json": "1", "model.gguf": "3"}
    assert saving.foreign(folder) == [] and saving.is_intact(folder)
    with pytest.raises(WriteError, match="model.gguf"), saving.new_folder(folder, replaced=storage.MODEL_FILES):
        pass
    with saving.new_folder(folder, own=True) as part:
        fill(part, **{"adapter_model.safetensors": "4"})
    assert contents(folder) == {"adapter_model.safetensors": "4"}


def test_sha256sum_takes_the_list(tmp_path):
    folder = make(tmp_path / "f", a="1", **{"with space": "2"})
    done = subprocess.run(["sha256sum", "-c", saving.MARKER], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "a: OK\nwith space: OK\n"


def test_files_of_others_stay(tmp_path):
    folder = make(tmp_path / "f", a="1")
    fill(folder, mine="m")
    (folder / "below").mkdir()
    (folder / "below" / "deep").write_text("d")
    (folder / "link").symlink_to("mine")
    assert saving.foreign(folder) == ["below/deep", "link", "mine"]
    make(folder, b="2")
    assert contents(folder) == {"b": "2", "mine": "m", "below/deep": "d", "link": "m"}
    assert (folder / "link").is_symlink() and saving.foreign(folder) == ["below/deep", "link", "mine"]
    saving.remove(folder)
    assert contents(folder) == {"mine": "m", "below/deep": "d", "link": "m"}
    (tmp_path / "old_model").mkdir()
    fill(tmp_path / "old_model", **{"model-00001-of-00002.safetensors": "x", "notes.txt": "n"})
    with saving.new_folder(tmp_path / "old_model", replaced=storage.MODEL_FILES) as part:
        fill(part, **{"model.safetensors": "y"})
    assert contents(tmp_path / "old_model") == {"model.safetensors": "y", "notes.txt": "n"}


def test_a_link_to_a_folder_is_written_through(tmp_path):
    there, link = tmp_path / "disk" / "out", tmp_path / "out"
    there.mkdir(parents=True)
    (there / "note.txt").write_text("mine")
    link.symlink_to(there)
    for text in ("a", "b"):
        with saving.new_folder(link) as part:
            assert part.parent == there.parent
            (part / "x").write_text(text)
    assert link.is_symlink() and (there / "x").read_text() == "b" and (there / "note.txt").read_text() == "mine"


def test_a_folder_of_ours_goes_whole(tmp_path):
    saving.remove(make(tmp_path / "f", a="1"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "x", "0" * 64 + "  ../precious\n", "0" * 64 + "  /etc/passwd\n", "\xff"])
def test_a_list_that_we_did_not_write_removes_nothing(tmp_path, text):
    (tmp_path / "precious").write_text("p")
    (tmp_path / "f").mkdir()
    fill(tmp_path / "f", mine="m")
    (tmp_path / "f" / saving.MARKER).write_bytes(text.encode("latin-1"))
    assert saving.foreign(tmp_path / "f") == ["mine"]
    try:
        saving.remove(tmp_path / "f")
    except LoraMsError as error:
        assert saving.MARKER in str(error)
    assert (tmp_path / "precious").exists() and (tmp_path / "f" / "mine").exists()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("aside", [True, False])
def test_what_a_killed_process_left(tmp_path, finished, aside):
    folder = make(tmp_path / "f", a="1")
    part, old = (tmp_path / f"{prefix}f" for prefix in (saving.PART, saving.OLD))
    part.mkdir()
    fill(part, a="2")
    if finished:
        saving.seal(part)
    if aside:
        folder.rename(old)
    saving.recover_all(tmp_path)
    assert contents(folder) == {"a": "2" if finished else "1"}
    assert os.listdir(tmp_path) == ["f"]


def test_a_finished_folder_that_cannot_take_its_place_is_kept(tmp_path, monkeypatch):
    folder = make(tmp_path / "f", a="1")
    rename = os.rename

    def refuse(source, target):
        if Path(target) == folder and Path(source).name.startswith(saving.PART):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(WriteError, match=r"Input/output error; what was to be there is complete in .*part\.f$"):
        make(folder, a="2")
    monkeypatch.undo()
    assert contents(folder) == {"a": "1"}
    saving.recover(folder)
    assert contents(folder) == {"a": "2"}


def test_too_little_room(tmp_path):
    with (
        pytest.raises(WriteError, match=r"f: 1000000000\.00 GB are needed, .* are free"),
        saving.new_folder(tmp_path / "new" / "f", 10**18),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for here in (tmp_path / "a", tmp_path / "a" / "b"):
        monkeypatch.chdir(here)
        with pytest.raises(WriteError, match="it is the current folder, or one above it"):
            make(tmp_path / "a", x="1")
    monkeypatch.chdir(tmp_path)
    make(Path("a"), x="1")
    assert contents(tmp_path / "a") == {"x": "1"}


def test_two_writers_of_a_folder(tmp_path):
    with saving.new_folder(tmp_path / "f") as part:
        fill(part, a="1")
        with pytest.raises(WriteError, match="is being written by another process"):
            make(tmp_path / "f", a="2")
    assert contents(tmp_path / "f") == {"a": "1"}


# --- digests


def test_every_flipped_bit_is_found(tmp_path):
    folder = tmp_path / "f"
    rng = np.random.default_rng(1)
    with saving.new_folder(folder) as part:
        storage.write_tensors(part / "a.safetensors", {"a": rng.standard_normal((40, 40)).astype(np.float32)})
        storage.write_json(part / "b.json", {"x": [1, 2, 3]})
    files = [folder / name for name in saving.files_of(folder)]
    sizes = [file.stat().st_size for file in files]
    dice = random.Random(2)
    for _ in range(200):
        file = dice.choices(files, sizes)[0] if dice.random() < 0.5 else folder / saving.MARKER
        data = bytearray(file.read_bytes())
        place = dice.randrange(len(data))
        data[place] ^= 1 << dice.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(data)
        assert not saving.is_intact(folder), (file, place)
        file.write_bytes(whole)
    assert saving.is_intact(folder)


def test_the_damaged_file_is_named(tmp_path):
    folder = make(tmp_path / "f", a="1", b="1")
    (folder / "b").write_text("2")
    with pytest.raises(LoraMsError, match=r"f: b is damaged: its SHA-256 is "):
        saving.verify(folder)
    (folder / "b").unlink()
    with pytest.raises(LoraMsError, match=r"f: b is missing$"):
        saving.verify(folder)
    (folder / saving.MARKER).unlink()
    with pytest.raises(LoraMsError, match=r"holds no lora-ms\.sha256"):
        saving.verify(folder)


# --- files that belong together


def place(folder: Path, **texts: str) -> None:
    part = saving.set_of(folder, "rows.sha256")
    part.mkdir()
    fill(part, **texts)
    saving.place_set(folder, "rows.sha256", sorted(texts))


def failing(call: Callable, outcomes: list[bool]) -> Callable:
    """``call``, but for an error where the next of ``outcomes``, which is taken away, says so."""

    def made(*args, **more):
        if not outcomes.pop(0):
            raise OSError(5, "Input/output error")
        return call(*args, **more)

    return made


@pytest.mark.parametrize("call", ["replace", "unlink", "fsync"])
def test_an_interrupted_set_is_finished_by_the_next(tmp_path, monkeypatch, call):
    """At each call of a kind: the old files all together, or after ``finish_set`` the new ones."""
    done = False
    for k in range(1, 20):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / "mine").write_text("mine")
        place(folder, a="old", b="old", c="old")
        outcomes = [True] * (k - 1) + [False] + [True] * 50  # of the calls
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(getattr(os, call), outcomes))
            try:
                place(folder, b="new", c="new", d="new")
                done = len(outcomes) > 50
            except (OSError, WriteError):
                pass
        begun = saving.set_is_unfinished(folder, "rows.sha256")
        saving.finish_set(folder, "rows.sha256")
        found = {name: (folder / name).read_text() for name in "abcd" if (folder / name).exists()}
        new = {"b": "new", "c": "new", "d": "new"}
        assert found == new or (found == {"a": "old", "b": "old", "c": "old"} and not begun and not done)
        assert saving.is_intact(folder, "rows.sha256") and (folder / "mine").read_text() == "mine"
        if done:
            break
    assert done and k > 2


def test_a_set_with_a_damaged_list_places_nothing(tmp_path):
    place(tmp_path, a="old")
    part = saving.set_of(tmp_path, "rows.sha256")
    part.mkdir()
    fill(part, a="new")
    (part / "rows.sha256").write_text("0" * 64 + "  ../a\n")
    with pytest.raises(LoraMsError, match="is not a list of digests"):
        saving.finish_set(tmp_path, "rows.sha256")
    assert (tmp_path / "a").read_text() == "old"


# --- locks and private folders


def test_a_lock_is_one_processes_alone(tmp_path):
    with saving.locked(tmp_path):
        with pytest.raises(WriteError, match=re.escape(f"{tmp_path} is being written by another process: wait for it")):
            saving.lock(tmp_path)
        waiting = threading.Thread(target=lambda: os.close(saving.lock(tmp_path, wait=True)))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive() and os.listdir(tmp_path) == []


def test_private_folders(tmp_path):
    assert saving.make_private(tmp_path / "new" / "cache") is None
    assert stat.S_IMODE((tmp_path / "new" / "cache").stat().st_mode) == 0o700
    (tmp_path / "read").mkdir(mode=0o755)
    assert saving.make_private(tmp_path / "read") is None
    assert stat.S_IMODE((tmp_path / "read").stat().st_mode) == 0o700  # others see nothing from here on
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert saving.make_private(tmp_path / "open") == "can be written by others (mode 777)"
    (tmp_path / "file").touch()
    assert saving.make_private(tmp_path / "file").startswith("cannot be used")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away takes root")
def test_a_folder_of_another_user_is_not_trusted(tmp_path):
    os.chown(tmp_path, 1234, 1234)
    assert saving.make_private(tmp_path) == "belongs to another user (1234)"
