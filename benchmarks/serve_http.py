"""Requests for many adapters over HTTP, as S-LoRA measures them: Poisson arrivals, adapters by a power law, streams.

python benchmarks/serve_http.py --adapters 1 4 16 --rate 4 --seconds 30

For each number of adapters a server of its own, with the model of ``--model`` and random adapters. Prints tokens per
second, and over those of the first number of adapters, and the time to the first token and between tokens at p50, p95,
p99, as clients see them. With ``--clients N`` in place of a rate, N clients ask without a pause.
"""

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import write_adapter

PERCENTS = (50, 95, 99)


@dataclass
class Seen:
    """What clients have seen so far."""

    first: list[float] = field(default_factory=list)  # seconds to the first token
    between: list[float] = field(default_factory=list)  # seconds from token to token
    tokens: int = 0
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def ask(port: int, name: str, tokens: int, prompt: int, seen: Seen) -> None:
    """One stream of ``tokens`` tokens after a prompt of ``prompt``."""
    ids = [random.randrange(3, 1000) for _ in range(prompt)]
    body = {"model": name, "prompt": ids, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body["return_token_ids"] = True  # a chunk for every token, or for several whose text is one character
    began = last = time.perf_counter()
    first, count, between = 0.0, 0, []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
        while (line := response.readline()) != b"data: [DONE]\n":
            if not line.startswith(b"data: "):
                if not line:
                    raise ValueError("the stream has no end")
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            now, new = time.perf_counter(), len(chunk["choices"][0]["token_ids"])
            if not count:
                first = now - began
            elif new:
                between += [(now - last) / new] * new
            count, last = count + new, now
        if count != tokens:
            raise ValueError(f"{count} tokens in place of {tokens}")
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        with seen.lock:
            seen.faults.append(f"{type(error).__name__}: {error}")
        return
    finally:
        connection.close()
    with seen.lock:
        seen.first.append(first)
        seen.between += between
        seen.tokens += count


def names_by_power_law(count: int, exponent: float) -> tuple[list[str], list[float]]:
    """Names of adapters, and how often each is asked."""
    return [f"a{i}" for i in range(count)], [(i + 1) ** -exponent for i in range(count)]


def load(port: int, count: int, args: argparse.Namespace, seen: Seen) -> float:
    """Asks for ``args.seconds``; returns the seconds until the last answer has ended."""
    names, shares = names_by_power_law(count, args.exponent)
    began = time.perf_counter()

    def one() -> None:
        tokens, prompt = (random.randint(args.shortest, args.longest) for _ in range(2))
        ask(port, random.choices(names, shares)[0], tokens, prompt, seen)

    def client() -> None:
        while time.perf_counter() - began < args.seconds:
            one()

    threads = []
    if args.clients:
        threads = [threading.Thread(target=client) for _ in range(args.clients)]
        for thread in threads:
            thread.start()
    while not args.clients and time.perf_counter() - began < args.seconds:
        time.sleep(random.expovariate(args.rate))
        threads.append(threading.Thread(target=one))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def started(args: argparse.Namespace, folder: Path, count: int) -> tuple[subprocess.Popen, int]:
    """A server with ``count`` adapters, and its port."""
    modules = [f"a{i}={folder / f'a{i}'}" for i in range(count)]
    flags = ["--load_checkpoint", args.model, "--port", "0", "--max-num-seqs", str(args.rows), "--max-waiting", "10000"]
    command = [sys.executable, "-m", "lora_ms.cli", "serve", *flags, "--lora-modules", *modules]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.match(r"ready: http://127\.0\.0\.1:(\d+)", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, int(found[1])
    raise SystemExit("the server did not start")


def main() -> None:
    """Prints a line for each number of adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/tiny/model")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="requests that run at once")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--clients", type=int, default=0, help="so many that ask without a pause, in place of --rate")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--exponent", type=float, default=1.0, help="of the power law of the adapters' shares")
    parser.add_argument("--shortest", type=int, default=8, help="tokens of a prompt, and of an answer")
    parser.add_argument("--longest", type=int, default=128)
    args = parser.parse_args()
    print(
        "adapters  tokens/s  / first  answers  faults  first token p50/p95/p99, ms  "
        "between tokens p50/p95/p99, ms  memory, MB"
    )
    of_first = 0.0
    with tempfile.TemporaryDirectory() as name:
        for i in range(max(args.adapters)):
            write_adapter(Path(args.model), Path(name) / f"a{i}", args.rank, i, ("q_proj", "v_proj"))
        for count in args.adapters:
            random.seed(count)
            server, port = started(args, Path(name), count)
            seen = Seen()
            try:
                load(port, count, argparse.Namespace(**{**vars(args), "seconds": 1.0}), Seen())  # both sides warm
                taken = load(port, count, args, seen)
                first, between = (
                    "/".join(f"{1000 * value:.0f}" for value in np.percentile(values or [0.0], PERCENTS))
                    for values in (seen.first, seen.between)
                )
                rate = seen.tokens / taken
                of_first = of_first or rate
                print(
                    f"{count:8}  {rate:8.1f}  {rate / of_first:7.2f}  {len(seen.first):7}  {len(seen.faults):6}  "
                    f"{first:>27}  {between:>30}  {memory_mb(server.pid):10.1f}",
                    flush=True,
                )
                for line in sorted({*seen.faults})[:5]:
                    print(f"  {line}")
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait()


if __name__ == "__main__":
    main()
