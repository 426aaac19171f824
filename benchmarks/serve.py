"""The engine alone: 8 requests at once against one after another, beginnings that are shared, adapters in the rows.

python benchmarks/serve.py --layers 12 --hidden 1024 --ffn 2816 --vocab 32000
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from common import parser, peak_rss_mb, write_model


def seconds(engine, requests) -> float:
    """Of all requests, submitted at once, after everything was forgotten."""
    engine.forget()
    begun = time.perf_counter()
    engine.answers(requests)
    return time.perf_counter() - begun


def first_token(engine, request) -> float:
    """Seconds until the first token of a request."""
    begun = time.perf_counter()
    engine.submit(request)
    next(engine.run())
    found = time.perf_counter() - begun
    engine.cancel_all()
    return found


def adapters(folder: Path, model, count: int, rank: int) -> list[Path]:
    """Folders of ``count`` random adapters on all layers."""
    from lora_ms import LoraConfig
    from lora_ms.adapters.inject import adapted_layers, inject
    from lora_ms.adapters.peft_format import save_adapter

    config = LoraConfig(rank, 16.0, target_modules="all-linear")
    inject(model, config)
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number)
        for cell in adapted_layers(model).values():
            cell.lora_b.asnumpy()[:] = rng.standard_normal(cell.lora_b.shape) * 0.02
        paths.append(folder / f"adapter_{number}")
        paths[-1].mkdir()
        save_adapter(model, paths[-1], config)
    return paths


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=8)
    arguments.add_argument("--prompt", type=int, default=32)
    arguments.add_argument("--new", type=int, default=64)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--adapters", type=int, nargs="*", default=[1, 4, 16])
    arguments.add_argument("--repeat", type=int, default=3)
    args = arguments.parse_args()
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the command line sets it; see lora_ms/cli/main.py
    from lora_ms.adapters.multi_adapter import AdapterPool
    from lora_ms.infer.engine import Engine, Request
    from lora_ms.models.hub import load_directory
    from lora_ms.runtime.device import setup

    runtime, _ = setup("CPU")
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.folder or name)
        if not args.folder:
            write_model(args, folder)

        def model():
            return load_directory(folder, operators=runtime.operators)

        def engine_of(rows: int, pool=None, on=None) -> Engine:
            engine = Engine(on or model(), rows, length=1024, adapters=pool)
            engine.warm()
            return engine

        vocab = model().config.vocab_size

        def prompt(tokens: int) -> tuple[int, ...]:
            return tuple(rng.integers(3, vocab, tokens).tolist())

        def rate(engine, names) -> float:
            """Tokens a second, the median of several times."""
            times = []
            for _ in range(args.repeat):
                requests = [Request(prompt(args.prompt), args.new, adapter=name) for name in names]
                times.append(seconds(engine, requests))
            return len(names) * args.new / float(np.median(times))

        result = {}
        bare = [None] * args.rows
        one = engine_of(1)
        result["one_after_another"] = rate(one, bare)
        del one
        engine = engine_of(args.rows)
        result["one_in_8_rows"] = rate(engine, [None])
        result["at_once"] = rate(engine, bare)
        result["gain"] = result["at_once"] / result["one_after_another"]
        system = prompt(512)
        result["prompt_of_576_ms"] = 1e3 * first_token(engine, Request((*system, *prompt(64)), 1))
        running = engine.submit(Request((*system, *prompt(64)), 300))
        engine.step()
        engine.step()
        result["beginning_of_512_copied_ms"] = 1e3 * first_token(engine, Request((*system, *prompt(64)), 1))
        engine.cancel(running)
        begun = time.perf_counter()
        engine.graphs.copy(0, 1, 0)
        result["copy_of_a_piece_ms"] = 1e3 * (time.perf_counter() - begun)
        del engine
        paths = adapters(Path(name), model(), max(args.adapters, default=0), args.rank)
        for count in args.adapters:
            there = model()
            pool = AdapterPool(there, args.rows, count, args.rank)
            engine = engine_of(args.rows, pool, there)
            begun = time.perf_counter()
            for number, path in enumerate(paths[:count]):
                pool.load(str(number), path)
            result[f"load_of_{count}_s"] = (time.perf_counter() - begun) / count
            result[f"{count}_adapters"] = rate(engine, [str(i % count) for i in range(args.rows)])
            del engine, pool, there
    result["peak_mb"] = peak_rss_mb()
    print(json.dumps({key: round(float(value), 2) for key, value in result.items()}, indent=1))


if __name__ == "__main__":
    main()
