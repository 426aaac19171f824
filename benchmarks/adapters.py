"""What kinds of adapters cost, here and in PEFT: DoRA's training step against LoRA's, and a batch whose rows use three
adapters and none against one in which all use the same. Float32 on the CPU, same weights and rows.

python benchmarks/adapters.py --torch_python PYTHON_WITH_TORCH_AND_PEFT
"""

import json
import os
import sys
import time

import numpy as np
from common import parser, peak_rss_mb, run_sides, table

FIGURES = {
    "lora_ms": "LoRA step, median, ms",
    "dora_ms": "DoRA step, median, ms",
    "dora_per_lora": "DoRA / LoRA",
    "single_ms": "logits, one adapter, ms",
    "mixed_ms": "logits, three and none, ms",
    "mixed_per_single": "mixed / single",
    "peak_mb": "peak memory, MB",
}
RANK, ALPHA, TARGETS = 16, 32, ["q_proj", "k_proj", "v_proj", "o_proj"]
NAMES = ["a", "b", "c", "__base__"]


def in_turn(calls: dict, times: int) -> dict[str, float]:
    """Median milliseconds of each call, after one to warm up; the calls take turns, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(times + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


def ours(args, ids: np.ndarray) -> dict[str, float]:
    import mindspore as ms
    from mindspore import Tensor

    import lora_ms
    from lora_ms.train.gradient import MicroStep
    from lora_ms.train.optimizer import FlatAdamW
    from lora_ms.train.parts import SummedLoss

    index = np.arange(ids.size).reshape(ids.shape)[:, :-1].ravel().astype(np.int32)
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    batch = [Tensor(ids), Tensor(positions), Tensor(index), Tensor(ids[:, 1:].ravel())]

    def stepper(use_dora: bool):
        config = lora_ms.LoraConfig(RANK, ALPHA, target_modules=TARGETS, use_dora=use_dora)
        peft = lora_ms.get_peft_model(lora_ms.AutoModelForCausalLM.from_pretrained(args.model), config)
        model = peft.model.set_train(True)
        parameters = [p for p in model.get_parameters() if p.requires_grad]
        optimizer = FlatAdamW(parameters, operators=model.operators)
        micro = MicroStep(SummedLoss(model, args.vocab), optimizer)

        def step():
            micro(*batch)
            optimizer(Tensor(1e-4, ms.float32), Tensor(index.size, ms.float32))[0].asnumpy()

        return step

    steps = {"lora_ms": stepper(False), "dora_ms": stepper(True)}
    result = in_turn(steps, args.times)
    steps.clear()
    peft = lora_ms.PeftModel(lora_ms.AutoModelForCausalLM.from_pretrained(args.model))
    for name in NAMES[:3]:
        peft.add_adapter(name, lora_ms.LoraConfig(RANK, ALPHA, target_modules=TARGETS))
    runs = {
        "single_ms": lambda: peft(Tensor(ids)).asnumpy(),
        "mixed_ms": lambda: peft(Tensor(ids), adapter_names=NAMES).asnumpy(),
    }
    return {**result, **in_turn(runs, args.times)}


def torch(args, ids: np.ndarray) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    ids = torch.tensor(ids, dtype=torch.long)

    def fresh(**kwargs):
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **kwargs)
        return get_peft_model(base, config, adapter_name="a"), config

    def stepper(use_dora: bool):
        model, _ = fresh(use_dora=use_dora)
        trainable = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)

        def step():
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    result = in_turn({"lora_ms": stepper(False), "dora_ms": stepper(True)}, args.times)
    model, config = fresh()
    for name in NAMES[1:3]:
        model.add_adapter(name, config)
    model.set_adapter("a")
    model.eval()
    with torch.no_grad():
        runs = {
            "single_ms": lambda: model(input_ids=ids),
            "mixed_ms": lambda: model(input_ids=ids, adapter_names=NAMES),
        }
        return {**result, **in_turn(runs, args.times)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--seq", type=int, default=256)
    arguments.add_argument("--times", type=int, default=9)
    args = arguments.parse_args()
    if not args.side:
        table(run_sides(os.path.abspath(__file__), args, sys.argv[1:]), FIGURES)
        return
    ids = np.random.default_rng(1).integers(0, args.vocab, (args.batch, args.seq)).astype(np.int32)
    result = {"ours": ours, "torch": torch}[args.side](args, ids)
    result["dora_per_lora"] = result["dora_ms"] / result["lora_ms"]
    result["mixed_per_single"] = result["mixed_ms"] / result["single_ms"]
    result["peak_mb"] = peak_rss_mb()
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
