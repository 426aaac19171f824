"""What further terms of the loss cost: a training step with EWC, and one with the contrastive term.

The steps alternate; the median of each is printed, and its ratio to the plain step of the same rows. The contrastive
term brings general rows, as many as the domain's: its step has twice the rows of the plain one, and beside it stands a
plain step of twice the rows.

python benchmarks/loss_terms.py --layers 30 --hidden 576 --heads 9 --kv_heads 3 --ffn 1536 --vocab 49152 --tied
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import parser, write_model

from lora_ms.runtime.host import start_with_huge_pages

WEIGHT, LAMBDA = 0.2, 1000.0  # of EWC; the numbers change no time
CASES = {
    "plain": "plain step",
    "ewc": "with EWC",
    "plain twice": "plain step of twice the rows",
    "contrastive": "with contrast, twice the rows",
}


class Case:
    """A model with its adapter, and the steps that are timed."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str, operators: Any):
        import mindspore as ms
        from mindspore import Tensor

        from lora_ms.adapters.inject import inject
        from lora_ms.adapters.methods.lora import LoraConfig
        from lora_ms.config import load_config
        from lora_ms.models.hub import load_directory
        from lora_ms.objectives.base import GivenRows
        from lora_ms.objectives.parameter_cells import PullToStart
        from lora_ms.train.gradient import MicroStep
        from lora_ms.train.optimizer import FlatAdamW
        from lora_ms.train.parts import SummedLoss

        model = load_directory(folder, operators=operators)
        if args.rank:
            inject(model, LoraConfig(args.rank, 2.0 * args.rank, 0.0, "all-linear"))
        trained = [p for _, p in model.parameters_and_names() if p.requires_grad]
        fisher = [np.full(p.shape, 0.01, np.float32) for p in trained] if name == "ewc" else []
        ewc = [PullToStart("ewc", trained, WEIGHT * LAMBDA, fisher)] if fisher else []
        rows = args.batch * (1 if name in ("plain", "ewc") else 2)
        tokens, labels = args.seq, args.seq // 3  # a third of a row is learnt
        slots = rows * labels
        ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (rows, tokens)).astype(np.int32)
        learnt = (np.arange(rows)[:, None] * tokens + np.arange(tokens - labels - 1, tokens - 1)).astype(np.int32)
        arrays = [
            ids,
            np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
            learnt.reshape(-1),
            ids[:, -labels:].ravel(),
        ]
        cells = []
        if name == "contrastive":
            (keys,) = load_config(None, flags={"objectives": [{"type": "contrastive"}]}).objectives
            counts = np.full(rows, labels)
            term = keys.row_term(GivenRows(np.arange(rows) % 2 == 1, counts, rows, lambda rows: [], lambda: None))
            cells = [term.cell]
            arrays += term.rows.arrays(np.arange(rows), counts, slots, slots / (rows // 2))
        self.optimizer = FlatAdamW(trained, objectives=ewc, operators=operators)
        model.set_train(True)
        self.step = MicroStep(SummedLoss(model, model.config.vocab_size, terms=cells), self.optimizer)
        self.batch = tuple(map(Tensor, arrays))
        self.step.prepare(*self.batch)
        self.rate, self.labels = Tensor(1e-4, ms.float32), Tensor(float(slots), ms.float32)

    def seconds(self) -> float:
        begun = time.perf_counter()
        self.step(*self.batch)
        self.optimizer(self.rate, self.labels)[0].asnumpy()
        return time.perf_counter() - begun


def main() -> None:
    arguments = parser(__doc__)
    for name, value in {"batch": 8, "seq": 128, "steps": 12, "rank": 16}.items():
        arguments.add_argument(
            f"--{name}", type=int, default=value, help="0: all parameters" if name == "rank" else None
        )
    args = arguments.parse_args()
    start_with_huge_pages()
    from lora_ms.runtime import device

    operators = device.setup("CPU", seed=1)[0].operators
    with tempfile.TemporaryDirectory() as folder:
        if not args.folder:
            write_model(args, Path(folder))
        cases = {name: Case(name, args, args.folder or folder, operators) for name in CASES}
        for case in cases.values():
            case.seconds()
        rounds = [[case.seconds() for case in cases.values()] for _ in range(args.steps)]
    medians = dict(zip(CASES, np.median(rounds, 0).tolist(), strict=True))
    trained = sum(p.size for p in cases["plain"].optimizer.params)
    print(f"{args.batch} rows of {args.seq} tokens; {trained:,} numbers train; the median of {args.steps} steps")
    for name, title in CASES.items():
        print(f"{title:32}{1000 * medians[name]:8.0f} ms  {medians[name] / medians['plain']:.3f} of a plain step")


if __name__ == "__main__":
    main()
