"""Fine-tuning on instruction rows, ours against torch + PEFT with the usual collator: same weights, rows and steps.

10,000 made-up rows with the lengths of real instruction data (half have fewer than 90 tokens, the longest 2,000; the
rows beyond --seq are dropped on both sides), or those of --data, in the chat template of --folder; a step of --batch x
--accumulation rows, --steps steps of one epoch. The other side pads each micro-batch to its longest row and computes
all logits, as transformers' Trainer does; with --sort it takes the rows of a step by their lengths.

    python benchmarks/sft_throughput.py --torch_python PYTHON_WITH_TORCH_AND_PEFT
    python benchmarks/sft_throughput.py --torch_python … --folder MODEL --data ALPACA.json --batch 8 --accumulation 2
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
    "label_tokens_per_second": "label tokens per second",
    "padding": "padding, share of the slots",
    "seconds": "seconds for the steps",
    "label_tokens": "label tokens",
    "first_step_s": "process start to first step, s",
    "peak_mb": "peak memory, MB",
    "loss": "loss of the last step",
}
RANK, ALPHA, TARGETS = 16, 32, ["q_proj", "k_proj", "v_proj", "o_proj"]
ROWS = 10_000


def rows(args) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of the rows that fit; the first fifth to three fifths of a made-up row is its prompt."""
    if args.data:
        return real_rows(args)
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(90), 0.85, ROWS)), 12, 2000).astype(int)
    prompts = np.maximum(1, (lengths * rng.uniform(0.2, 0.6, ROWS)).astype(int))
    made = []
    for length, prompt in zip(lengths, prompts, strict=True):
        ids = rng.integers(0, args.vocab, length).astype(np.int32)
        labels = ids.copy()
        labels[:prompt] = -100
        if length <= args.seq:
            made.append((ids, labels))
    return made


def real_rows(args) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of the rows of an Alpaca file; the answers are learnt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    made = []
    for row in json.loads(Path(args.data).read_text()):
        question = [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))}]
        texts = (
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template([*question, {"role": "assistant", "content": row["output"]}], tokenize=False),
        )
        prompt, ids = (np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32) for text in texts)
        labels = ids.copy()
        labels[: len(prompt)] = -100
        if len(ids) <= args.seq:
            made.append((ids, labels))
    return made


def order(args, count: int) -> np.ndarray:
    """Rows of each step of the epoch, [steps, rows], the same on both sides, which take the first of them."""
    per_step = args.batch * args.accumulation
    mixed = np.random.default_rng(1).permutation(count)
    return mixed[: count // per_step * per_step].reshape(-1, per_step)


def ours(args):
    """Yields (loss, label tokens, tokens fed, tokens computed) of one step after another, by the training loop's own
    parts."""
    import mindspore as ms
    from mindspore import Tensor

    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.data.example import TokenRow
    from lora_ms.data.loader import DataPlan, device_steps
    from lora_ms.models.hub import load_directory
    from lora_ms.runtime.device import setup
    from lora_ms.train.gradient import MicroStep
    from lora_ms.train.optimizer import FlatAdamW
    from lora_ms.train.parts import SummedLoss

    runtime, _ = setup("CPU")
    model = load_directory(args.model, operators=runtime.operators)
    inject(model, LoraConfig(RANK, ALPHA, 0.0, TARGETS))
    model.set_train(True)
    parameters = [p for p in model.get_parameters() if p.requires_grad]
    optimizer = FlatAdamW(parameters, operators=runtime.operators)
    micro = MicroStep(SummedLoss(model, args.vocab), optimizer)
    data = rows(args)
    taken = order(args, len(data)).ravel()
    plan = DataPlan.build(
        [TokenRow(str(i), *data[i]) for i in taken],
        batch_size=args.batch,
        accumulation=args.accumulation,
        epochs=1,
        seed=0,
        shuffle=False,
        pad_id=0,
        seq_length=args.seq,
        max_steps=args.steps,
        kind=args.layout,
        padding_cost=runtime.operators.padding_cost,
    )
    print(plan.describe(), file=sys.stderr)
    for shape in plan.layout.shapes:  # every shape is compiled before the clock starts
        blank = np.zeros((shape.lines, shape.length), np.int32)
        slots = np.zeros(shape.capacity, np.int32)
        micro(Tensor(blank), Tensor(blank), Tensor(slots), Tensor(slots - 100)).asnumpy()
    optimizer(Tensor(0.0, ms.float32), Tensor(1.0, ms.float32))[0].asnumpy()
    yield None
    for batches, _, count in device_steps(plan, 0):
        losses = [micro(*batch[:4]) for batch in batches]
        optimizer(Tensor(1e-4, ms.float32), Tensor(count, ms.float32))[0].asnumpy()
        computed = sum(batch[0].size for batch in batches)
        yield sum(float(loss.asnumpy()) for loss in losses) / count, count, computed
    print(plan.padding(), file=sys.stderr)


def torch(args):
    """The same by PEFT; the loss of a step is that of all its label tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    ).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    data = rows(args)
    steps = [[data[i] for i in step] for step in order(args, len(data))[: args.steps]]

    def run(step):
        count = sum(int((labels[1:] != -100).sum()) for _, labels in step)
        total, computed = 0.0, 0
        if args.sort:
            step = sorted(step, key=lambda row: len(row[0]))
        for start in range(0, len(step), args.batch):
            chunk = step[start : start + args.batch]
            longest = max(len(ids) for ids, _ in chunk)
            ids, labels = np.zeros((len(chunk), longest), np.int64), np.full((len(chunk), longest), -100, np.int64)
            mask = np.zeros((len(chunk), longest), np.int64)
            for number, (row, row_labels) in enumerate(chunk):
                ids[number, : len(row)], labels[number, : len(row)], mask[number, : len(row)] = row, row_labels, 1
            tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
            loss = model(**{k: torch.from_numpy(v) for k, v in tensors.items()}, num_items_in_batch=count).loss
            loss.backward()
            total, computed = total + float(loss), computed + ids.size
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, count, computed

    run([(ids[:64], labels[:64]) for ids, labels in steps[0][: args.batch] if len(ids) > 64][:2] or steps[0][:1])
    yield None
    for step in steps:
        yield run(step)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--accumulation", type=int, default=4)
    arguments.add_argument("--seq", type=int, default=1024)
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--layout", choices=("packed", "bucketed", "padded"), default="packed")
    arguments.add_argument(
        "--data", type=os.path.abspath, help="rows with instruction, input and output, in place of made-up ones"
    )
    arguments.add_argument("--sort", action="store_true", help="torch takes the rows of a step by their lengths")
    args = arguments.parse_args()
    if not args.side:
        table(run_sides(os.path.abspath(__file__), args, sys.argv[1:]), FIGURES)
        return
    if args.side == "ours":
        start_with_huge_pages()  # as the command line does
    steps = {"ours": ours, "torch": torch}[args.side](args)
    next(steps)
    first, begun = time.time() - float(os.environ["LORA_MS_START"]), time.perf_counter()
    done = list(steps)
    seconds = time.perf_counter() - begun
    data = rows(args)
    taken = order(args, len(data))[: args.steps].ravel()
    fed = sum(len(data[i][0]) for i in taken)
    if args.side == "ours":
        fed -= len(taken)  # the last token of a row is a target only
    labels = sum(count for _, count, _ in done)
    result = {
        "label_tokens_per_second": labels / seconds,
        "padding": 1 - fed / sum(computed for *_, computed in done),
        "seconds": seconds,
        "label_tokens": labels,
        "first_step_s": first,
        "peak_mb": peak_rss_mb(),
        "loss": done[-1][0],
    }
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
