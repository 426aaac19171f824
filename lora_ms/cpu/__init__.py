"""Our own operators for the CPU, in C++, compiled on the machine that runs them. ``build`` makes the library."""

from lora_ms.cpu.build import build, compiler, set_threads

__all__ = ["build", "compiler", "set_threads"]
