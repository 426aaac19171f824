"""A QLoRA step: ours against PEFT with bitsandbytes, and against our own LoRA in float32. NF4, double quantisation.

LoRA of rank 16 on all seven projections, 8 rows of 128 tokens, every token a label, on the CPU. Of a model's folder, or
of random weights in the shape of Qwen2-0.5B (without its biases). The sides run in turn, each in a process of its own.

python benchmarks/qlora.py --folder MODEL --torch_python PYTHON_WITH_TORCH_PEFT_AND_BITSANDBYTES
python benchmarks/qlora.py --torch_python … [--bfloat16]
"""

import tempfile
from pathlib import Path

import numpy as np
from common import parser, run_side, write_model

SHAPE = {"layers": 24, "hidden": 896, "heads": 14, "kv_heads": 2, "ffn": 4864, "vocab": 151_936, "tied": True}
SIDES = {"ours, NF4": ("ours", True), "ours, float32": ("ours", False), "PEFT, NF4": ("torch", True)}
RATIOS = (("ours, NF4", "PEFT, NF4"), ("ours, NF4", "ours, float32"))


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(**SHAPE, rounds=1)
    arguments.add_argument("--steps", type=int, default=5)
    arguments.add_argument("--bfloat16", action="store_true", help="whole weights, and products, in bfloat16")
    args = arguments.parse_args()
    script = str(Path(__file__).with_name("train_step.py"))
    words = ["--all_linear", "--batch", "8", "--seq", "128", "--steps", str(args.steps)]
    words += ["--folder", args.folder] if args.folder else ["--vocab", str(args.vocab)]
    words += ["--bfloat16"] if args.bfloat16 else []
    found: dict[str, list[dict]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        if not args.folder:
            write_model(args, Path(folder))
        for _ in range(args.rounds):
            for name, (side, four_bits) in SIDES.items():
                more = ["--four_bits", "nf4-double"] if four_bits else []
                found[name].append(run_side(script, side, args.torch_python, [*words, *more], folder))
                print(f"{name:14} {found[name][-1]}", flush=True)
    medians = {
        name: {key: float(np.median([result[key] for result in results])) for key in ("step_ms", "peak_mb")}
        for name, results in found.items()
    }
    print(f"\n{'':34}{'step':>8}{'peak':>8}")
    for one, other in RATIOS:
        step, peak = (medians[one][key] / medians[other][key] for key in ("step_ms", "peak_mb"))
        print(f"{one + ' / ' + other:34}{step:8.2f}{peak:8.2f}")


if __name__ == "__main__":
    main()
