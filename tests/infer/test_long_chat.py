"""A conversation that grows compiles nothing more."""

import builtins
import json
import shutil
from pathlib import Path

import pytest

from lora_ms.cli.main import main
from lora_ms.infer.generate import Speaker
from lora_ms.nn.graph import Graph

TURNS = 10


@pytest.fixture
def long_model(tmp_path) -> Path:
    """The bundled model, with room for 2,048 tokens."""
    folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[2] / "examples/tiny/model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


def test_ten_turns_compile_two_graphs(long_model, monkeypatch, capsys, graph_mode):
    """Up to 1,500 tokens, whatever the lengths of questions and answers are."""
    lines = iter([f"{turn}: " + "who is this and what can you do " * (7 + turn % 4 * 4) for turn in range(TURNS)])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    compiled: list[str] = []
    lengths: list[int] = []
    about_to_compile, limit = Graph.check_names, Speaker.limit

    def noted(graph: Graph) -> None:
        compiled.append(type(graph).__name__)
        about_to_compile(graph)

    def measured(speaker: Speaker, prompt, *others) -> int:
        lengths.append(len(prompt))
        return limit(speaker, prompt, *others)

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(Graph, "check_names", noted)
    monkeypatch.setattr(Speaker, "limit", measured)
    assert main(["chat", "--load_checkpoint", str(long_model), "--max_new_tokens", "24"]) == 0
    with capsys.disabled():
        print(f"\na chat with prompts of {lengths} tokens compiled {len(compiled)} graphs")
    assert len(lengths) == TURNS and lengths == sorted(lengths) and lengths[-1] > 1400
    assert len(compiled) == 2
