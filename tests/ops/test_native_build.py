"""Compiling the operators: once, into the cache; and what is said where it cannot be."""

import os
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
    first, why = native_build.build()
    assert first is not None and first.parent == cache, why
    assert [path.name for path in cache.iterdir()] == [first.name]
    stamp = os.stat(first).st_mtime_ns
    assert native_build.build() == (first, "") and os.stat(first).st_mtime_ns == stamp
    other, _ = native_build.build(("-DLANES=4",))
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
