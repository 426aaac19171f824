"""The cell at the top of a graph."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from mindspore import Parameter, Tensor, nn
from mindspore.nn.cell import _cell_graph_executor

Compiling = Callable[["Graph", tuple[Any, ...]], AbstractContextManager[None]]


class Graph(nn.Cell):
    """A cell that Python calls many times, with many cells in it.

    At every call, MindSpore (2.7 to 2.10) writes the name of the compiled graph into each cell inside, though only a
    compilation reads it: 10 us a cell, 5 ms a token for 8 layers. Here it is written when one is about to begin. And at
    every call it finds out anew which compiled graph the inputs want, whether ``construct`` takes so many, and which of
    them are no tensors: 0.3 ms. Here the graph is remembered, and called at once where all inputs are tensors.

    Attributes:
        compiling: what goes around a compilation of any ``Graph`` in this process, given the cell and its inputs.
        title: what a person is told to wait for while it is compiled; "" where that is not worth a line.
    """

    compiling: Compiling | None = None
    title = ""

    @property
    def compile_phase(self) -> str | None:
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str) -> None:
        self._compile_phase = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__dict__.get("_known", {}).get(self._key_of(args)) if not kwargs else None
        if name not in self.compile_cache:  # where other cells have been put into it
            return super().__call__(*args, **kwargs)
        return _cell_graph_executor._exec_pip(self, *args, phase=name)

    def _key_of(self, args: tuple[Any, ...]) -> tuple:
        """What decides which compiled graph the inputs want, where all are tensors."""
        return (self.phase, *((x.shape, x.dtype) if type(x) is Tensor else None for x in args))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles for inputs like ``args``, unless that was done."""
        with ExitStack() as stack:
            self.__dict__["_call"] = (stack, args)
            try:
                super().compile(*args, **kwargs)
            finally:
                del self.__dict__["_call"]
        key = self._key_of(args)
        if None not in key and not kwargs:
            self.__dict__.setdefault("_known", {})[key] = self.current_phase  # MindSpore's name of the graph

    def parameters_dict(self, recurse: bool = True) -> dict[str, Parameter]:
        """Its parameters by name; while it is compiled, also those of cells that it holds in functions alone.

        MindSpore binds the parameters of a graph that it reads from disk by this: one that is not in it would be
        another, with a value of its own.
        """
        return {**super().parameters_dict(recurse), **self.__dict__.get("held", {})}

    @contextmanager
    def holding(self, parameters: Mapping[str, Parameter]) -> Iterator[None]:
        """Inside, ``parameters_dict`` has these, too."""
        self.__dict__["held"] = parameters
        try:
            yield
        finally:
            del self.__dict__["held"]

    def check_names(self) -> None:
        """MindSpore calls this when it is about to compile, and not where the graph is there already."""
        for _, cell in self.cells_and_names():
            cell._compile_phase = self._compile_phase
        super().check_names()
        call = self.__dict__.get("_call")
        if Graph.compiling is not None and call is not None:
            stack, args = call
            stack.enter_context(Graph.compiling(self, args))
