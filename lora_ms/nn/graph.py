"""The cell at the top of a graph."""

from mindspore import nn


class Graph(nn.Cell):
    """A cell that Python calls many times, with many cells in it.

    At every call, MindSpore (2.7 to 2.10) writes the name of the compiled graph into each cell inside, though only a
    compilation reads it: 10 us a cell, 5 ms a token for 8 layers. Here the name is written when it has changed.
    """

    @property
    def compile_phase(self) -> str | None:
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str) -> None:
        if value != self._compile_phase:
            nn.Cell.compile_phase.fset(self, value)
