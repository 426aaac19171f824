"""docs/numbers.md is what benchmarks/all.py makes of the results that are kept; it knows every benchmark."""

import importlib.util
import json
import sys

import pytest


@pytest.fixture(scope="module")
def everything(root):
    sys.path.insert(0, str(root / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmarks_all", root / "benchmarks/all.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(root / "benchmarks"))
    return module


def test_the_pages_are_those_of_the_results(everything, root):
    results = json.loads(everything.RESULTS.read_text("utf-8"))
    for language, name in (("en", "numbers.md"), ("zh", "numbers.zh.md")):
        assert (root / "docs" / name).read_text("utf-8") == everything.page(results, language)


def test_every_benchmark_is_run(everything, root):
    files = {file.stem for file in (root / "benchmarks").glob("*.py")} - {"all", "common", "same_numbers"}
    assert files == {name.split()[0] for name in everything.PROGRAMS}
