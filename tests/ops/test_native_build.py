"""Compiling the operators: once, into the cache; and what is said where it cannot be."""

import os
import subprocess
from pathlib import Path

import pytest

from lora_ms.ops import PORTABLE
from lora_ms.runtime import device, native_build


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORA_MS_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cpu"


def compiler(folder: Path, text: str) -> str:
    """A compiler that does what ``text``, a shell script, says."""
    file = folder / "my-c++"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_a_library_is_compiled_once(cache):
    quick = ("-O0",)
    first, why = native_build.build(quick)
    assert first is not None and first.parent == cache, why
    assert sorted(path.name for path in cache.iterdir()) == [first.name, f"{first.name}.sha256"]
    stamp = os.stat(first).st_mtime_ns
    assert native_build.build(quick) == (first, "") and os.stat(first).st_mtime_ns == stamp
    other, _ = native_build.build((*quick, "-DLANES=4"))
    assert other is not None and other != first


def test_without_a_compiler_a_run_goes_on_with_mindspores_operators(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native_build.build() == (None, "there is no C++ compiler (no-such-compiler)")
    found, notices = device.setup("CPU")
    assert found.operators is PORTABLE
    assert notices == [
        "native operators for the CPU could not be compiled, so a step takes longer: "
        "there is no C++ compiler (no-such-compiler)"
    ]
    assert device.setup("CPU", cpu_operators=False)[1] == []


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache, tmp_path, monkeypatch):
    script = '[ "$1" = --version ] && exit 0; echo "x.cpp:1: error: no such header" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    library, why = native_build.build()
    assert library is None and why.endswith("my-c++: x.cpp:1: error: no such header")
    assert list(cache.iterdir()) == []


def test_a_library_that_does_not_load_is_not_used(cache, tmp_path, monkeypatch):
    script = '[ "$1" = --version ] && exit 0; while [ "$1" != -o ]; do shift; done; echo no library > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    library, why = native_build.build()
    assert library is None and "my-c++: " in why


def copying_compiler(folder: Path) -> str:
    """Gives out a small library of the compiler's own for every build."""
    made = folder / "made.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", str(made), os.devnull], check=True)
    script = (
        f'[ "$1" = --version ] && exit 0; while [ "$1" != -o ]; do shift; done; cp {made} "$2"; echo >> {folder}/built'
    )
    return compiler(folder, script)


def times_built(folder: Path) -> int:
    return len((folder / "built").read_text())


def test_a_damaged_library_is_built_again(cache, tmp_path, monkeypatch):
    """Loaded, one that was cut would end the process by SIGBUS; one whose digest is missing may be anybody's."""
    monkeypatch.setenv("CXX", copying_compiler(tmp_path))
    library, why = native_build.build()
    assert library is not None, why
    whole = library.read_bytes()
    digest = library.with_name(f"{library.name}.sha256")
    flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    for number, (file, content) in enumerate(
        ((library, whole[:-200]), (library, flipped), (digest, b""), (digest, b"\xff")), 2
    ):
        file.unlink()  # this process has the old one loaded
        file.write_bytes(content)
        assert native_build.build() == (library, "")
        assert library.read_bytes() == whole and times_built(tmp_path) == number
    assert native_build.build() == (library, "") and times_built(tmp_path) == number


GIVEN_AWAY = pytest.param("given away", marks=pytest.mark.skipif(os.geteuid() != 0, reason="it takes root"))


@pytest.mark.parametrize("planted", ["open", GIVEN_AWAY])
def test_a_cache_that_others_can_write_is_not_used(cache, tmp_path, monkeypatch, capsys, planted):
    monkeypatch.setenv("CXX", copying_compiler(tmp_path))
    library, _ = native_build.build()
    cache.chmod(0o777) if planted == "open" else os.chown(cache, 1234, 1234)
    other, why = native_build.build()
    assert other is not None and other.name == library.name and not other.is_relative_to(tmp_path), why
    assert times_built(tmp_path) == 2
    fault = "can be written by others (mode 777)" if planted == "open" else "belongs to another user (1234)"
    assert f"warning: the cache {cache} {fault}, so this run uses a temporary one" in capsys.readouterr().err
