"""Compiles the native CPU operators (``ops/csrc``) into the cache, once for each processor, compiler and source."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

from lora_ms import saving
from lora_ms.errors import WriteError
from lora_ms.runtime.host import cache_folder

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
SOURCES = Path(__file__).parents[1] / "ops" / "csrc"
TIME_LIMIT = 300  # seconds


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of ``COMPILERS`` that is installed; None without one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def build(extra: tuple[str, ...] = ()) -> tuple[Path | None, str]:
    """The library's path and "", compiled first where the cache does not have it; or None and the reason.

    A library works on all machines whose processor has the same features.

    extra: more flags for the compiler.
    """
    program = compiler()
    if program is None:
        return None, f"there is no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)})"
    flags = (*FLAGS, *extra)
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=TIME_LIMIT).stdout
        sources = [path.read_bytes() for path in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp"))]
        parts = [program.encode(), version.encode(), " ".join(flags).encode(), processor(), *sources]
        folder = cache_folder("cpu")
        library = folder / f"operators-{blake2b(b'|'.join(parts), digest_size=12).hexdigest()}.so"
        with saving.locked(folder, wait=True):  # another process may be building the same
            if not saving.has_digest(library):
                print("compiling the operators for this processor, once …", file=sys.stderr, flush=True)
                _compile([program, *flags], library)
        ctypes.CDLL(str(library))
    except (OSError, WriteError, subprocess.SubprocessError) as error:
        text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or [type(error).__name__]
        return None, f"{program}: {lines[0].strip()}"
    return library, ""


def _compile(command: list[str], library: Path) -> None:
    with saving.new_file(library) as made:
        subprocess.run(
            [*command, "-o", str(made), str(SOURCES / "operators.cpp")],
            check=True, capture_output=True, text=True, timeout=TIME_LIMIT,
        )  # fmt: skip
    saving.write_digest(library)


def processor() -> bytes:
    """What decides the code that -march=native generates."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = ("model name", "cpu family", "model\t", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)})).encode()


def rounds_to_bfloat16(library: str) -> bool:
    """Whether this processor has the instructions for products of bfloat16 numbers."""
    return bool(ctypes.CDLL(library).rounds_to_bfloat16())


def set_threads(library: Path, count: int) -> None:
    """The number of threads that the operators run on, at least 1."""
    ctypes.CDLL(str(library)).set_threads(count)
