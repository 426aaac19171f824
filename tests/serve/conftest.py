"""A server on the tiny model with two adapters, in a process of its own, and ways to talk to it."""

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/tiny/model"
READ_TIMEOUT = 1.0  # seconds
MAX_BODY = 200_000  # bytes
QUESTION = [{"role": "user", "content": "Hi friend!"}]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Running:
    """A server's process."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None, log: Path):
        command = [sys.executable, "-m", "lora_ms.cli", "serve", "--load_checkpoint", str(MODEL), "--port", "0", *flags]
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.port = 0

    def ready(self, seconds: float = 120.0) -> "Running":
        """Waits until it listens."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(r"ready: http://127\.0\.0\.1:(\d+)", self.said())
            if found:
                self.port = int(found[1])
                return self
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready:\n{self.said()}")

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def says(self, text: str) -> None:
        """Waits for a line of the log: it is written after the answer."""
        end = time.monotonic() + 2
        while text not in self.said():
            assert time.monotonic() < end, f"{text!r} is not in the log:\n{self.said()[-2000:]}"
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 30.0
    ) -> Reply:
        """One request; a body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = {} if body is None else {"Content-Type": "application/json"}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            response = connection.getresponse()
            text = response.read().decode("utf-8")
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, text)
        finally:
            connection.close()

    def chat(self, **body: Any) -> Reply:
        return self.ask("POST", "/v1/chat/completions", {"messages": QUESTION, **body})

    def number(self, name: str) -> float:
        """Of /metrics, the sum over its labels."""
        lines = self.ask("GET", "/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{| )", line))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def write_adapter(folder: Path, rank: int, seed: int, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Path:
    """A PEFT adapter of the tiny model, whose answers differ from the model's."""
    from safetensors.numpy import save_file

    sizes = {"q_proj": 224, "k_proj": 112, "v_proj": 112, "o_proj": 224}
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(4):
        for name in targets:
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.3, (rank, 224)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.1, (sizes[name], rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> Path:
    """A folder with the adapters one, two and three; three has a chat template of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("one", "two", "three"), 1):
        write_adapter(folder / name, rank=2 * number, seed=number)
    (folder / "three/chat_template.jinja").write_text("{% for m in messages %}({{ m.content }}){% endfor %}")
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Iterator[Callable[..., Running]]:
    """``start(*flags)``: another server, not ready yet; ended with the tests."""
    started: list[Running] = []

    def begin(*flags: str, env: dict[str, str] | None = None) -> Running:
        started.append(Running(*flags, env=env, log=tmp_path_factory.mktemp("server") / "log"))
        return started[-1]

    yield begin
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start, adapters) -> Running:
    """The server that all tests but those of its end share: the model ``tiny``, the adapters ``one`` and ``two``."""
    return start(
        *("--served-model-name", "tiny", "tiny-alias"),
        *("--lora-modules", f"one={adapters / 'one'}", f"two={adapters / 'two'}"),
        *("--adapter-folders", str(adapters), "--max-num-seqs", "4", "--max-waiting", "8"),
        *("--max-body-bytes", str(MAX_BODY), "--read-timeout", str(READ_TIMEOUT), "--request-timeout", "60"),
        *("--allowed-origins", "http://localhost:3000", "--allowed-hosts", "proxy.example"),
    ).ready()
