"""A name for a graph that MindSpore is about to compile: equal names promise equal graphs.

MindSpore's own compile cache compares the text of source files and the order of compilations, and nothing of
constants, sizes or shapes. What decides a graph here is read from the cells themselves: every attribute of every cell
(numbers, constants by their bytes, primitives with their attributes, parameters by name, shape and type), the inputs,
the sources of this package, and the settings and versions underneath. An attribute of a kind that is not known here
makes a graph unnameable; it is then compiled afresh each time.
"""

import dataclasses
import functools
import importlib.metadata
import os
import platform
import sys
import time
import types
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops import Primitive

from lora_ms.runtime.native_build import processor

PACKAGE = Path(__file__).parents[1]
TRUSTED = ("lora_ms", "mindspore", "numpy")  # packages whose sources the name stands for
EXACT = frozenset({bool, int, float, complex, str, bytes, type(None), type(...)})  # their repr tells type and value
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), slice, range, np.generic, np.dtype)
OWN_KEYS = ("training", "mixed_precision_type", "_jit_config_dict", "_amp_level", "requires_grad")
MOST_CONSTANTS = 128 << 20  # bytes
CHILDREN = ("_params", "_cells", "_buffers", "_params_list", "_primitives")  # where a cell keeps what it is made of
# of a cell: text with addresses (what it tells are attributes, too), the call that a Graph is in, the graphs it has
# compiled, its last name, what a model of the Python interface generates with, which holds graphs and is in none, seeds
# of random operators, which are attributes of those where they are used, where an optimiser's parameters lie, what
# reads a weight as it was before it was quantised, and whether a model of the Python interface has trained
IDLE_KEYS = frozenset(
    {
        *("_cell_init_args", "_call", "_known", "current_phase", "generator", "_seeds"),
        *("held", "flat", "_original", "has_trained"),
    }
)
IDLE_CLOSURES = frozenset({"hash_obj"})  # the time at which mindspore.jit wrapped a function, as value_and_grad does
# of a run of msrun, and of this cache: they decide no graph (its rank and their number are given apart)
IDLE_VARIABLES = ("MS_SCHED_", "MS_ROLE", "MS_NODE_", "MS_COMPILER_CACHE_", "MS_DEV_FORCE_USE_COMPILE_CACHE", "MS_TOPO")


class Unnameable(Exception):
    """The graph holds something whose value cannot be read."""


class GraphName(NamedTuple):
    """What decides a graph, and what it works on."""

    digest: str  # 32 hexadecimal digits
    parameters: dict[str, Parameter]  # by name, all that the cell holds, in whatever way


def name_of(cell: nn.Cell, inputs: Iterable[Any], process: tuple[int, int] = (0, 1)) -> GraphName:
    """For the graph of ``cell`` on ``inputs``, of which only shapes and types count.

    process: the rank of this one, and how many the run has.

    Raises:
        Unnameable: the cell holds a value of an unknown kind, a class from outside ``TRUSTED``, two parameters of one
            name or more constants than are worth keeping; or a source file was changed while this process ran.
    """
    if sources_changed():
        raise Unnameable("a source file that was changed since this process began")
    reader = _Reader()
    reader.add("surroundings", surroundings(), process)
    for value in inputs:
        reader.input(value)
    reader.read(cell)
    reader.add("globals", plain_globals(reader.modules))
    return GraphName(reader.digest(), reader.parameters)


def graph_digest(cell: nn.Cell, inputs: Iterable[Any], process: tuple[int, int] = (0, 1)) -> str:
    """The digest alone, see ``name_of``."""
    return name_of(cell, inputs, process).digest


def likeness(cell: nn.Cell, inputs: Iterable[Any]) -> str:
    """Tells about how long a graph takes: equal for one cell in two versions of this package."""
    shapes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
    sizes = [parameter.size for parameter in cell.get_parameters()]
    return f"{type(cell).__name__} {shapes} with {len(sizes)} parameters, {sum(sizes)}"


class _Reader:
    """Feeds everything that decides a graph to one hash, objects that are met again by their number."""

    def __init__(self) -> None:
        self.hash = blake2b(digest_size=16)
        self.waiting: list[str] = []  # for the hash, many small texts at once
        self.types: set[type] = set()
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no number of an object is given twice
        self.parameters: dict[str, Parameter] = {}
        self.modules: set[str] = set()  # of this package, that the classes and functions are in
        self.room = MOST_CONSTANTS

    def add(self, *parts: Any) -> None:
        self.waiting.append(repr(parts))

    def digest(self) -> str:
        self._flush()
        return self.hash.hexdigest()

    def _flush(self) -> None:
        self.hash.update("\0".join([*self.waiting, ""]).encode())
        self.waiting.clear()

    def input(self, value: Any) -> None:
        if isinstance(value, Tensor):  # a Parameter is one
            self.add("input", type(value).__name__, tuple(value.shape), str(value.dtype))
        elif isinstance(value, tuple | list):
            self.add("inputs", type(value).__name__, len(value))
            for one in value:
                self.input(one)
        else:
            self.read(value)

    def met(self, value: Any) -> bool:
        """Whether ``value`` was read before; if so its number stands for it."""
        number = self.seen.setdefault(id(value), len(self.seen))
        self.add("object", number)
        if number < len(self.kept):
            return True
        self.kept.append(value)
        return False

    def read(self, value: Any) -> None:
        if type(value) in EXACT:
            self.add(value)
        elif isinstance(value, PLAIN):
            self.add(type(value).__name__, value)
        elif isinstance(value, type):
            self.type_name(value)
        elif isinstance(value, Parameter):
            self.parameter(value)
        elif isinstance(value, Tensor):
            if not self.met(value):
                self.array("tensor", value.asnumpy(), str(value.dtype))
        elif isinstance(value, np.ndarray):
            self.array("array", value, str(value.dtype))
        elif isinstance(value, Mapping):
            self.add("mapping", type(value).__name__, len(value))
            if all(type(key) is str for key in value):
                self.attributes(value)
            else:
                for key, one in value.items():
                    self.read(key)
                    self.read(one)
        elif isinstance(value, tuple | list):
            self.add("sequence", type(value).__name__, len(value))
            if all(type(one) in EXACT for one in value):
                self.add(*value)
            else:
                for one in value:
                    self.read(one)
        elif isinstance(value, set | frozenset):
            self.add("set", sorted(map(repr, value)))
        elif isinstance(value, nn.Cell):
            self.cell(value)
        else:
            self.other(value)

    def attributes(self, values: Mapping[str, Any]) -> None:
        """Named values, those that are plain at once."""
        plain = {key: value for key, value in values.items() if type(value) in EXACT}
        self.add(plain)
        for key, value in values.items():
            if key not in plain:
                self.add(key)
                self.read(value)

    def parameter(self, value: Parameter) -> None:
        if self.met(value):
            return
        if value.name in self.parameters:  # a graph that is read from disk knows them by their names
            raise Unnameable(f"two parameters named {value.name}")
        self.parameters[value.name] = value
        self.add("parameter", value.name, tuple(value.shape), str(value.dtype), value.requires_grad)

    def array(self, kind: str, value: np.ndarray, dtype: str) -> None:
        self.room -= value.nbytes
        if self.room < 0:
            raise Unnameable(f"more than {MOST_CONSTANTS:,} bytes of constants")
        self.add(kind, value.shape, dtype)
        self._flush()
        self.hash.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def cell(self, cell: nn.Cell) -> None:
        if self.met(cell):
            return
        self.type_name(type(cell))
        children = {key: value for key in CHILDREN if (value := getattr(cell, key))}
        own = {key: getattr(cell, key) for key in OWN_KEYS}
        found = vars(cell)
        self.add("cell", cell.get_flags(), len(children))
        self.attributes(children | own | {key: found[key] for key in sorted(found.keys() - _bare_cell() - IDLE_KEYS)})

    def other(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, types.MethodType):
            self.other(value.__func__)
            self.read(value.__self__)
        elif isinstance(value, functools.partial):
            self.read((value.func, value.args, value.keywords))
        elif isinstance(value, types.BuiltinFunctionType):
            self.add("builtin", value.__module__, value.__qualname__)
        elif type(value).__module__.startswith("mindspore._c_expression") and not vars_of(value):
            self.add("type", str(value))  # such as mindspore.float32
        elif isinstance(value, Primitive) or dataclasses.is_dataclass(value) or _trusted(type(value).__module__):
            if not self.met(value):
                self.type_name(type(value))
                self.attributes(dict(sorted(vars_of(value).items())))
        else:
            raise Unnameable(f"a value of {type(value).__module__}.{type(value).__qualname__}")

    def function(self, value: types.FunctionType) -> None:
        if not _trusted(value.__module__):
            raise Unnameable(f"a function of {value.__module__}")
        self._module(value.__module__)
        self.add("function", value.__module__, value.__qualname__, value.__code__.co_firstlineno)
        if not self.met(value):
            self.read((value.__defaults__, value.__kwdefaults__))
            for name, one in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                self.add(name)
                if name not in IDLE_CLOSURES:
                    self.read(one.cell_contents)

    def type_name(self, value: type) -> None:
        if value not in self.types:
            if not _trusted(value.__module__) and value.__module__ != "builtins":
                raise Unnameable(f"class {value.__module__}.{value.__qualname__}")
            for kind in value.__mro__:
                self._module(kind.__module__)
            self.types.add(value)
        self.add("class", value.__module__, value.__qualname__)

    def _module(self, name: str) -> None:
        if name.partition(".")[0] == PACKAGE.name:
            self.modules.add(name)


def vars_of(value: Any) -> Mapping[str, Any]:
    """Attributes of an object, those in slots included."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name) and not name.startswith("__")}
    return {**found, **getattr(value, "__dict__", {})}


def _trusted(module: str | None) -> bool:
    return (module or "").partition(".")[0] in TRUSTED


@functools.cache
def _bare_cell() -> frozenset[str]:
    """The attributes that every cell has: MindSpore's bookkeeping."""
    return frozenset(vars(nn.Cell()))


def plain_globals(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Plain values in modules of this package, and in those that they take from: a graph has them as constants.

    They stand in the sources; but a program may have changed them.
    """
    found = []
    waiting = set(names)
    read: set[str] = set()
    while waiting:
        name = waiting.pop()
        read.add(name)
        for key, value in vars(sys.modules[name]).items():
            if key[:2] == "__":
                continue
            if _is_plain(value):
                found.append((name, key, repr(value)))
            origin = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(origin, str) and origin.startswith(f"{PACKAGE.name}.") and origin != f"{name}.{key}":
                waiting |= {origin} - read
    return sorted(found)


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


@functools.cache
def source_files() -> tuple[Path, ...]:
    """Of this package, C++ included."""
    return tuple(path for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".py", ".h", ".cpp"))


@functools.cache
def sources() -> str:
    """Of every source file of this package."""
    found = blake2b(digest_size=16)
    for path in source_files():
        found.update(f"{path.relative_to(PACKAGE)}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def sources_changed() -> bool:
    """Whether a source file was written since this process began: MindSpore reads some of them as it compiles."""
    try:
        return max(os.stat(path).st_ctime for path in source_files()) > process_start()
    except FileNotFoundError:
        return True


@functools.cache
def process_start() -> float:
    """When this process began, in seconds as ``time.time`` has them."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine started
    running = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - running


def versions() -> tuple[str, ...]:
    """Of what computes underneath."""
    packages = ("mindspore", "numpy")
    return (platform.python_version(), ms.__version__, *map(importlib.metadata.version, packages))


def surroundings() -> tuple[Any, ...]:
    """What decides a graph besides its cells and inputs: sources, versions, processor, settings of MindSpore."""
    keys = ("mode", "device_target", "enable_graph_kernel", "graph_kernel_flags", "jit_level", "jit_config")
    settings = [(key, repr(ms.get_context(key))) for key in (*keys, "deterministic", "max_call_depth")]
    variables = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith(("MS_", "ASCEND_", "HCCL_")) and not name.startswith(IDLE_VARIABLES)
    )
    return sources(), versions(), processor(), settings, variables
