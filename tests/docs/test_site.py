"""The site's links and tree; and that each page has its twin in the other language, with the same commands."""

import re
import subprocess

import pytest

PAIRS = {"README.md": "README_CN.md"}
SENTENCE = re.compile(r'"[^"{}\[\]:,]*[?!。？！]"')  # of a question in English or Chinese
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)


def pairs(root):
    found = dict(PAIRS)
    for page in sorted((root / "docs").glob("*.md")):
        if not page.name.endswith(".zh.md"):
            found[f"docs/{page.name}"] = f"docs/{page.stem}.zh.md"
    return found


def commands_of(text: str) -> list[str]:
    """Commands, Python and YAML of a page, without comments and sentences, which are in its language."""
    blocks = [body for kind, body in FENCE.findall(text) if kind in ("bash", "python", "yaml")]
    lines = [re.sub(r"(^| +)# .*$", "", line.strip()) for body in blocks for line in body.splitlines()]
    lines = [SENTENCE.sub('"…"', line) for line in lines]
    return [re.sub(r" +", " ", line) for line in lines if line]


def test_a_page_and_its_twin_hold_the_same_commands(root):
    for page, twin in pairs(root).items():
        assert (root / twin).is_file(), f"{page} has no {twin}"
        here, there = (commands_of((root / name).read_text("utf-8")) for name in (page, twin))
        assert here == there, f"{page} and {twin} differ"


def test_links_to_the_other_language_and_to_files(root):
    for page, twin in pairs(root).items():
        for name in (page, twin):
            folder = (root / name).parent
            for target in re.findall(r"(?<!!)\[[^\]\n]+\]\(([^)\s#]+)", (root / name).read_text("utf-8")):
                if not target.startswith("http"):
                    assert (folder / target).exists(), f"{name}: {target}"


def test_readme_is_short(root):
    for name in ("README.md", "README_CN.md"):
        assert len((root / name).read_text("utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_the_site_builds(root, python, python_env, tmp_path):
    argv = [python, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(argv, cwd=root, env=python_env | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/zh/index.html").is_file()
