"""The commands and the Python of README.md and docs/, run as they stand: in a folder like the repository, where the
bundled model has one layer, datasets have few rows, and every model's name is that model's.

A command is run once, or is one of ``NOT_RUN``, with the reason why; of these, too, lora-ms's own go as far as the
configuration: flags, keys and values are right.
"""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# pages whose commands read what those of others have written come after them
FIRST = ("README.md", "docs/start.md", "docs/finetune.md", "docs/use-adapter.md")
PAGES = [
    *FIRST,
    *(
        name
        for name in (f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))
        if not name.endswith(".zh.md") and name not in FIRST
    ),
]
NEEDS = {"docs/use-adapter.md": "docs/finetune.md"}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)

NOT_RUN = {
    r"bash scripts/quickstart\.sh": "downloads packages: tests/scripts runs the script, tests/examples what it starts",
    r"bash scripts/test\.sh|make (quick|check)": "it is what runs the tests",
    r"source \.venv": "the reader's environment",
    r"pip install": "needs a package index",
    r"lora-ms eval .*--tasks mine\.yaml": "the reader's own task: tests/serve/test_lm_eval.py has one",
    r"lm_eval run": "asks a server: tests/serve/test_lm_eval.py runs it",
    r"bash scripts/msrun_launcher\.sh": "several processes, or cards: tests/scripts/test_ranks.py starts two and four",
    r"bash scripts/orangepi_env\.sh": "limits the memory of the machine: tests/scripts/test_orangepi_env.py",
    r"bash scripts/ascend_report\.sh": "tests/scripts/test_ascend_report.py runs it",
    r"tail -f": "never ends",
    r"mkdocs serve|LORA_MS_API_KEY=|lora-ms serve": "a server: tests/serve",
    r"curl ": "asks a server: tests/serve",
    r"lora-ms doctor": "starts processes: tests/commands/test_doctor.py",
    r"lora-ms download": "needs a hub: tests/commands/test_download.py has one of its own",
    r"lora-ms export gguf .*--with_base": "the stand-in's tokenizer has no name in llama.cpp: tests/gguf writes models",
    r"lora-ms convert model\.gguf": "tests/gguf converts files",
    r"lora-ms convert": "needs a checkpoint of MindFormers: tests/bridge/test_convert.py",
    r".*--backend mindformers": "needs MindFormers: tests/bridge",
    r".*(/path/to/| run\.yaml| lora_llama2_7b\.yaml)": "a model of full size",
    r"lora-ms (fisher|finetune) --config configs/tiny/hybrid_tiny": "minutes: tests/commands/test_forgetting.py",
    r"lora-ms estimate --config": "a YAML with the sizes of a full model: tests/commands/test_estimate.py",
    r"python benchmarks/": "minutes to hours, beside torch",
    r"python scripts/make_reference\.py": "tests/docs/test_reference.py",
}
NOT_RUN_PYTHON = {
    "docs/from-peft.md": "tests/python/test_from_peft.py runs it, here and in torch",
    "docs/serve.md": "asks a server: tests/serve",
}


def commands_of(page: str) -> list[str]:
    """The commands of a page, each in one line without its comment."""
    found = []
    for kind, body in FENCE.findall((ROOT / page).read_text("utf-8")):
        if kind == "bash" or not kind and body.startswith("lora-ms "):
            for line in re.sub(r"\\\n\s*", "", body).splitlines():
                line = re.sub(r"(^|\s+)# .*$", "", line.strip())
                found += [line] if line else []
    return found


def reason_not_run(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), None)


def own_words(command: str) -> list[str] | None:
    """``["finetune", "--config", …]`` of a command of lora-ms, also inside a launcher's; None for another's."""
    words = shlex.split(command)
    if words[:2] == ["bash", "scripts/msrun_launcher.sh"]:
        words = shlex.split(words[2])
    elif words[:2] == ["bash", "scripts/orangepi_env.sh"]:
        words = words[words.index("lora-ms") :]
    words = [word for word in words if "=" not in word or word != words[0]]
    if words[:1] == ["python"]:
        words = words[1:]
    return words if words[:1] in (["lora-ms"], ["run_mindformer.py"]) and "…" not in words else None


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder in which the commands are run."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "scripts", "run_mindformer.py"):
        (folder / name).symlink_to(ROOT / name)
    model = folder / "examples/tiny/model"
    shutil.copytree(ROOT / "examples/tiny/model", model)
    one_layer(model)
    for file in [*ROOT.glob("examples/*.jsonl"), *ROOT.glob("examples/tiny/*.jsonl")]:
        lines = file.read_text("utf-8").splitlines(keepends=True)
        (folder / file.relative_to(ROOT)).write_text("".join(lines[:16]), "utf-8")
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "DIR", "MODEL"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(model)
    (folder / "DATA").mkdir()
    for name in ("DATA/rows.jsonl", "rows.json"):
        (folder / name).symlink_to(ROOT / "examples/ten_rows.jsonl")
    for name in ("run.yaml", "lora_llama2_7b.yaml"):
        (folder / name).symlink_to(ROOT / "configs/llama2/lora_llama2_7b.yaml")
    return folder


def one_layer(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "max_window_layers": 1}))
    [file] = model.glob("*.safetensors")
    kept = {name: value for name, value in load_file(file).items() if not re.search(r"layers\.[1-9]", name)}
    save_file({name: np.ascontiguousarray(value) for name, value in kept.items()}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def ran() -> dict[str, int]:
    """Commands that have been run, with their status."""
    return {}


@pytest.fixture
def run_page(work, ran, monkeypatch, capsys):
    from lora_ms.cli import main

    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(page: str) -> None:
        if page in NEEDS:
            run(NEEDS[page])
        for command in commands_of(page):
            if command in ran or reason_not_run(command):
                continue
            words = own_words(command)
            assert words is not None, f"{page}: {command!r} is neither run here nor one of NOT_RUN"
            monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n/exit\n"))
            if words[0] == "lora-ms":
                ran[command] = main.main(words[1:])
            else:
                ran[command] = main.run_mindformer(words[1:])
            said = capsys.readouterr()
            assert ran[command] == 0, f"{page}: {command}\n{said.out[-2000:]}{said.err[-2000:]}"

    return run


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(run_page, page):
    run_page(page)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in (ROOT / page).read_text("utf-8")])
def test_the_python_of_a_page(work, monkeypatch, page):
    if page in NOT_RUN_PYTHON or page.startswith("docs/reference"):
        return
    monkeypatch.chdir(work)
    names: dict = {}
    for kind, body in FENCE.findall((ROOT / page).read_text("utf-8")):
        if kind == "python":
            exec(compile(body, page, "exec"), names)


def test_what_is_not_run_has_right_flags_and_keys(work, monkeypatch, capsys):
    """As far as the configuration; what would follow is left out."""
    from lora_ms.cli import main
    from lora_ms.recipes import download

    class Nothing:
        @staticmethod
        def run(*_, **__):
            return 0

    monkeypatch.chdir(work)
    monkeypatch.setattr(main, "import_module", lambda name: Nothing)
    monkeypatch.setattr(main, "_fetch_named", lambda given: None)
    monkeypatch.setattr(main, "_base_of", lambda adapter: "MODEL")
    monkeypatch.setattr(download, "fetch_named", lambda config, command: None)
    for page in PAGES:
        for command in filter(reason_not_run, commands_of(page)):
            words = own_words(command)
            if words is not None:
                status = (main.main if words[0] == "lora-ms" else main.run_mindformer)(words[1:])
                assert status == 0, f"{page}: {command}\n{capsys.readouterr().err}"


def test_each_reason_is_of_a_command():
    commands = [command for page in PAGES for command in commands_of(page)]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in commands), pattern
