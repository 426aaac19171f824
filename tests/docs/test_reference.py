"""The reference pages are what scripts/make_reference.py makes of the code; every public name and key is on them."""

import importlib.util
import re

import pytest

import lora_ms


@pytest.fixture(scope="module")
def pages(root):
    spec = importlib.util.spec_from_file_location("make_reference", root / "scripts/make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_committed_pages_are_those_of_the_code(pages, root):
    differ = [name for name, text in pages.items() if (root / "docs" / name).read_text("utf-8") != text]
    assert not differ, f"{differ}: run python scripts/make_reference.py"


def test_no_name_is_left_out(pages):
    from lora_ms.cli.main import MODULES
    from lora_ms.config.schema import RunConfig

    assert {f"## lora-ms {name}" for name in MODULES} <= {*pages["reference-cli.md"].splitlines()}
    assert {f"## {name}" for name in lora_ms.__all__} <= {*pages["reference-python.md"].splitlines()}
    shown = {
        *re.findall(r"`(\w+)`", pages["reference-yaml.md"]),
        *re.findall(r"^## ([\w.]+)", pages["reference-yaml.md"], re.M),
    }
    assert {name for name in RunConfig.model_fields} <= {each.split(".")[0] for each in shown}
