"""Many clients at once that ask, stop in the middle, go away and send nonsense: nothing may fail, stay or be lost.

python tests/serve/soak.py --requests 500 --clients 32
python tests/serve/soak.py --seconds 600 --clients 32        # prints a line every ten seconds

Starts a server of its own, with random adapters beside the model; at its end SIGTERM comes in the middle of answers.
The status is 1 where anything was found; one line of JSON says what was seen.
"""

import argparse
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = "count from one to nine who are you friend what sound does a frog make 你好 世界 15 19".split()
MOST_GROWTH = 1.02  # memory after over before
BAD = (  # bodies, and the status that each is owed
    (b"{", 400),
    (b"[]", 400),
    (b'{"messages": "x"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "n": -1}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000000}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "no-such"}', 404),
    (json.dumps({"messages": [{"role": "user", "content": "one two " * 4000}]}).encode(), 400),
)
# what a client does, and how often
KINDS = {"whole": 4, "stream": 4, "completion": 3, "stopped": 3, "gone": 2, "bad": 2}


@dataclass
class Seen:
    """What the clients have seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """Asks the server at ``port``; ``names``: the models that it serves, of so many tokens together at most."""

    def __init__(self, port: int, names: list[str], seen: Seen, rng: random.Random, longest: int = 120):
        self.port = port
        self.names = names
        self.seen = seen
        self.rng = rng
        self.longest = longest

    def ask(self, kind: str) -> None:
        """One request of this kind."""
        tokens = 0
        try:
            tokens = getattr(self, kind)()
        except (OSError, ValueError, KeyError, AssertionError, http.client.HTTPException) as error:
            with self.seen.lock:
                self.seen.faults.append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")
        with self.seen.lock:
            self.seen.kinds[kind] += 1
            self.seen.tokens += tokens

    def body(self, **more) -> dict:
        rng = self.rng
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
        body = {
            "model": rng.choice(self.names),
            "max_tokens": rng.randint(1, self.longest),
            "temperature": rng.choice([0, 1]),
        }
        body |= rng.choice([{}, {"ignore_eos": True}, {"stop": ["19"]}, {"logprobs": True}])
        return {**body, "messages": [{"role": "user", "content": text}], **more}

    def post(self, body: dict | bytes, path: str = "/v1/chat/completions") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def whole(self) -> int:
        body = self.body()
        with self.post(body) as response:
            text = response.read()
        assert response.status == 200, f"{response.status} {text[:200]!r}"
        return check_answer(json.loads(text), body)

    def completion(self) -> int:
        prompt = [self.rng.randrange(3, 2000) for _ in range(self.rng.randint(1, 150))]
        body = self.body(prompt=prompt, logprobs=self.rng.choice([None, 2]), echo=self.rng.random() < 0.3)
        del body["messages"]
        with self.post(body, "/v1/completions") as response:
            text = response.read()
        assert response.status == 200, f"{response.status} {text[:200]!r}"
        return check_answer(json.loads(text), body)

    def stream(self) -> int:
        body = self.body(stream=True, stream_options={"include_usage": True})
        with self.post(body) as response:
            assert response.status == 200, response.status
            return check_answer(last_of(response), body)

    def stopped(self) -> int:
        """Goes in the middle of a stream."""
        with self.post(self.body(stream=True, max_tokens=self.longest, ignore_eos=True)) as response:
            assert response.status == 200, response.status
            for _ in range(self.rng.randint(1, 20)):
                response.readline()
        return 0

    def gone(self) -> int:
        """Goes before anything has come, perhaps before all was sent."""
        data = json.dumps(self.body()).encode()
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        whole = "\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(whole[: self.rng.choice([len(whole), len(whole), self.rng.randrange(1, len(whole))])])
            time.sleep(self.rng.random() * 0.1)
        return 0

    def bad(self) -> int:
        data, owed = self.rng.choice(BAD)
        with self.post(data) as response:
            text = response.read()
        assert response.status == owed, f"{response.status} in place of {owed}: {text[:200]!r}"
        assert json.loads(text)["error"]["code"] == owed
        return 0


def check_answer(answer: dict, body: dict) -> int:
    """Raises AssertionError where an answer is not whole; returns its tokens."""
    usage, (choice,) = answer["usage"], answer["choices"]
    count = usage["completion_tokens"]
    assert 1 <= count <= body["max_tokens"], f"{count} tokens of {body['max_tokens']}"
    assert choice["finish_reason"] in ("stop", "length"), choice
    if choice["finish_reason"] == "length":
        assert count == body["max_tokens"], f"{count} tokens of {body['max_tokens']}, and length"
    return count


def last_of(response: http.client.HTTPResponse) -> dict:
    """A stream as one answer."""
    answer: dict = {}
    for line in response:
        if line == b"data: [DONE]\n":
            return answer
        if line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            if chunk["choices"] and chunk["choices"][0]["finish_reason"]:
                answer["choices"] = chunk["choices"]
            if chunk.get("usage"):
                answer["usage"] = chunk["usage"]
    raise AssertionError("the stream has no end")


def number(port: int, name: str) -> float:
    """Of /metrics, the sum over its labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{| )", line))


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(port: int, names: list[str], clients: int, requests: int = 0, seconds: float = 0.0, seed: int = 0) -> Seen:
    """So many requests, or seconds, of so many clients at once."""
    seen = Seen()
    began = time.monotonic()
    left = iter(range(requests))

    def client(index: int) -> None:
        rng = random.Random(seed * 1000 + index)
        own = Client(port, names, seen, rng)
        while True:
            with seen.lock:
                more = next(left, None) is not None if requests else time.monotonic() - began < seconds
            if not more:
                return
            own.ask(rng.choices([*KINDS], [*KINDS.values()])[0])

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def settled(port: int, seconds: float = 5.0) -> list[str]:
    """What still runs or waits when nobody asks any more."""
    end = time.monotonic() + seconds
    while True:
        left = {kind: number(port, f"lora_ms_requests_{kind}") for kind in ("running", "waiting")}
        if not any(left.values()):
            return []
        if time.monotonic() > end:
            return [f"{count:g} requests are still {kind}" for kind, count in left.items() if count]
        time.sleep(0.05)


def fingerprint(port: int, names: list[str], rows: int) -> list[str]:
    """Greedy answers in all rows at once: the same whenever they are asked."""
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        client = Client(port, names, Seen(), random.Random(0))
        question = [{"role": "user", "content": "Count from 15 to 19."}]
        body = {"model": names[index % len(names)], "messages": question, "max_tokens": 30}
        with client.post(body) as response:
            found[index] = json.loads(response.read())["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found.get(index, "nothing") for index in range(rows)]


def ended(server: subprocess.Popen, port: int, names: list[str], rows: int) -> list[str]:
    """SIGTERM in the middle of answers: all of them end whole, and the status is 0."""
    seen, began = Seen(), threading.Barrier(rows + 1)

    def stream() -> None:
        client = Client(port, names, seen, random.Random(1))
        body = client.body(stream=True, stream_options={"include_usage": True}, max_tokens=200, ignore_eos=True)
        body.pop("stop", None)
        try:
            with client.post(body) as response:
                response.readline()
                began.wait(30)
                check_answer(last_of(response), body)
        except (OSError, ValueError, KeyError, AssertionError, http.client.HTTPException) as error:
            seen.faults.append(f"at SIGTERM: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=stream) for _ in range(rows)]
    for thread in threads:
        thread.start()
    began.wait(30)
    server.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    status = server.wait(60)
    return seen.faults + ([f"status {status} after SIGTERM"] if status else [])


def write_adapter(model: Path, folder: Path, rank: int, seed: int) -> None:
    """A random adapter on q_proj."""
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    outputs = heads * (config.get("head_dim") or hidden // heads)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.1, (rank, hidden)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.1, (outputs, rank)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def started(args: argparse.Namespace, folder: Path) -> tuple[subprocess.Popen, int]:
    """A server, and its port."""
    for name in ("one", "two", "three"):
        write_adapter(Path(args.model), folder / name, 4, len(name))
    modules = [f"{name}={folder / name}" for name in ("one", "two", "three")]
    flags = ["--load_checkpoint", args.model, "--port", "0", "--max-num-seqs", str(args.rows)]
    command = [sys.executable, "-m", "lora_ms.cli", "serve", *flags, "--served-model-name", "base"]
    log = open(folder / "log", "w+")  # noqa: SIM115
    server = subprocess.Popen([*command, "--lora-modules", *modules], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while server.poll() is None:
        if found := re.search(r"ready: http://127\.0\.0\.1:(\d+)", (folder / "log").read_text()):
            return server, int(found[1])
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{(folder / 'log').read_text()}")


def watch(pid: int, done: threading.Event) -> None:
    """Prints memory until ``done``."""
    began = time.monotonic()
    while not done.wait(10):
        print(f"{time.monotonic() - began:6.0f} s  {memory_mb(pid):8.1f} MB", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny/model"))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="in place of a number of requests")
    parser.add_argument("--rows", type=int, default=8, help="requests that run at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names, done = ["base", "one", "two", "three"], threading.Event()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        server, port = started(args, folder)
        try:
            warm = run(port, names, args.clients, requests=6 * args.clients, seed=args.seed + 1)
            faults = warm.faults + settled(port)
            expected, before = fingerprint(port, names, args.rows), memory_mb(server.pid)
            if args.seconds:
                threading.Thread(target=watch, args=(server.pid, done), daemon=True).start()
            began = time.monotonic()
            seen = run(port, names, args.clients, args.requests, args.seconds, args.seed)
            taken = time.monotonic() - began
            faults += seen.faults + settled(port)
            if fingerprint(port, names, args.rows) != expected:
                faults.append("the same questions have other answers than before")
            after = memory_mb(server.pid)
            if after > MOST_GROWTH * before:
                faults.append(f"memory grew from {before:.1f} to {after:.1f} MB")
            faults += ended(server, port, names, args.rows)
            if "Traceback" in (folder / "log").read_text():
                faults.append("the server's log has a traceback")
        finally:
            done.set()
            server.kill()
            server.wait()
    kinds = dict(sorted(seen.kinds.items()))
    found = {
        "requests": seen.kinds.total(),
        **kinds,
        "seconds": round(taken, 1),
        "tokens_per_second": round(seen.tokens / taken),
    }
    found |= {
        "memory_before_mb": round(before, 1),
        "memory_after_mb": round(after, 1),
        "growth": round(after / before, 4),
    }
    print(json.dumps({**found, "faults": len(faults)}))
    for fault in sorted({*faults})[:20]:
        print(f"  {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
