"""What the machine gives, and how a process asks for it."""

import os
import sys

import pytest

from lora_ms.runtime.host import HUGE_PAGES_ASKED, MB, start_with_huge_pages


@pytest.mark.parametrize(
    ("enabled", "size", "tunables", "begun_with"),
    [
        ("always [madvise] never", 2 * MB, None, HUGE_PAGES_ASKED),
        ("always [madvise] never", 2 * MB, "glibc.malloc.perturb=0", f"glibc.malloc.perturb=0:{HUGE_PAGES_ASKED}"),
        ("always [madvise] never", 2 * MB, "glibc.malloc.hugetlb=0", None),
        ("always [madvise] never", 512 * MB, None, None),
        ("[always] madvise never", 2 * MB, None, None),
        ("always madvise [never]", 2 * MB, None, None),
        (None, None, None, None),
    ],
)
def test_a_process_begins_anew_with_huge_pages_where_linux_gives_them_on_request(
    tmp_path, monkeypatch, enabled, size, tunables, begun_with
):
    if enabled:
        (tmp_path / "enabled").write_text(enabled + "\n")
        (tmp_path / "hpage_pmd_size").write_text(f"{size}\n")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    begun = []
    monkeypatch.setattr(os, "execve", lambda *given: begun.append(given))
    start_with_huge_pages(tmp_path)
    if begun_with is None:
        assert not begun
    else:
        [(program, arguments, environment)] = begun
        assert (program, arguments) == (sys.executable, sys.orig_argv)
        assert environment["GLIBC_TUNABLES"] == begun_with
