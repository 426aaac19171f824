"""The operators that cells compute with: one set for any device, one for Ascend, one of our own C++ for the CPU."""

from lora_ms.ops.operators import PORTABLE, Operators, select

__all__ = ["PORTABLE", "Operators", "select"]
