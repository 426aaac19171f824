"""How a server begins and ends: killed, ended in the middle of an answer, and started where it cannot be."""

import signal
import socket
import threading
import time

import openai
import pytest

from lora_ms.cli.main import main

QUESTION = [{"role": "user", "content": "Hi friend!"}]
LONG = {"ignore_eos": True, "max_tokens": 300}


def test_killed_then_started_with_a_key_then_ended_in_the_middle_of_an_answer(start):
    killed = start("--max-num-seqs", "4").ready()
    lost = []

    def ask() -> None:
        with pytest.raises((OSError, Exception)):
            lost.append(killed.chat(**LONG))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    killed.process.kill()
    thread.join()
    assert (killed.process.wait(), lost) == (-signal.SIGKILL, [])

    again = start("--max-num-seqs", "4", "--port", str(killed.port), env={"LORA_MS_API_KEY": "a-secret"}).ready()
    assert again.port == killed.port
    check_key(again)
    with openai.OpenAI(base_url=again.url, api_key="a-secret", max_retries=0) as client:
        stream = iter(client.chat.completions.create(model="model", messages=QUESTION, stream=True, extra_body=LONG))
        next(stream), next(stream)
        again.process.send_signal(signal.SIGTERM)
        refused(again.port)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) > 100
    assert again.process.wait(10) == 0
    assert "a-secret" not in again.said() and "Traceback" not in again.said()


def check_key(server) -> None:
    """Without the key, or with another, nothing is told."""
    assert server.ask("GET", "/health").status == server.ask("GET", "/").status == 200
    for path in ("/v1/models", "/metrics", "/v1//models", "/api/model"):
        assert server.ask("GET", path).status == 401
        for wrong in ("Bearer wrong", "Bearer a-secret-", "a-secret", "Basic a-secret", "Bearer \xff"):
            assert server.ask("GET", path, headers={"Authorization": wrong}).status == 401
        assert server.ask("GET", path, headers={"Authorization": "Bearer a-secret"}).status == 200
    assert server.chat().status == 401
    assert server.ask("POST", "/v1/load_lora_adapter", {}).status == 401
    asked = {"Authorization": "Bearer a-secret"}
    assert server.ask("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/"}, asked).status == 403


def refused(port: int) -> None:
    """Waits until no connection is taken."""
    end = time.monotonic() + 1
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "99999"], "--port 99999 is out of range"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0 is out of range: give 1 to 1024"),
        (["--lora-modules", "nameless"], "--lora-modules expects NAME=DIR"),
        (["--lora-modules", "a=x", "a=y"], "--lora-modules names 'a' twice"),
        (["--lora-modules", "../a=x"], "'../a' is no name for a model"),
        (["--adapter-folders", "/no/such"], "--adapter-folders: /no/such is not a folder"),
        (["--lora-module", "a=x"], "unknown flag --lora-module; the nearest is --lora-modules"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, said, capsys):
    assert main(["serve", "--load_checkpoint", "examples/tiny/model", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_port_that_is_taken_is_said_before_the_model_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--load_checkpoint", "examples/tiny/model", "--port", str(port)]) == 2
    assert f"--host 127.0.0.1 --port {port}: Address already in use: give another" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    from lora_ms.commands import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main(["serve", "--load_checkpoint", "examples/tiny/model"]) == 2
    assert "pip install 'lora_ms[serve]'" in capsys.readouterr().err
