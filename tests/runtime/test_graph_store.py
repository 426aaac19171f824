"""The folder of compiled graphs: what is kept is found whole or not at all, whatever happens to it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_ms.runtime import graph_store
from lora_ms.runtime.graph_store import ABOUT, GRAPH, PART, STAGE, TIMES, Store, checksum, graphs_folder, new_stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "graphs")


def kept(store: Store, digest: str, content: bytes = b"a graph", tmp: str = "graph") -> Path:
    file = store.folder.parent / tmp
    file.write_bytes(content)
    store.keep(digest, file, 1.5, "Net")
    return store.folder / digest


def found(store: Store, digest: str) -> tuple[float, bytes] | None:
    """Seconds and content."""
    target = store.folder.parent / "taken"
    target.unlink(missing_ok=True)
    seconds = store.take(digest, target)
    assert target.exists() == (seconds is not None)
    return None if seconds is None else (seconds, target.read_bytes())


def test_what_is_kept_is_found(store):
    assert found(store, "d" * 32) is None
    kept(store, "d" * 32)
    assert found(store, "d" * 32) == (1.5, b"a graph")
    assert store.folder.stat().st_mode & 0o777 == 0o700


def spoil_graph(entry: Path) -> None:
    (entry / GRAPH).write_bytes(b"b graph")


def cut_graph(entry: Path) -> None:
    (entry / GRAPH).write_bytes(b"a gra")


def lose_graph(entry: Path) -> None:
    (entry / GRAPH).unlink()


def spoil_about(entry: Path) -> None:
    (entry / ABOUT).write_text('{"sha256": ')


def other(entry: Path) -> Path:
    """A whole entry of another name."""
    return kept(Store(entry.parent), "e" * 32, b"another")


def forge_entry(entry: Path) -> None:
    shutil.rmtree(entry)
    shutil.copytree(other(entry), entry)


def forge_graph(entry: Path) -> None:
    shutil.copy(other(entry) / GRAPH, entry / GRAPH)


def forge_about(entry: Path) -> None:
    """Both files of another entry, and all that names it replaced."""
    forge_entry(entry)
    text = (entry / ABOUT).read_text()
    (entry / ABOUT).write_text(text.replace("e" * 32, "d" * 32))


def not_text(entry: Path) -> None:
    (entry / ABOUT).write_bytes(os.urandom(200))


def not_a_mapping(entry: Path) -> None:
    (entry / ABOUT).write_text("[1, 2]")


def no_folder(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
    entry.write_text("a file")


@pytest.mark.parametrize(
    "spoil",
    [
        *(spoil_graph, cut_graph, lose_graph, spoil_about, not_text, not_a_mapping, no_folder),
        *(forge_entry, forge_graph, forge_about),
    ],
)
def test_a_damaged_entry_is_a_miss_and_can_be_kept_again(store, spoil):
    entry = kept(store, "d" * 32)
    spoil(entry)
    assert found(store, "d" * 32) is None
    kept(store, "d" * 32)
    assert found(store, "d" * 32) == (1.5, b"a graph")


def test_a_second_process_does_not_replace_an_entry(store):
    kept(store, "d" * 32, b"first")
    kept(store, "d" * 32, b"second")
    assert found(store, "d" * 32) == (1.5, b"first")
    assert sorted(path.name for path in store.folder.iterdir()) == ["d" * 32]


def test_the_longest_unused_goes_first(tmp_path):
    store = Store(tmp_path / "graphs", limit=2500)
    for i, name in enumerate("abc"):
        entry = kept(store, name * 32, bytes(600))
        os.utime(entry, (i, i))
    assert found(store, "a" * 32) is not None  # used just now
    kept(store, "d" * 32, bytes(600))
    assert [found(store, name * 32) is not None for name in "abcd"] == [True, False, True, True]
    assert store.size() <= 2500
    store.clear()
    assert store.size() == 0


def test_a_folder_that_others_may_write_to_is_refused(tmp_path):
    folder = tmp_path / "graphs"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not this user's alone"):
        Store(folder)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError):
        Store(tmp_path / "link")


def test_leftovers_of_killed_processes_go(store):
    code = (
        "import os, sys; from pathlib import Path; from lora_ms.runtime.graph_store import new_stage\n"
        "print(new_stage(Path(sys.argv[1])), flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(store.folder)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    gone, here = Path(child.stdout.strip()), new_stage(store.folder)
    assert child.returncode == -9 and gone.is_dir() and gone.name.startswith(STAGE)
    old, new, begun = store.folder / f"{PART}old", store.folder / f"{PART}new", store.folder / f"{STAGE}begun"
    for folder in (old, new, begun):
        folder.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    store.remove_leftovers()
    assert [folder.exists() for folder in (gone, old, here, new, begun)] == [False, False, True, True, True]
    kept(store, "d" * 32)
    store.clear()
    assert list(store.folder.iterdir()) == [here]


def test_durations_are_remembered(store, monkeypatch):
    monkeypatch.setattr(graph_store, "MOST_TIMES", 2)
    assert store.times() == {}
    for key, seconds in (("a", 1.0), ("b", 2.0), ("a", 3.0), ("c", 4.0)):
        store.remember(key, seconds)
    assert store.times() == {"a": 3.0, "c": 4.0}
    assert store.entries() == []
    for garbage in (b"", b"[]", b'{"a": "x"}', b"\xff\xfe", b'{"a": [1]}'):
        (store.folder / TIMES).write_bytes(garbage)
        assert store.times() == {}


def test_a_checksum_is_of_name_and_content():
    assert len({checksum("a", b"b"), checksum("a", b"c"), checksum("b", b"b"), checksum("ab", b"")}) == 4


@pytest.mark.parametrize(
    ("value", "folder"),
    [(None, "cache/graphs"), ("", "cache/graphs"), ("elsewhere", "elsewhere"), ("False", None), ("0", None)],
)
def test_where_the_graphs_are_kept(monkeypatch, value, folder):
    monkeypatch.setenv("LORA_MS_CACHE", "cache")
    monkeypatch.delenv("LORA_MS_GRAPH_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("LORA_MS_GRAPH_CACHE", value)
    assert graphs_folder() == (None if folder is None else Path(folder))
