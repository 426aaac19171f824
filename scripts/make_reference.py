"""Writes docs/reference-{cli,yaml,python}.md and their Chinese twins from the code: parsers, schema, docstrings.

    python scripts/make_reference.py            writes the pages
    python scripts/make_reference.py --check    names those that differ from the code, and ends with status 1

The pages are committed, so that they can be read in the repository, a change of the interface shows in a diff, and the
site builds without MindSpore; ``tests/docs/test_reference.py`` compares them with what this program makes.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lora_ms  # noqa: E402
from lora_ms import values  # noqa: E402
from lora_ms.adapters.methods import METHODS  # noqa: E402
from lora_ms.cli import flags, main  # noqa: E402
from lora_ms.cli.parser import TOOLS  # noqa: E402
from lora_ms.config.callbacks import CALLBACKS  # noqa: E402
from lora_ms.config.model import OPTIONS, PetConfig, method_keys  # noqa: E402
from lora_ms.config.schema import RunConfig, key_of, without_effect  # noqa: E402
from lora_ms.objectives import OBJECTIVES  # noqa: E402

WORDS = {
    "en": {
        "made": "Made from the code by `scripts/make_reference.py`; do not edit.",
        "cli": "Command line",
        "cli_about": "`lora-ms COMMAND --help` prints those that the command uses. A flag overrides the YAML; without "
        "it, the YAML's value holds. In the tables, a default stands in parentheses at the end of the text.",
        "shared": "Flags of the commands with a configuration",
        "shared_about": "They belong to {commands}, and to `run_mindformer.py`.",
        "own": "Besides the [flags of every command with a configuration](#{anchor}):",
        "no_own": "It has the [flags of every command with a configuration](#{anchor}).",
        "flag": "flag",
        "meaning": "meaning",
        "yaml": "YAML keys",
        "yaml_about": "Sections and keys are MindFormers'; *(ours)* marks those that MindFormers does not have. "
        "An unknown key is an error that names the nearest one. How YAML, flags and `--options` combine: "
        "[configuration](configuration.md).",
        "key": "key",
        "type": "type",
        "default": "default",
        "required": "required",
        "from_files": "from the model",
        "pet": "`pet_type` chooses the method; a key of another method is an error. The last column lists the methods "
        "that have the key.",
        "methods": "methods",
        "callbacks": "A list; each entry names its `type`.",
        "objectives": "A list of extra terms of the loss; each entry names its `type`. "
        "See [learning without forgetting](forgetting.md).",
        "no_effect": "Accepted for MindFormers, without effect here:",
        "python": "Python interface",
        "python_about": "Every name can be imported from `lora_ms`. Shapes use *b* for rows, *s* for tokens, *v* for "
        "the vocabulary. Errors that a caller can cause are `LoraMsError`, with one line that says what to do.",
        "args": "Arguments",
        "returns": "Returns",
        "raises": "Raises",
        "field": "argument",
    },
    "zh": {
        "made": "由 `scripts/make_reference.py` 从代码生成，请勿手工修改。",
        "cli": "命令行",
        "cli_about": "`lora-ms 命令 --help` 输出该命令用到的参数（程序的帮助文字是英文）。未给出的参数取 YAML 中的值；"
        "命令行参数优先于 YAML。表中括号里的值是默认值。",
        "shared": "带配置的命令共有的参数",
        "shared_about": "适用于 {commands}，以及 `run_mindformer.py`。",
        "own": "除[共有的参数](#{anchor})之外：",
        "no_own": "只有[共有的参数](#{anchor})。",
        "flag": "参数",
        "meaning": "含义",
        "yaml": "YAML 配置项",
        "yaml_about": "各节与各键沿用 MindFormers 的写法；标有 *(ours)* 的是本项目增加的。未知的键会报错，"
        "并提示最接近的键。"
        "YAML、命令行参数与 `--options` 的优先次序见[配置](configuration.zh.md)。",
        "key": "键",
        "type": "类型",
        "default": "默认值",
        "required": "必填",
        "from_files": "取自模型",
        "pet": "`pet_type` 选择方法；写了其他方法的键会报错。最后一列是拥有该键的方法。",
        "methods": "方法",
        "callbacks": "列表，每一项用 `type` 区分。",
        "objectives": "附加的损失项，列表，每一项用 `type` 区分，见[学新不忘旧](forgetting.zh.md)。",
        "no_effect": "为兼容 MindFormers 而接受、在这里不起作用的键：",
        "python": "Python 接口",
        "python_about": "以下名称都可以从 `lora_ms` 导入。形状中 *b* 是行数，*s* 是 token 数，*v* 是词表大小。"
        "调用者可能引起的错误都是 `LoraMsError`，一行文字说明该怎么做。",
        "args": "参数",
        "returns": "返回",
        "raises": "异常",
        "field": "参数",
    },
}
KINDS = {  # what a YAML type is called
    values.Flag: "True or False",
    values.Whole: "whole number",
    values.Number: "number",
    values.WholeOrNumber: "number",
    values.Text: "text",
    values.Path: "path",
    values.Folder: "folder",
    values.Texts: "list of texts",
    values.Reports: "list of names",
    values.Targets: "modules",
    values.Regex: "regular expression",
    values.Exclusions: "modules",
    values.Layers: "layers",
    values.Scaling: "number or mapping",
    values.TokenIds: "token number, or a list",
    values.Memory: 'size, as "59GB"',
    values.Recompute: "True, False, a number of layers, or layers",
}


def cell(text: str) -> str:
    """``text`` in one cell of a Markdown table; ``code`` in backticks stays as it is."""
    text = re.sub(r"\{\{(\w+)\}\}", r"`{{\1}}`", text.replace("``", "`").replace("|", r"\|").replace("\n", " "))
    parts = text.split("`")
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;").replace("(ours)", "*(ours)*") for part in parts[::2]]
    return "`".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- comments and signatures, as the source has them


@cache
def comments_of(owner: type) -> dict[str, str]:
    """The comment of every field of a class: behind it, or in the lines above it."""
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except OSError:  # made by pydantic.create_model, from a dataclass of this name
        return comments_of(made_from()[owner.__name__]) if owner.__name__ in made_from() else {}
    notes: dict[int, tuple[str, bool]] = {}  # line -> its comment, and whether the line holds nothing else
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            notes[token.start[0]] = (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
    found = {}
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above, line = [], node.lineno - 1
        while line in notes and notes[line][1]:
            above.insert(0, notes[line][0])
            line -= 1
        behind = [notes[place][0] for place in range(node.lineno, (node.end_lineno or 0) + 1) if place in notes]
        found[node.target.id] = " ".join(filter(None, [*above, *behind])).removeprefix("fmt: skip")
    return found


@cache
def made_from() -> dict[str, type]:
    """The dataclasses of options that sections of ``pet_config`` are made from, by name."""
    parts = [each for key in OPTIONS.values() for each in get_args(key.type)]
    entries = [each for each in parts if isinstance(each, type) and dataclasses.is_dataclass(each)]
    return {entry.__name__: entry for entry in entries}


def comment_of(owner: type, name: str) -> str:
    """The comment of a field, from the class or from the one that it inherits it from."""
    for base in owner.__mro__:
        if base.__module__.startswith("lora_ms") and base is not PetConfig:
            text = comments_of(base).get(name, "")
            if text:
                return text
    return ""


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(Path(sys.modules[module].__file__ or "").read_text())


def signature(function: Any) -> str:
    """``name(arguments) -> result`` as written in the source, with ``self`` left out."""
    line = inspect.unwrap(function).__code__.co_firstlineno
    for node in ast.walk(tree_of(function.__module__)):
        starts = (
            {node.lineno, *(each.lineno for each in node.decorator_list)} if isinstance(node, ast.FunctionDef) else ()
        )
        if isinstance(node, ast.FunctionDef) and node.name == function.__name__ and line in starts:
            arguments = re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))
            result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            return f"{arguments}\0{result}"
    raise LookupError(function)


def folded(name: str, arguments: str, result: str) -> str:
    """A signature as Python code of at most about 100 columns."""
    line = f"{name}({arguments}){result}"
    if len(line) <= 100:
        return line
    depth, parts, part = 0, [], ""
    for sign in arguments:
        depth += sign in "([{"
        depth -= sign in ")]}"
        if sign == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += sign
    return f"{name}(\n" + "".join(f"    {each},\n" for each in [*parts, part.strip()]) + f"){result}"


# --- the command line


def meaning(action: argparse.Action) -> str:
    return cell(action.help or "")


def flag_rows(actions: list[argparse.Action]) -> list[list[str]]:
    rows = []
    for action in actions:
        if action.help == argparse.SUPPRESS or not action.option_strings or "--help" in action.option_strings:
            continue
        value = "" if action.nargs == 0 else f" {action.metavar or '|'.join(map(str, action.choices or ()))}"
        more = {"+": " …", "?": ""}.get(str(action.nargs), "")
        rows.append([f"`{', '.join(action.option_strings)}{value}{more}`".replace("|", r"\|"), meaning(action)])
    return rows


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def cli_page(words: dict[str, str]) -> Iterator[str]:
    parser, leaves = main.build_parser()
    configured = {name: leaves[name] for name in main.COMMANDS}
    first = argparse.ArgumentParser()
    flags.add_flags(first)
    common = {action.dest for action in first._actions}
    head = [words["flag"], words["meaning"]]
    yield f"# {words['cli']}"
    yield words["cli_about"]
    for name, command in leaves.items():
        yield f"## lora-ms {name}"
        yield (
            f"{(command.description or '').partition(': ')[2]}"[:1].upper()
            + (command.description or "").partition(": ")[2][1:]
        )
        own = [action for action in command._actions if name in TOOLS or action.dest not in common]
        rows = flag_rows(own)
        if name not in TOOLS:
            yield words["own" if rows else "no_own"].format(anchor="shared-flags")
        else:
            yield f"```text\n{command.format_usage().removeprefix('usage: ').strip()}\n```"
        if rows:
            yield table(head, rows)
        notes = main.combination_methods() if name == "adapters combine" else command.epilog if name in TOOLS else ""
        if notes:
            yield f"```text\n{notes}\n```"
    yield f'<a id="shared-flags"></a>\n\n## {words["shared"]}'
    yield words["shared_about"].format(commands=", ".join(f"`{name}`" for name in configured))
    for group in first._action_groups:
        rows = flag_rows(group._group_actions)
        if rows:
            yield f"### {(group.title or '').capitalize()}"
            yield table(head, rows)
    yield first.epilog or ""


# --- the YAML


def kind_of(kind: Any) -> str:
    """What YAML may hold, in words."""
    for known, name in KINDS.items():
        if kind == known:
            return name
    if get_origin(kind) is Annotated:
        for known, name in KINDS.items():
            if get_args(known)[1:2] == get_args(kind)[1:2]:
                return name
        return kind_of(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(kind_of(each) for each in get_args(kind) if each is not type(None))
    origin = get_origin(kind) or kind
    if origin in (list, tuple):
        inner = get_args(kind)[:1]
        section = inner and isinstance(inner[0], type) and issubclass(inner[0], BaseModel)
        return "list of mappings" if section else "list"
    if isinstance(origin, type) and issubclass(origin, BaseModel):
        return "mapping"
    return {dict: "mapping", str: "text", int: "whole number", float: "number", bool: "True or False"}.get(
        origin, "value"
    )


def yaml_kind(field: FieldInfo) -> str:
    known = [each for each in KINDS if get_args(each)[1:2] and get_args(each)[1] in field.metadata]
    text = KINDS[known[0]] if known else kind_of(field.annotation)
    bounds = {type(each).__name__: each for each in field.metadata}
    low = bounds.get("Ge") and f"at least {bounds['Ge'].ge}" or bounds.get("Gt") and f"above {bounds['Gt'].gt}"
    high = bounds.get("Le") and f"at most {bounds['Le'].le}" or bounds.get("Lt") and f"below {bounds['Lt'].lt}"
    return ", ".join(filter(None, [text, low, high]))


def yaml_default(field: FieldInfo, words: dict[str, str]) -> str:
    if field.is_required():
        return words["required"]
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ("", [], {}) else cell(f"`{value}`")


def inner_sections(kind: Any) -> list[type[BaseModel]]:
    """The sections that a field's type holds, in lists and mappings as well."""
    if isinstance(kind, type) and get_origin(kind) is None:
        return [kind] if issubclass(kind, BaseModel) else []
    return [section for each in get_args(kind) for section in inner_sections(each)]


def key_rows(section: type[BaseModel], path: str, words: dict[str, str]) -> tuple[list[list[str]], list[str], list]:
    """Rows of the keys with an effect; keys without one; (path, section) of the sections below."""
    rows, idle, below = [], [], []
    for name, field in section.model_fields.items():
        key = key_of(name, field)
        if without_effect(field):
            idle.append(key)
            continue
        inner = inner_sections(field.annotation)
        plain = isinstance(field.annotation, type) and get_origin(field.annotation) is None and bool(inner)
        if key == "pet_config":
            continue
        if inner and key not in ("callbacks", "objectives"):
            mark = "" if plain else "[]" if get_origin(field.annotation) is list else ".*"
            below += [(f"{path}{key}{mark}", each) for each in inner]
        if plain:
            continue
        text = cell(comment_of(section, name))
        rows.append([f"`{key}`", cell(yaml_kind(field)), yaml_default(field, words), text])
    return rows, idle, below


def section_text(path: str, section: type[BaseModel], words: dict[str, str]) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    rows, idle, below = key_rows(section, prefix, words)
    if path:
        yield f"## {path}"
        about = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].replace("``", "`")
        text = re.sub(r"^`[\w.]+`(, `[\w.]+`)*( \(ours\))?[:.]? ?", "", about)
        yield text[:1].upper() + text[1:]
    if rows:
        yield table([words["key"], words["type"], words["default"], words["meaning"]], rows)
    if idle:
        yield f"{words['no_effect']} {', '.join(f'`{key}`' for key in idle)}."
    for inner_path, inner in below:
        yield from section_text(inner_path, inner, words)


def pet_text(words: dict[str, str]) -> Iterator[str]:
    rows = []
    for name, field in PetConfig.model_fields.items():
        if without_effect(field):
            continue
        owners = [method for method, config in METHODS.items() if name in method_keys(config)]
        text = comment_of(PetConfig.__mro__[1], name) or next(
            filter(
                None, (comment_of(METHODS[method], name) or argument_text(METHODS[method], name) for method in owners)
            ),
            "",
        )
        everywhere = not owners or len(owners) == len(METHODS)
        which = "" if everywhere else ", ".join(owners)
        rows.append([f"`{name}`", cell(yaml_kind(field)), yaml_default(field, words), cell(text), which])
    yield "## model.model_config.pet_config"
    yield words["pet"]
    head = [words["key"], words["type"], words["default"], words["meaning"], words["methods"]]
    yield table(head, rows)
    idle = [name for name, field in PetConfig.model_fields.items() if without_effect(field)]
    yield f"{words['no_effect']} {', '.join(f'`{key}`' for key in idle)}."
    for key, section in pet_sections():
        yield from section_text(f"model.model_config.pet_config.{key}[]", section, words)


def pet_sections() -> list[tuple[str, type[BaseModel]]]:
    return [
        (name, inner) for name, field in PetConfig.model_fields.items() for inner in inner_sections(field.annotation)
    ]


def yaml_page(words: dict[str, str]) -> Iterator[str]:
    yield f"# {words['yaml']}"
    yield words["yaml_about"]
    yield from section_text("", RunConfig, words)
    yield from pet_text(words)
    yield "## callbacks"
    yield words["callbacks"]
    for name, callback in CALLBACKS.items():
        yield from section_text(f"callbacks[] {name}", callback, words)
    yield "## objectives"
    yield words["objectives"]
    for name, term in OBJECTIVES.items():
        yield from section_text(f"objectives[] {name}", term, words)


# --- Python


def argument_text(owner: type, name: str) -> str:
    """What a docstring's ``Args:`` says of an argument."""
    for base in owner.__mro__:
        found = re.search(rf"^ +{name}: ((?:.|\n)*?)(?=^ {{0,8}}\w+:|\n\n|\Z)", base.__doc__ or "", re.M)
        if found and base.__module__.startswith("lora_ms"):
            return " ".join(found[1].split())
    return ""


def docstring(text: str | None, words: dict[str, str]) -> str:
    """A docstring with Args, Returns and Raises as lists."""
    out: list[str] = []
    section = ""
    for line in inspect.cleandoc(text or "").replace("``", "`").splitlines():
        title = re.fullmatch(r"(Args|Returns|Raises):(.*)", line)
        if title:
            section = title[1]
            out += ["", f"**{words[section.lower()]}**", ""]
            if title[2]:
                out.append(title[2].strip())
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(":")
            out.append(f"- `{name}`:{rest}" if colon and re.fullmatch(r"[\w*., /]+", name) else f"- {line.strip()}")
        elif section and line.strip():
            out.append(f"  {line.strip()}" if line.startswith(" ") else line)
            section = section if line.startswith(" ") else ""
        else:
            out.append(line)
    return "\n".join(out).strip()


def function_text(name: str, function: Any, words: dict[str, str]) -> str:
    arguments, _, result = signature(function).partition("\0")
    return f"```python\n{folded(name, arguments, result)}\n```\n\n{docstring(function.__doc__, words)}"


def public_methods(owner: type) -> Iterator[tuple[str, Any]]:
    """Its own public methods and properties with a docstring, in the order of the source; of settings and of the LoRA
    cell none, as theirs are for the program itself."""
    if owner.__name__.endswith(("Config", "Dense", "Arguments")):
        return
    for name, member in vars(owner).items():
        if name.startswith("_") and name != "__call__":
            continue
        plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if getattr(plain if not isinstance(plain, property) else plain.fget, "__doc__", None):
            yield name, plain


def class_text(name: str, owner: type, words: dict[str, str]) -> Iterator[str]:
    yield docstring(owner.__doc__, words)
    fields = getattr(owner, "__dataclass_fields__", {})
    if fields and "Args:" not in (owner.__doc__ or ""):
        rows = []
        for field in fields.values():
            if field.name.startswith("_"):
                continue
            default = field.default if str(field.default) != "<dataclasses._MISSING_TYPE object>" else ""
            shown = (
                "" if default == "" or "MISSING" in repr(default) or "object at" in repr(default) else f"`{default!r}`"
            )
            text = comment_of(owner, field.name) or argument_text(owner, field.name)
            rows.append([f"`{field.name}`", cell(shown), cell(text)])
        yield table([words["field"], words["default"], words["meaning"]], rows)
    elif "__init__" in vars(owner) and not fields:
        arguments, _, _ = signature(owner.__init__).partition("\0")
        yield f"```python\n{folded(name, arguments, '')}\n```"
    for method, member in public_methods(owner):
        if isinstance(member, property):
            yield f"### {name}.{method}\n\n{docstring(member.__doc__, words)}"
        elif inspect.isfunction(inspect.unwrap(member)):
            title = f"{name}.{method}" if method != "__call__" else f"{name}(…)"
            shown = "model" if method == "__call__" else f"{name}.{method}"
            yield f"### {title}\n\n{function_text(shown, inspect.unwrap(member), words)}"


def python_page(words: dict[str, str]) -> Iterator[str]:
    from lora_ms.python.model import ModelForCausalLM
    from lora_ms.python.peft_model import PeftModel

    yield f"# {words['python']}"
    yield words["python_about"]
    names = [*lora_ms.MODULES, *(config.__name__ for config in METHODS.values())]
    for name in sorted(dict.fromkeys(names)):
        thing = getattr(lora_ms, name)
        yield f"## {name}"
        if inspect.isfunction(thing):
            yield function_text(name, thing, words)
        else:
            yield from class_text(name, thing, words)
    assert PeftModel  # its model is this class, which is no name of the package
    yield "## ModelForCausalLM"
    yield from class_text("ModelForCausalLM", ModelForCausalLM, words)


PAGES = {"cli": cli_page, "yaml": yaml_page, "python": python_page}


def pages() -> dict[str, str]:
    """File name in docs/ -> the text that belongs there."""
    made = {}
    for name, page in PAGES.items():
        for language, suffix in (("en", ""), ("zh", ".zh")):
            other = f"[中文](reference-{name}.zh.md)" if language == "en" else f"[English](reference-{name}.md)"
            parts = [part.strip() for part in page(WORDS[language])]
            parts[1:1] = [other, WORDS[language]["made"]]
            made[f"reference-{name}{suffix}.md"] = "\n\n".join(filter(None, parts)) + "\n"
    return made


def write(argv: list[str]) -> int:
    assert flags  # the tables that the parser is built from
    differ = []
    for name, text in pages().items():
        file = ROOT / "docs" / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            differ.append(name)
            if "--check" not in argv:
                file.write_text(text, encoding="utf-8")
    for name in differ:
        print("differs from the code:" if "--check" in argv else "wrote", f"docs/{name}")
    return 1 if differ and "--check" in argv else 0


if __name__ == "__main__":
    raise SystemExit(write(sys.argv[1:]))
