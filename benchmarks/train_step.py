"""A LoRA training step, ours against torch + transformers + PEFT: same weights, rows and types, on the CPU.

python benchmarks/train_step.py --labels dense --torch_python PYTHON_WITH_TORCH_AND_PEFT
python benchmarks/train_step.py --four_bits nf4-double --all_linear --batch 8 --seq 128 --folder MODEL --torch_python …
    QLoRA against PEFT with bitsandbytes, which is to be installed beside torch
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from common import parser, peak_rss_mb, run_sides, table

from lora_ms.runtime.host import start_with_huge_pages

FIGURES = {
    "step_ms": "step, median, ms",
    "best_ms": "step, best, ms",
    "tokens_per_second": "tokens per second",
    "peak_mb": "peak memory, MB",
    "first_step_s": "process start to first step, s",
    "loss": "loss of the last step",
}
RANK, ALPHA, TARGETS = 16, 32, ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def rows(args) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels [batch, seq]; of each row all tokens, or the last third, carry labels."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, args.vocab, (args.batch, args.seq)).astype(np.int32)
    labels = ids.copy()
    if args.labels == "third":
        labels[:, : args.seq - args.seq // 3] = -100
    return ids, labels


def ours(args):
    """Yields the loss of one step after another."""
    import mindspore as ms
    from mindspore import Tensor

    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.data.example import TokenRow
    from lora_ms.data.loader import DataPlan
    from lora_ms.models.hub import load_directory
    from lora_ms.quant.settings import read_quantisation
    from lora_ms.runtime.device import setup
    from lora_ms.train.gradient import MicroStep
    from lora_ms.train.optimizer import FlatAdamW
    from lora_ms.train.parts import SummedLoss

    runtime, _ = setup("CPU", graph_kernel=args.graph_kernel, bfloat16=args.bfloat16)
    quantisation = read_quantisation(args.four_bits) if args.four_bits else None
    dtype = ms.bfloat16 if args.bfloat16 else ms.float32
    model = load_directory(args.model, dtype, operators=runtime.operators, quantisation=quantisation)
    inject(model, LoraConfig(RANK, ALPHA, args.dropout, TARGETS))
    model.set_train(True)
    parameters = [p for p in model.get_parameters() if p.requires_grad]
    optimizer = FlatAdamW(parameters, operators=runtime.operators)
    micro = MicroStep(SummedLoss(model, args.vocab), optimizer, args.recompute)
    data = [TokenRow(str(i), *pair) for i, pair in enumerate(zip(*rows(args), strict=True))]
    plan = DataPlan.build(
        data, batch_size=args.batch, accumulation=1, epochs=1, seed=0, shuffle=False, pad_id=0, seq_length=args.seq
    )
    (batch,), count = plan.step(0)
    micro.prepare(*map(Tensor, batch[:4]))
    while True:
        loss = micro(*map(Tensor, batch[:4]))
        norm, _ = optimizer(Tensor(1e-4, ms.float32), Tensor(count, ms.float32))
        norm.asnumpy()
        yield float(loss.asnumpy()) / count


def torch(args):
    """The same by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(os.cpu_count())
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    four_bits = None
    if args.four_bits:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=args.four_bits == "nf4-double",
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, quantization_config=four_bits)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=args.dropout, target_modules=TARGETS)
    model = get_peft_model(model, config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    ids, labels = (torch.tensor(a, dtype=torch.long) for a in rows(args))
    while True:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--labels", choices=("dense", "third"), default="dense")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--seq", type=int, default=256)
    arguments.add_argument("--steps", type=int, default=15)
    arguments.add_argument("--dropout", type=float, default=0.0)
    arguments.add_argument("--graph_kernel", action="store_true", help="our side with context.enable_graph_kernel")
    arguments.add_argument("--recompute", action="store_true", help="our side with recompute_config.recompute")
    arguments.add_argument("--four_bits", choices=("nf4", "nf4-double"), help="the layers' weights in four bits")
    arguments.add_argument("--bfloat16", action="store_true", help="whole weights, and products, in bfloat16")
    arguments.add_argument("--all_linear", action="store_true", help="adapters on all seven projections of a layer")
    args = arguments.parse_args()
    if args.all_linear:
        TARGETS.extend(FEED_FORWARD)
    if args.folder and args.side:
        args.model = args.folder
        args.vocab = json.loads((Path(args.folder) / "config.json").read_text())["vocab_size"]
    if not args.side:
        table(run_sides(os.path.abspath(__file__), args, sys.argv[1:]), FIGURES)
        return
    if args.side == "ours":
        start_with_huge_pages()  # as the command line does
    steps = {"ours": ours, "torch": torch}[args.side](args)
    next(steps)
    first, seconds = time.time() - float(os.environ["LORA_MS_START"]), []
    for _ in range(args.steps):
        begun = time.perf_counter()
        loss = next(steps)
        seconds.append(time.perf_counter() - begun)
    median = float(np.median(seconds))
    result = {
        "step_ms": 1e3 * median,
        "best_ms": 1e3 * min(seconds),
        "tokens_per_second": args.batch * args.seq / median,
        "peak_mb": peak_rss_mb(),
        "first_step_s": first,
        "loss": loss,
    }
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
