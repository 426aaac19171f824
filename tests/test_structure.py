"""The house: which room imports which, and what no file may contain. Read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_ms"

# Room (or single file) of the package: what of the package it may import, and which libraries besides the standard one.
DIRECTIONS = {
    "__init__": ("adapters python train.callbacks errors", ""),
    "errors": ("", ""),
    "bundled": ("", ""),
    "text": ("", ""),
    "reading": ("errors", ""),
    "limits": ("errors", ""),
    "folder_schema": ("limits errors", "pydantic"),
    "saving": ("errors text", ""),
    "storage": ("folder_schema reading saving errors", "numpy safetensors"),
    "hf_folder": ("quant storage folder_schema reading errors", "numpy"),
    "weights": ("storage", "numpy"),
    "quant": ("quant storage reading limits errors", "numpy"),
    "ops": ("ops quant.nf4 quant.int4", "mindspore numpy"),
    "nn": ("nn ops quant", "mindspore numpy"),
    "runtime": ("runtime nn.graph nn.parallel ops saving errors", "mindspore numpy google.protobuf"),
    "values": ("", "pydantic"),
    "objectives": (
        "objectives adapters.peft_files nn.flat_groups storage saving reading values errors text",
        "mindspore numpy pydantic",
    ),
    "config": ("config objectives adapters.methods quant bundled saving values reading errors", "yaml pydantic"),
    "data": (
        "data runtime.host hf_folder saving storage reading limits errors text",
        "numpy transformers mindspore.dataset mindspore.mindrecord datasets pyarrow",
    ),
    "models": ("models quant nn ops weights hf_folder saving storage reading errors text", "mindspore numpy"),
    "adapters": (
        "adapters quant nn ops hf_folder saving storage folder_schema reading limits values errors text",
        "mindspore numpy",
    ),
    "train": (
        "train nn ops data adapters.methods.PARAMETERS runtime saving storage errors text",
        "mindspore numpy tqdm matplotlib tensorboardX IPython wandb swanlab mlflow",
    ),
    "infer": (
        "infer nn ops data.template data.example errors",
        "mindspore numpy transformers sacrebleu lm_eval tqdm",
    ),
    "bridge": (
        "bridge adapters models nn ops hf_folder saving storage reading errors text",
        "mindspore numpy yaml mindformers mindpet",
    ),
    "gguf": ("gguf storage limits reading errors", "numpy gguf tokenizers transformers"),
    "serve": (
        "serve infer.engine infer.sampling infer.text_stream data.template data.example errors text",
        "pydantic starlette uvicorn anyio h11 prometheus_client",
    ),
    "recipes": (
        "recipes config objectives gguf bridge adapters models quant train infer serve data nn ops runtime weights "
        "hf_folder folder_schema saving storage reading limits errors text",
        "mindspore numpy transformers tqdm huggingface_hub modelscope_hub lm_eval jinja2",
    ),
    "commands": (
        "commands recipes config adapters models quant train infer serve data runtime hf_folder saving storage errors "
        "text bridge",
        "numpy transformers",
    ),
    "python": (
        "python recipes adapters models quant train infer data nn runtime hf_folder saving storage errors",
        "mindspore numpy transformers",
    ),
    "cli": ("cli commands recipes config runtime.host bundled errors text __version__", ""),
}
# What a room may import inside functions only: `data` and --help answer without MindSpore.
LAZY_ONLY = {
    "data": "mindspore transformers datasets pyarrow",
    "bridge": "mindformers mindpet",
    "cli": "lora_ms.config lora_ms.commands lora_ms.recipes",
    "__init__": "lora_ms",
}


class Import(NamedTuple):
    target: str  # dotted, with the name that is taken from a module: `from a import b` is a.b
    lazy: bool  # inside a function, for type checkers, or a module's name in a string


def imports_of(source: str) -> list[Import]:
    """Of a module, those hidden in strings included: ``import_module("lora_ms.x")``, or "lora_ms.x" in a table."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.extend(Import(f"{module}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"lora_ms(\.\w+)+", node.value):
                found.append(Import(node.value, True))
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        lazy = lazy or typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def within(target: str, names: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names.split())


def breaches(room: str, source: str) -> list[str]:
    ours, libraries = DIRECTIONS[room]
    allowed = " ".join([*(f"lora_ms.{name}" for name in ours.split()), libraries])
    found = []
    for target, lazy in imports_of(source):
        if target.split(".")[0] in sys.stdlib_module_names:
            continue
        if not within(target, allowed):
            found.append(f"{room} imports {target}")
        elif not lazy and within(target, LAZY_ONLY.get(room, "")) and not within(target, "lora_ms.errors"):
            found.append(f"{room} imports {target} outside a function")
        if within(target, "mindspore.communication") and room != "runtime":
            found.append(f"{room} imports {target}, which runtime alone may")
    return found


def modules() -> dict[str, str]:
    """Sources by path relative to the package."""
    return {str(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def rooms() -> dict[str, set[str]]:
    """The graph of the house: the rooms that each room imports, itself left out."""
    graph: dict[str, set[str]] = {}
    for name, source in modules().items():
        targets = {target.split(".")[1] for target, _ in imports_of(source) if target.startswith("lora_ms.")}
        graph.setdefault(room_of(name), set()).update(targets)
    return {room: targets - {room} for room, targets in graph.items()}


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What remains of a graph once everything that leads nowhere has been taken off: empty without a circle."""
    left = dict(graph)
    while ends := {room for room, targets in left.items() if not targets & left.keys()}:
        left = {room: targets for room, targets in left.items() if room not in ends}
    return set(left)


def test_imports_are_read_in_all_their_forms():
    source = (
        "import os, numpy as np\nfrom mindspore import nn\nfrom . import x\nfrom .y import z\n"
        "if TYPE_CHECKING:\n    import a.b\nclass C:\n    import c\n    def f(self):\n        from d.e import f, g\n"
        "TABLE = {'run': 'lora_ms.commands.run'}\nimport_module('lora_ms.x')\nprint('see lora_ms.y', 'lora_ms')\n"
    )
    assert imports_of(source) == [
        ("os", False), ("numpy", False), ("mindspore.nn", False), ("..x", False), (".y.z", False),
        ("a.b", True), ("c", False), ("d.e.f", True), ("d.e.g", True),
        ("lora_ms.commands.run", True), ("lora_ms.x", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("nn", "import math, numpy\nfrom lora_ms.ops.native import MatMul", []),
        ("nn", "from lora_ms.config import RunConfig", ["nn imports lora_ms.config.RunConfig"]),
        ("nn", "from lora_ms import config", ["nn imports lora_ms.config"]),
        ("adapters", "from ..models import hub", ["adapters imports ..models.hub"]),
        ("adapters", "def f():\n    import_module('lora_ms.models.hub')", ["adapters imports lora_ms.models.hub"]),
        ("train", "from lora_ms.adapters.inject import inject", ["train imports lora_ms.adapters.inject.inject"]),
        ("infer", "from lora_ms.data.templates import x", ["infer imports lora_ms.data.templates.x"]),
        ("recipes", "def f():\n    from lora_ms.commands import merge", ["recipes imports lora_ms.commands.merge"]),
        ("data", "import mindspore.dataset", ["data imports mindspore.dataset outside a function"]),
        ("data", "def f():\n    import mindspore.dataset", []),
        ("cli", "from lora_ms.errors import LoraMsError", []),
        ("cli", "from lora_ms.commands import merge", ["cli imports lora_ms.commands.merge outside a function"]),
        (
            "cli",
            "MODULES = {'merge': 'lora_ms.commands.merge', 'x': 'lora_ms.train.x'}",
            ["cli imports lora_ms.train.x"],
        ),
        ("runtime", "def f():\n    from mindspore.communication import init", []),
        (
            "train",
            "from mindspore import communication",
            ["train imports mindspore.communication, which runtime alone may"],
        ),
    ],
)
def test_a_breach_is_seen(room, source, found):
    assert breaches(room, source) == found


def test_every_room_has_its_directions():
    assert {room_of(name) for name in modules()} == set(DIRECTIONS)


def test_imports_keep_their_directions():
    found = {name: breaches(room_of(name), source) for name, source in modules().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"a", "b", "c"}


def test_no_rooms_import_each_other_in_a_circle():
    graph = rooms()
    assert circles(graph) == set(), graph


def test_nothing_imports_the_command_line():
    users = {room: targets & {"cli", "commands"} for room, targets in rooms().items()}
    assert {room: targets for room, targets in users.items() if targets} == {"cli": {"commands"}}


MOST_POSITIONAL = 6


def long_calls(source: str) -> list[str]:
    """Calls with more positional arguments than a reader can tell apart: line, callee and number."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        f"{call.lineno}: {ast.unparse(call.func)} has {len(call.args)}"
        for call in calls
        if len(call.args) > MOST_POSITIONAL
    ]


def test_a_long_call_is_seen():
    assert long_calls("f(1, 2, 3, 4, 5, 6)\ng(1, 2, 3, 4, 5, 6, 7)\nh(*args, a=1)") == ["2: g has 7"]


def test_no_call_has_more_than_six_positional_arguments():
    found = {name: long_calls(source) for name, source in modules().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def code_of(source: str) -> str:
    """The source without comments, docstrings and texts of several lines, such as programs for another process."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            node.value = ""
    return ast.unparse(tree)


def names_matched(pattern: str, source: str) -> list[str]:
    return sorted({match.group(0) for match in re.finditer(pattern, code_of(source))})


# A device: its name in a comparison, or MindSpore's context. A library: the set of operators behind the chosen one.
DEVICE_QUESTIONS = (
    r"get_context\(|\bdevice(_target)? (==|!=|in|not in) [('\"\w]|['\"](CPU|Ascend)['\"] (==|!=)"
    r"|\bascend_is_present\b|\bon_ascend\b|\buses_flash\b|\b(native|cpu)\.(there|use)\("
    r"|from lora_ms\.ops(\.(native|ascend) import \w+| import native)"
)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = ms.get_context('device_target') == 'Ascend'", True),
        ("def f(device):\n    return 1 if device == 'CPU' else 2", True),
        ("from lora_ms.ops import native as cpu", True),
        ("from lora_ms.ops.native import library", True),
        ("from lora_ms.ops import Operators\nx = operators.product()", False),
        ('"""Compute on device == CPU."""\nrun(device="CPU")  # device == "CPU"', False),
    ],
)
def test_a_question_for_a_device_is_seen(source, found):
    assert bool(names_matched(DEVICE_QUESTIONS, source)) == found


def test_only_operators_and_runtime_know_the_device():
    found = {
        name: names_matched(DEVICE_QUESTIONS, source)
        for name, source in modules().items()
        if room_of(name) not in ("ops", "runtime")
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def classes_of(folder: str) -> set[str]:
    """Names of the classes that the modules of ``folder`` define."""
    trees = [ast.parse(source) for name, source in modules().items() if name.startswith(folder)]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def method_questions(source: str, classes: set[str]) -> list[str]:
    """``isinstance`` and ``issubclass`` on one of ``classes``."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) == 2)
    asked = [call for call in calls if ast.unparse(call.func) in ("isinstance", "issubclass")]
    return [ast.unparse(call) for call in asked if {*re.findall(r"\w+", ast.unparse(call.args[1]))} & classes]


def test_a_question_for_a_method_is_seen():
    source = "isinstance(cell, LoRADense)\nisinstance(cell, (int, x.DoRADense))\nisinstance(cell, nn.Cell)"
    assert method_questions(source, {"LoRADense", "DoRADense"}) == [
        "isinstance(cell, LoRADense)", "isinstance(cell, (int, x.DoRADense))",
    ]  # fmt: skip


def test_only_methods_know_which_method_it_is():
    classes = classes_of("adapters/methods/") - classes_of("adapters/methods/base")  # base: what every method is
    found = {
        name: method_questions(source, classes)
        for name, source in modules().items()
        if not name.startswith("adapters/methods/")
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_no_two_classes_have_one_name():
    """But for operators: each set has them under the same names, and a layer may have its operator's."""
    places: dict[str, list[str]] = {}
    for name, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and room_of(name) != "ops":
                places.setdefault(node.name, []).append(name)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


# Folders that only some machines have, and hosts of package registries. The patterns do not match themselves.
FOLDERS = r"(?<![\w.~}])/(?:work|root|opt/envs)/"
HOSTS = r"(?:pypi|npmjs|pythonhosted|download\.pytorch)\.[a-z]"
NOWHERE_ELSE = re.compile(f"{FOLDERS}|{HOSTS}", re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"run {'/'}work/main", True),
        (f"in {'/'}opt/envs/x", True),
        (f"https:{'/'}/{'pypi'}.org/simple", True),
        ("a/work/b, network/root/x, on PyPI. Then /path/to/model", False),
    ],
)
def test_machine_paths_and_registry_hosts_are_seen(text, found):
    assert bool(NOWHERE_ELSE.search(text)) == found


def test_files_name_no_machine_path_and_no_registry_host():
    if not (ROOT / ".git").exists():
        pytest.skip("the files that belong to the repository are known to git alone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    found = []
    for name in filter(None, names):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" in content:  # no text
            continue
        for number, line in enumerate(content.decode().splitlines(), 1):
            if NOWHERE_ELSE.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert found == []
