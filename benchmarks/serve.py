"""Answers for many adapters in one call, ours against PEFT's, which switches adapters from batch to batch; and ours:
8 requests at once against one after another, and 4, 16 and 64 adapters against one.

python benchmarks/serve.py --torch_python PYTHON_WITH_TORCH_AND_PEFT --folder MODEL
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import parser, peak_rss_mb, run_sides, table, write_adapter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def median_rates(calls, tokens: int, repeat: int) -> list[float]:
    """Tokens a second of each call, the median of several after one that warms up; the calls take turns, so that a
    machine which others use meanwhile slows all of them."""
    times = []
    for _ in range(repeat + 1):
        times.append([])
        for call in calls:
            begun = time.perf_counter()
            call()
            times[-1].append(time.perf_counter() - begun)
    return [tokens / float(seconds) for seconds in np.median(times[1:], axis=0)]


def median_rate(call, tokens: int, repeat: int) -> float:
    """Tokens a second of one call; see ``median_rates``."""
    return median_rates([call], tokens, repeat)[0]


def ours(args, prompts: list[list[int]], adapters: list[Path]) -> dict[str, float]:
    from lora_ms.adapters.multi_adapter import AdapterPool
    from lora_ms.infer.engine import Engine, Request
    from lora_ms.models.hub import load_directory
    from lora_ms.runtime.device import setup

    runtime, _ = setup("CPU")

    def answering(engine, count: int = 0):
        names = [str(i % count) if count else None for i in range(args.rows)]

        def call():
            engine.forget()
            engine.answers([Request(tuple(p), args.new, adapter=n) for p, n in zip(prompts, names, strict=False)])

        return call

    def engine_of(rows: int, count: int = 0) -> Engine:
        model = load_directory(Path(args.model), operators=runtime.operators)
        pool = AdapterPool(model, rows, count, args.rank) if count else None
        engine = Engine(model, rows, length=1024, adapters=pool)
        engine.warm()
        for number, folder in enumerate(adapters[:count]):
            pool.load(str(number), folder)
        return engine

    tokens = args.rows * args.new
    rates = median_rates([answering(engine_of(rows)) for rows in (1, args.rows)], tokens, args.repeat)
    result = dict(zip(("one_after_another", "at_once"), rates, strict=True))
    result["gain"] = result["at_once"] / result["one_after_another"]
    answering(engine_of(args.rows, max(args.adapters)), max(args.adapters))()
    result["peak_mb"] = peak_rss_mb()
    calls = [answering(engine_of(args.rows, count), count) for count in args.adapters]
    for count, found in zip(args.adapters, median_rates(calls, tokens, args.repeat), strict=True):
        result[f"adapters_{count}"] = found
    for count in args.adapters[1:]:
        result[f"over_one_{count}"] = result[f"adapters_{count}"] / result[f"adapters_{args.adapters[0]}"]
    return result


def torch(args, prompts: list[list[int]], adapters: list[Path]) -> dict[str, float]:
    """The same by PEFT: the rows of one adapter are a batch."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    settings = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}

    def generate(model, rows):
        return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), eos_token_id=None, **settings)

    def rate(call) -> float:
        return median_rate(call, args.rows * args.new, args.repeat)

    result = {"one_after_another": rate(lambda: [generate(base, row[None]) for row in ids])}
    result["at_once"] = rate(lambda: generate(base, ids))
    result["gain"] = result["at_once"] / result["one_after_another"]
    model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="0").eval()
    for number, folder in enumerate(adapters[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(number))

    def switched(count: int) -> None:
        for number in range(min(count, args.rows)):
            model.set_adapter(str(number))
            generate(model, ids[number::count])

    for count in args.adapters:
        result[f"adapters_{count}"] = rate(lambda count=count: switched(count))
    for count in args.adapters[1:]:
        result[f"over_one_{count}"] = result[f"adapters_{count}"] / result[f"adapters_{args.adapters[0]}"]
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=8)
    arguments.add_argument("--prompt", type=int, default=32)
    arguments.add_argument("--new", type=int, default=64)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--adapters", type=int, nargs="*", default=[1, 4, 16, 64])
    arguments.add_argument("--repeat", type=int, default=3)
    args = arguments.parse_args()
    if not args.side:
        figures = {
            "one_after_another": f"{args.rows} requests in a row, tokens/s",
            "at_once": f"{args.rows} requests at once, tokens/s",
            "gain": "at once / in a row",
            **{f"adapters_{count}": f"{count} adapters, tokens/s" for count in args.adapters},
            **{f"over_one_{count}": f"{count} adapters / {args.adapters[0]}" for count in args.adapters[1:]},
            "peak_mb": "peak memory, MB",
        }
        table(run_sides(os.path.abspath(__file__), args, sys.argv[1:]), figures)
        return
    vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    prompts = np.random.default_rng(2).integers(3, vocabulary, (args.rows, args.prompt)).tolist()
    with tempfile.TemporaryDirectory() as place:
        adapters = [Path(place) / str(number) for number in range(max(args.adapters))]
        for number, folder in enumerate(adapters):
            write_adapter(Path(args.model), folder, args.rank, number, PROJECTIONS)
        result = {"ours": ours, "torch": torch}[args.side](args, prompts, adapters)
    print(json.dumps({key: round(float(value), 3) for key, value in {"peak_mb": peak_rss_mb(), **result}.items()}))


if __name__ == "__main__":
    main()
