"""This machine: its memory and cores, the limits of its control group, and the cache folder. MB is 2^20 bytes."""

import atexit
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from lora_ms import saving

MB = 2**20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
HUGE_PAGES_ASKED = "glibc.malloc.hugetlb=1"  # in GLIBC_TUNABLES: malloc's large blocks ask for them
V1_MEMORY = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2_MEMORY = ("memory.max", "memory.current")


def start_with_huge_pages(folder: Path = HUGE_PAGES) -> None:
    """Begins this process anew, once, with memory in pages of 2 MB, where Linux gives them to a process that asks.

    Products that read activations and weights from far spend much of their time looking up pages of 4 KB, in virtual
    machines above all: SmolLM2-135M's step takes 0.82 of the time (4.1 s, 3.4 s; two cores, AVX-512), with 13 MB more.
    Not for generation, which it makes 1.1 times as fast with 1.3 times the memory. glibc reads the setting as a process
    begins; madvise on what MindSpore has allocated by its first step has no effect.
    Where all memory has such pages already, where none has, and where they are larger (512 MB beside basic pages of
    64 KB: too much would be taken), nothing is done. folder: where Linux says so.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "")
    try:
        on_request = "[madvise]" in (folder / "enabled").read_text()
    except OSError:
        return
    if not on_request or _number(folder / "hpage_pmd_size") != 2 * MB or "glibc.malloc.hugetlb" in asked:
        return
    tunables = ":".join(filter(None, (asked, HUGE_PAGES_ASKED)))
    with suppress(OSError):  # a Python that cannot be found again goes on as it is
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": tunables})


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _quota(path: Path) -> tuple[int, int] | tuple[None, None]:
    try:
        quota, period = path.read_text().split()
        return int(quota), int(period)
    except (OSError, ValueError):  # no such file, or "max 100000"
        return None, None


def _groups(kind: str, root: Path, membership: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group of this process that may limit ``kind`` (memory or cpu).

    root: where control groups are mounted. membership: the file that names this process's groups.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        version, base = (1, root / kind) if kinds else (2, root)
        yield from ((version, folder) for folder in (base / path.lstrip("/"), base))


def _file_cache(stat: Path) -> int:
    # bytes of files that the kernel keeps and drops first when memory is short
    try:
        counts = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def cgroup_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[float, float] | None:
    """Limit and use of the control group, MB, without cached files; of nested groups, the one that leaves the least.

    None where there is no limit.
    """
    found: list[tuple[float, float]] = []
    for version, folder in _groups("memory", root, membership):
        limit, current = V1_MEMORY if version == 1 else V2_MEMORY
        most = _number(folder / limit)
        now = _number(folder / current)
        if most is not None and most < 1 << 60:
            used = max(0, (now or 0) - _file_cache(folder / "memory.stat"))
            found.append((most / MB, used / MB))
    return min(found, key=lambda group: group[0] - group[1], default=None)


def cores(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those it may run on, or fewer where its control group limits CPU time."""
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for version, folder in _groups("cpu", root, membership):
        if version == 1:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        else:
            quota, period = _quota(folder / "cpu.max")
        if quota and period and quota > 0:  # -1: no limit
            most = min(most, math.ceil(quota / period))
    return most


def system() -> tuple[float, float]:
    """Total and available memory of the machine, MB."""
    page = os.sysconf("SC_PAGE_SIZE") / MB
    total = os.sysconf("SC_PHYS_PAGES") * page
    try:
        text = Path("/proc/meminfo").read_text()
        return total, int(text.partition("MemAvailable:")[2].split()[0]) / 2**10
    except (OSError, IndexError):
        return total, total


def available() -> float:
    """MB that a new process can have: what the system has left, or what the control group leaves."""
    group = cgroup_limit()
    room = system()[1]
    return room if group is None else min(room, group[0] - group[1])


def share(budget_mb: float | None = None) -> float:
    """Share of memory in use now, 0 to 1.

    budget_mb: what this process may use, and the share is of; None: of all that the machine or the control group has.
    """
    total, free = system()
    if budget_mb is not None and budget_mb < total:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MB / budget_mb
    group = cgroup_limit()
    return 1 - free / total if group is None else max(1 - free / total, group[1] / group[0])


def cache_folder(kind: str = "") -> Path:
    """The cache, or its folder of one ``kind``: under $LORA_MS_CACHE, else ~/.cache/lora_ms. It is made.

    What others could have written is not used: there, it is a temporary folder, and the user is told.
    """
    folder = Path(os.environ.get("LORA_MS_CACHE") or Path.home() / ".cache" / "lora_ms")
    for each in dict.fromkeys((folder, folder / kind)):
        fault = saving.make_private(each)
        if fault is not None:
            folder = _temporary_cache(str(each), fault)
            (folder / kind).mkdir(exist_ok=True)
            break
    return folder / kind


@cache
def _temporary_cache(refused: str, fault: str) -> Path:
    folder = tempfile.mkdtemp(prefix="lora_ms_cache_")  # its owner's alone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(
        f"warning: the cache {refused} {fault}, so this run uses a temporary one: chmod 700 it where nobody else has "
        "used it, or set LORA_MS_CACHE to a folder of your own",
        file=sys.stderr,
    )
    return Path(folder)
