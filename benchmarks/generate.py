"""Greedy generation, ours against transformers' ``generate``: same weights, prompt and type, on the CPU; with
``--dtype nf4`` ours has weights of four bits, and transformers float32.

python benchmarks/generate.py --torch_python PYTHON_WITH_TORCH_AND_TRANSFORMERS
"""

import json
import os
import sys
import time

import numpy as np
from common import parser, peak_rss_mb, run_sides, table

FIGURES = {
    "tokens_per_second": "tokens per second after the first",
    "first_token_ms": "prompt to first token, ms",
    "peak_mb": "peak memory, MB",
    "start_s": "process start to first answer, s",
}


def ours(args, prompts: list[list[int]]):
    """Returns a function that generates once and gives the time of each token and the tokens."""
    import mindspore as ms

    from lora_ms.infer.generate import Generator
    from lora_ms.models.hub import load_directory
    from lora_ms.quant.settings import Quantisation
    from lora_ms.runtime.device import setup

    runtime, _ = setup("CPU")
    four_bits = Quantisation() if args.dtype == "nf4" else None
    dtype = ms.float32 if four_bits else getattr(ms, args.dtype)
    generator = Generator(load_directory(args.model, dtype, operators=runtime.operators, quantisation=four_bits))

    def run():
        times = []
        new = generator.generate(prompts, args.new, on_token=lambda row, _: row or times.append(time.perf_counter()))
        return times, new

    return run


def torch(args, prompts: list[list[int]]):
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

    torch.set_num_threads(os.cpu_count())
    dtype = torch.float32 if args.dtype == "nf4" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    ids = torch.tensor(prompts)

    class Clock(LogitsProcessor):
        def __call__(self, input_ids, scores):
            self.times.append(time.perf_counter())
            return scores

    def run():
        clock = Clock()
        clock.times = []
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
        )
        return clock.times, out[:, ids.shape[1] :].tolist()

    return run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", choices=("float32", "float16", "nf4"), default="float32", help="of the weights")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--prompt", type=int, default=64)
    arguments.add_argument("--new", type=int, default=128)
    arguments.add_argument("--repeat", type=int, default=5)
    args = arguments.parse_args()
    if not args.side:
        results = run_sides(os.path.abspath(__file__), args, sys.argv[1:])
        table(results, FIGURES)
        print("same tokens:", len({json.dumps(r["tokens"]) for side in results.values() for r in side}) == 1)
        return
    prompts = np.random.default_rng(2).integers(0, args.vocab, (args.batch, args.prompt)).tolist()
    run = {"ours": ours, "torch": torch}[args.side](args, prompts)
    run()
    start, rates, first = time.time() - float(os.environ["LORA_MS_START"]), [], []
    for _ in range(args.repeat):
        begun = time.perf_counter()
        times, new = run()
        rates.append(args.batch * (len(times) - 1) / (times[-1] - times[0]))
        first.append(1e3 * (times[0] - begun))
    result = {"tokens_per_second": np.median(rates), "first_token_ms": np.median(first)}
    result |= {"peak_mb": peak_rss_mb(), "start_s": start}
    print(json.dumps({**{key: round(float(value), 2) for key, value in result.items()}, "tokens": new[0][:24]}))


if __name__ == "__main__":
    main()
