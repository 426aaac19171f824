"""The house: which part imports which, and what no file may contain. Read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_ms"

# Part of the package: what of the package it may import, and which libraries besides the standard one.
DIRECTIONS = {
    "__init__": ("adapters python errors", ""),
    "errors": ("", ""),
    "storage": ("errors", "numpy safetensors"),
    "runtime": ("runtime nn.parallel ops errors", "mindspore"),
    "values": ("", "pydantic"),
    "config": ("config adapters.methods values errors", "yaml pydantic"),
    "data": (
        "data runtime.host storage errors",
        "numpy transformers mindspore.dataset mindspore.mindrecord datasets pyarrow",
    ),
    "ops": ("ops", "mindspore numpy"),
    "nn": ("nn ops", "mindspore numpy"),
    "models": ("models nn ops storage errors", "mindspore numpy"),
    "adapters": ("adapters nn ops storage values errors", "mindspore numpy"),
    "train": (
        "train nn ops data adapters.methods.PARAMETERS runtime storage errors",
        "mindspore numpy tqdm matplotlib tensorboardX",
    ),
    "infer": ("infer nn ops data.template data.example errors", "mindspore numpy transformers sacrebleu"),
    "bridge": ("bridge adapters models nn ops storage errors", "mindspore numpy yaml mindformers mindpet"),
    "recipes": (
        "recipes config bridge models adapters train infer data nn ops runtime storage errors",
        "mindspore numpy transformers tqdm",
    ),
    "commands": (
        "commands recipes config bridge models adapters train infer data nn ops runtime storage errors",
        "mindspore numpy transformers tqdm",
    ),
    "python": (
        "python recipes models adapters train infer data nn ops runtime storage errors",
        "mindspore numpy transformers",
    ),
    "cli": ("cli commands recipes config runtime adapters errors", ""),
}
# What a part may import inside functions only: `data` and --help answer without MindSpore.
LAZY_ONLY = {
    "data": "mindspore transformers datasets pyarrow",
    "bridge": "mindformers mindpet",
    "cli": "lora_ms.config lora_ms.commands lora_ms.recipes lora_ms.adapters lora_ms.runtime",
    "__init__": "lora_ms",
}


class Import(NamedTuple):
    target: str  # dotted, with the name that is taken from a module: `from a import b` is a.b
    lazy: bool  # inside a function, or for type checkers


def imports_of(source: str) -> list[Import]:
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.extend(Import(f"{module}.{alias.name}", lazy) for alias in node.names)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        lazy = lazy or typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def within(target: str, names: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names.split())


def breaches(part: str, source: str) -> list[str]:
    ours, libraries = DIRECTIONS[part]
    allowed = " ".join([*(f"lora_ms.{name}" for name in ours.split()), libraries])
    found = []
    for target, lazy in imports_of(source):
        if target.split(".")[0] in sys.stdlib_module_names:
            continue
        if not within(target, allowed):
            found.append(f"{part} imports {target}")
        elif not lazy and within(target, LAZY_ONLY.get(part, "")) and not within(target, "lora_ms.errors"):
            found.append(f"{part} imports {target} outside a function")
        if within(target, "mindspore.communication") and part != "runtime":
            found.append(f"{part} imports {target}, which runtime alone may")
    return found


def modules() -> dict[str, str]:
    """Sources by path relative to the package."""
    return {str(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def test_imports_are_read_in_all_their_forms():
    source = (
        "import os, numpy as np\nfrom mindspore import nn\nfrom . import x\nfrom .y import z\n"
        "if TYPE_CHECKING:\n    import a.b\nclass C:\n    import c\n    def f(self):\n        from d.e import f, g\n"
    )
    assert imports_of(source) == [
        ("os", False), ("numpy", False), ("mindspore.nn", False), ("..x", False), (".y.z", False),
        ("a.b", True), ("c", False), ("d.e.f", True), ("d.e.g", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("nn", "import math, numpy\nfrom lora_ms.ops.native import MatMul", []),
        ("nn", "from lora_ms.config import RunConfig", ["nn imports lora_ms.config.RunConfig"]),
        ("nn", "from lora_ms import config", ["nn imports lora_ms.config"]),
        ("adapters", "from ..models import hub", ["adapters imports ..models.hub"]),
        ("train", "from lora_ms.adapters.inject import inject", ["train imports lora_ms.adapters.inject.inject"]),
        ("infer", "from lora_ms.data.templates import x", ["infer imports lora_ms.data.templates.x"]),
        ("data", "import mindspore.dataset", ["data imports mindspore.dataset outside a function"]),
        ("data", "def f():\n    import mindspore.dataset", []),
        ("cli", "from lora_ms.errors import LoraMsError", []),
        ("cli", "from lora_ms.commands import merge", ["cli imports lora_ms.commands.merge outside a function"]),
        ("runtime", "def f():\n    from mindspore.communication import init", []),
        (
            "train",
            "from mindspore import communication",
            ["train imports mindspore.communication, which runtime alone may"],
        ),
    ],
)
def test_a_breach_is_seen(part, source, found):
    assert breaches(part, source) == found


def test_every_part_has_its_directions():
    assert {part_of(name) for name in modules()} == set(DIRECTIONS)


def test_imports_keep_their_directions():
    found = {name: breaches(part_of(name), source) for name, source in modules().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


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
