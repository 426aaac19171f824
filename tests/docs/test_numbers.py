"""docs/numbers.md is what benchmarks/all.py makes of the results that are kept; it knows every benchmark. The tables of
docs/forgetting.md are those of the results of benchmarks/forgetting.py."""

import importlib.util
import json
import sys

import pytest


def load(root, name):
    """The module benchmarks/NAME.py."""
    sys.path.insert(0, str(root / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", root / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(root / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def everything(root):
    return load(root, "all")


def test_the_pages_are_those_of_the_results(everything, root):
    results = json.loads(everything.RESULTS.read_text("utf-8"))
    for language, name in (("en", "numbers.md"), ("zh", "numbers.zh.md")):
        assert (root / "docs" / name).read_text("utf-8") == everything.page(results, language)


def test_every_benchmark_is_run(everything, root):
    files = {file.stem for file in (root / "benchmarks").glob("*.py")} - {"all", "common", "same_numbers"}
    assert files == {name.split()[0] for name in everything.PROGRAMS}


@pytest.mark.parametrize("results", ["forgetting_tiny", "forgetting_tasks"])
def test_the_tables_of_forgetting(root, results):
    """All rows but the titles, which each language has its own of."""
    found = load(root, "forgetting").tables(json.loads((root / f"benchmarks/{results}.json").read_text("utf-8")))
    for name in ("forgetting.md", "forgetting.zh.md"):
        page = (root / "docs" / name).read_text("utf-8").splitlines()
        assert set(found) - {line for line in found if line.startswith(("| method", "|---", "| ---"))} <= set(page)
        assert f"![]({results}.png)" in "\n".join(page)
    assert (root / f"docs/{results}.png").is_file()
