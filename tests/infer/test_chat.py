"""A conversation at the terminal with the bundled model."""

import builtins
from pathlib import Path

import pytest

from lora_ms.cli.main import main
from lora_ms.commands.chat import fit_history
from lora_ms.data.example import Message

MODEL = "examples/tiny/model"


class Lengths:
    """A speaker of which only the lengths matter: ten tokens a message."""

    max_length, max_new_tokens = 100, 60

    def prompt_length(self, history: list[Message]) -> int:
        return 10 * len(history)


def test_the_oldest_turns_make_room():
    history = [Message("user", str(i)) for i in range(9)]
    assert fit_history(Lengths(), history) == 4  # 50 tokens of prompt at most
    assert [message.content for message in history] == ["4", "5", "6", "7", "8"]


@pytest.fixture
def typed(monkeypatch, request):
    lines = iter(request.param)

    def answer(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", answer)


@pytest.mark.parametrize(
    "typed", [["Who are you?", "/help", "/reset", "", "Who are you?", "/exit", "never"]], indirect=True
)
def test_a_conversation(typed, capsys, monkeypatch, graph_mode):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["chat", "--load_checkpoint", MODEL, "--max_new_tokens", "24"]) == 0
    out = capsys.readouterr().out.splitlines()
    help_line = "/reset forgets the conversation, /exit leaves"
    first, again = out[1], out[4]
    assert out == [f"chat: {help_line}", first, help_line, "forgotten", again]
    assert first == again and "Tiny" in first
