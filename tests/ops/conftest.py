"""The native operators on another processor: cross-compiled for aarch64, and run by qemu in a process of its own."""

import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from lora_ms import saving
from lora_ms.runtime import native_build
from lora_ms.runtime.host import cache_folder

COMPILER, LIBRARIES = "aarch64-linux-gnu-g++", "/usr/aarch64-linux-gnu"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# Kunpeng 920 and the Orange Pi's cores have these; a native build there takes what the processor has
MACHINE = "-march=armv8.2-a+fp16"


class Emulated:
    """A library of operators in a process that qemu runs; called as ``run(name, inputs, shapes)``."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, name: str, inputs: list[np.ndarray], shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
        arrays = [*(np.ascontiguousarray(x) for x in inputs), *outputs]
        parts = [text(name.encode()), struct.pack("<q", len(arrays))]
        for x in arrays:
            parts += [text(x.dtype.name.encode()), struct.pack(f"<{1 + x.ndim}q", x.ndim, *x.shape), text(x.tobytes())]
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()
        assert self.process.stdout.read(8) == bytes(8), name  # the operator's status
        for x in arrays:  # some are written that are not outputs
            x.view(np.uint8).reshape(-1)[:] = np.frombuffer(self.process.stdout.read(x.nbytes), np.uint8)
        return outputs

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(timeout=30) == 0


def text(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


def cross_compiled(lanes: int) -> Path:
    """The operators for aarch64, in the cache: compiling takes longer than the tests."""
    flags = [MACHINE if flag == "-march=native" else flag for flag in native_build.FLAGS] + [f"-DLANES={lanes}"]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    sources = [file.read_bytes() for file in sorted(native_build.SOURCES.iterdir()) if file.suffix in (".h", ".cpp")]
    digest = blake2b(b"|".join([version, " ".join(flags).encode(), *sources]), digest_size=12).hexdigest()
    library = cache_folder("aarch64") / f"operators-{digest}.so"
    if not library.is_file():
        with saving.new_file(library) as made:
            subprocess.run([COMPILER, *flags, "-o", str(made), str(native_build.SOURCES / "operators.cpp")], check=True)
    return library


@pytest.fixture(scope="session")
def aarch64(tmp_path_factory) -> Iterator[Callable[[int], Emulated]]:
    """``aarch64(lanes)``: the operators with vectors of so many floats; skipped where the tools are not installed."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if shutil.which(COMPILER) is None or emulator is None:
        pytest.skip(f"{COMPILER} or {EMULATORS[0]} is missing: apt install g++-aarch64-linux-gnu qemu-user-static")
    folder = tmp_path_factory.mktemp("aarch64")
    driver = folder / "driver"
    source = Path(__file__).parent / "driver.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-O2", "-o", str(driver), str(source), "-ldl"], check=True)
    started: dict[int, Emulated] = {}

    def start(lanes: int) -> Emulated:
        if lanes not in started:
            library = cross_compiled(lanes)
            started[lanes] = Emulated([emulator, "-L", LIBRARIES, str(driver), str(library)])
        return started[lanes]

    yield start
    for each in started.values():
        each.close()
