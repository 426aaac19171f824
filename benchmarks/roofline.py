"""Where a training step's time goes, by part of the model, and how near each part is to what the machine can do.

A LoRA step, float32, every token a label. The arithmetic of each part is counted from the model's sizes; the limit is
that arithmetic at the rate of torch's own matrix product on this machine, measured in the same call; the time of a part
is that of its operators in MindSpore's profile, where each layer has its own. What lies between the operators
(launches, allocations, Python) is the rest of the step, which computes the lower layers of a deep model by one
operator. Beside it torch + PEFT's step.

python benchmarks/roofline.py --folder MODEL --torch_python PYTHON_WITH_TORCH_AND_PEFT
python benchmarks/roofline.py --layers 8 --torch_python PYTHON_WITH_TORCH_AND_PEFT
"""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import train_step
from common import parser, write_model

from lora_ms.runtime.host import start_with_huge_pages

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# A part, and what the full names of its operators contain. The first that fits counts.
PARTS = {
    "attention's projections": "|".join(ATTENTION),
    "feed-forward's projections": "|".join(FEED_FORWARD),
    "attention": "attention-Attention",
    "head and loss": "finish-|LossGradients",
    "gates": "gated_silu",
    "norms": "RMSNorm",
    "optimiser": "FlatAdamW|Accumulate",
    "embedding, rotary tables": "inputs|Embed|RotaryTables|embed_tokens",
    "sums of gradients": "/Add|/AddN",
}
PROFILED = 3  # steps


# --- what there is to do


def arithmetic(config: dict, tokens: int, length: int, rank: int) -> dict[str, float]:
    """GFLOP of a step's products by part: forward and the gradients of inputs and adapters; weights are frozen.

    A multiplication with a sum is two. Attention is causal: half of its square.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    layers = config["num_hidden_layers"]

    def projections(sizes: list[tuple[int, int]]) -> float:
        """Two passes over each weight, three over each adapter: forward, of the input, of the adapter itself."""
        weights = sum(n * m for n, m in sizes)
        adapters = rank * sum(n + m for n, m in sizes)
        return 2 * tokens * layers * (2 * weights + 3 * adapters) / 1e9

    return {
        "attention's projections": projections([(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]),
        "feed-forward's projections": projections([(hidden, inner), (hidden, inner), (inner, hidden)]),
        # forward two products, backward five: the scores are computed again
        "attention": 7 * tokens * length * q * layers / 1e9,
        "head and loss": 2 * 2 * tokens * hidden * config["vocab_size"] / 1e9,
    }


# --- what is measured, each in a process of its own


def part_of(name: str) -> str:
    """The part whose operator has this full name."""
    return next((part for part, words in PARTS.items() if re.search(words, name)), "other operators")


def our_side(args) -> dict:
    """Milliseconds of a step, and of its operators by part."""
    from mindspore.profiler import profile, tensorboard_trace_handler

    from lora_ms.train import gradient

    steps = train_step.ours(args)
    next(steps)
    next(steps)
    seconds = timed(steps, args.steps)
    del steps
    # the parts of what is one operator else: the same arithmetic, by operators of their own
    with patch.object(gradient, "joined_layers", lambda *_, **__: None):
        steps = train_step.ours(args)
        next(steps)
        next(steps)
    with tempfile.TemporaryDirectory() as folder:
        watch = profile(on_trace_ready=tensorboard_trace_handler(folder))
        watch.start()
        for _ in range(PROFILED):
            next(steps)
        with contextlib.redirect_stdout(io.StringIO()):
            watch.stop()
        parts: dict[str, float] = {}
        calls = 0
        for file in Path(folder).rglob("cpu_op_detail_info_*.csv"):
            with open(file, newline="", encoding="utf-8") as stream:
                for row in csv.DictReader(stream):
                    part = part_of(row["full_op_name"])
                    parts[part] = parts.get(part, 0.0) + float(row["op_total_time(ms)"]) / PROFILED
                    calls += int(row["op_occurrences"])
    return {"step_ms": 1e3 * seconds, "parts": parts, "operators": calls / PROFILED}


def torch_side(args) -> dict:
    """Milliseconds of a step; GFLOP/s of products of the model's shapes; GB/s that are read."""
    import torch

    steps = train_step.torch(args)
    next(steps)
    seconds = timed(steps, args.steps)
    config = json.loads((Path(args.model) / "config.json").read_text())
    tokens = args.batch * args.seq
    rates = []
    for n, m in ((config["hidden_size"], config["intermediate_size"]), (2048, 2048)):
        x, weight = torch.randn(tokens, n), torch.randn(m, n)
        rates.append(2 * tokens * n * m / best(lambda x=x, weight=weight: x @ weight.t()) / 1e9)
    numbers = torch.ones(1 << 27)
    return {"step_ms": 1e3 * seconds, "rate": max(rates), "memory": 4 * len(numbers) / best(numbers.sum) / 1e9}


def timed(steps, count: int) -> float:
    """Seconds of a step, median."""
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        next(steps)
        found.append(time.perf_counter() - begun)
    return float(np.median(found))


def best(work, seconds: float = 1.0) -> float:
    """The least seconds of a call, among those that fit into ``seconds``."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or not found:
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


# --- both


def measured(args, side: str) -> dict:
    """What one side has printed last."""
    python = os.path.abspath(sys.executable if side == "ours" else args.torch_python)
    words = [word for name in ("batch", "seq", "steps", "model") for word in (f"--{name}", str(getattr(args, name)))]
    env = {**os.environ, "GLOG_v": "3", "PYTHONPATH": str(ROOT)}
    if side == "ours":
        env["OMP_NUM_THREADS"] = "1"  # as the command line sets it; see lora_ms/cli/main.py
        env["LORA_MS_GRAPH_CACHE"] = "False"  # a graph from disk has no names of cells, by which parts are told apart
    command = [python, os.path.abspath(__file__), "--side", side, "--vocab", str(args.vocab), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args) -> None:
    """Both sides of the model ``args.model``, and the table."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    args.vocab = config["vocab_size"]
    theirs, ours = measured(args, "torch"), measured(args, "ours")
    work = arithmetic(config, args.batch * args.seq, args.seq, train_step.RANK)
    rate = theirs["rate"]
    print(f"the machine: products {rate:.0f} GFLOP/s, memory {theirs['memory']:.1f} GB/s (torch)\n")
    print(f"{'part':28}{'GFLOP':>8}{'limit, ms':>11}{'ours, ms':>10}{'share':>8}")
    step, shown = ours["step_ms"], ours["parts"]
    for part in [*PARTS, "other operators"]:
        row = f"{part:28}"
        if part in work:
            limit = 1e3 * work[part] / rate
            row += f"{work[part]:8.1f}{limit:11.0f}{shown[part]:10.0f}{limit / shown[part]:8.2f}"
        else:
            row += f"{'':19}{shown.get(part, 0.0):10.0f}"
        print(row)
    print(f"{'between operators':28}{'':19}{step - sum(shown.values()):10.0f}")
    limit = 1e3 * sum(work.values()) / rate
    print(f"{'the step':28}{sum(work.values()):8.1f}{limit:11.0f}{step:10.0f}{limit / step:8.2f}")
    print(f"{'torch + PEFT':28}{'':19}{theirs['step_ms']:10.0f}{limit / theirs['step_ms']:8.2f}")
    print(f"ours / torch {step / theirs['step_ms']:.2f}; {ours['operators']:,.0f} operators a step", flush=True)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(hidden=576, heads=9, ffn=1536, vocab=49152)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--seq", type=int, default=128)
    arguments.add_argument("--steps", type=int, default=5)
    args = arguments.parse_args()
    train_step.TARGETS = [*ATTENTION, *FEED_FORWARD]
    if args.side:
        if args.side == "ours":
            start_with_huge_pages()  # as the command line does
        vars(args).update(
            labels="dense", dropout=0.0, graph_kernel=False, recompute=False, bfloat16=False, four_bits=""
        )
        print(json.dumps({"ours": our_side, "torch": torch_side}[args.side](args)))
        return
    if args.folder:
        args.model = os.path.abspath(args.folder)
        compare(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.model = folder
        write_model(args, Path(folder))
        compare(args)


if __name__ == "__main__":
    main()
