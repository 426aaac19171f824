"""How much of what the bundled model knows is lost as it learns a domain, by method; and over two tasks in turn.

    python benchmarks/forgetting.py --out results.json [--seeds 5] [--steps 80] [--methods lora ewc …]

General: the 200 held-out questions of the tiny model's corpus; domain: who the model is, 108 rows. Both as the share of
questions answered to the token, before and after. Replayed rows and those of the Fisher information are examples/tiny's
general.jsonl. Each run is a process of its own; what is in ``--out`` already is not run again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOMAIN = EXAMPLES / "identity.jsonl"
GENERAL = EXAMPLES / "tiny/general.jsonl"
HELD_OUT = EXAMPLES / "tiny/heldout.jsonl"
SETS = {
    "general": {"dataset_dir": str(HELD_OUT), "metric": "exact"},
    "domain": {"dataset_dir": str(DOMAIN), "metric": "exact"},
}
MIX = [
    {"dataset_dir": str(DOMAIN), "weight": 0.8, "role": "domain"},
    {"dataset_dir": str(GENERAL), "weight": 0.2, "role": "general"},
]
LORA = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LAYERED = LORA | {"layer_groups": [{"layers": "0-1", "lora_rank": 4}, {"layers": "2-3", "lora_rank": 16}]}
EWC = {"type": "ewc", "weight": 0.2, "lambda": 1000}
CONTRAST = {"type": "contrastive", "weight": 0.1}
# method: pet_config, whether general rows are replayed, further terms of the loss, highest learning rate
METHODS = {
    "full": (None, False, [], 3e-4),
    "full + ewc": (None, False, [EWC], 3e-4),
    "lora": (LORA, False, [], 2e-3),
    "layered": (LAYERED, False, [], 2e-3),
    "lora + replay": (LORA, True, [], 2e-3),
    "lora + ewc": (LORA, False, [EWC], 2e-3),
    "all": (LAYERED, True, [EWC, CONTRAST], 2e-3),
}
SEQUENCES = {"lora in turn": [], "o-lora in turn": [{"type": "orthogonal", "weight": 0.5}]}


def call(command: str, options: dict, folder: Path) -> None:
    """``lora-ms COMMAND`` with ``options`` by their keys."""
    common = {
        "data_fill": {"NAME": "Nova", "AUTHOR": "Wei"},
        "runner_config.batch_size": 16,
        "runner_config.logging_steps": 1000,
        "model.model_config.seq_length": 128,
        "context.device_target": "CPU",
        "eval_step_interval": -1,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in (common | options).items()]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "lora_ms.cli",
            command,
            "--load_checkpoint",
            str(EXAMPLES / "tiny/model"),
            "--options",
            *words,
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise SystemExit(f"{command} {options}: {ran.stderr}")


def run(method: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Scores before and after, of one run."""
    pet, replays, terms, rate = METHODS[method]
    options = {
        "seed": seed,
        "output_dir": "run",
        "model.model_config.pet_config": pet,
        "runner_config.max_steps": steps,
        "lr_schedule.learning_rate": rate,
    }
    terms = [term | ({"fisher": "fisher.safetensors"} if term is EWC else {}) for term in terms]
    if any(term["type"] == "ewc" for term in terms):
        call("fisher", options | {"train_dataset.mix": MIX, "objectives": terms}, folder)
    rows = {"train_dataset.mix": MIX} if replays else {"train_dataset.data_loader.dataset_dir": str(DOMAIN)}
    call("finetune", options | rows | {"objectives": terms, "evaluation.sets": SETS}, folder)
    sets = json.loads((folder / "run/forgetting.json").read_text())["sets"]
    return {f"{name} {when}": one[when] for name, one in sets.items() for when in ("before", "after")}


def codes(folder: Path, seed: int) -> str:
    """Forty made-up facts, as rows."""
    drawn = random.Random(seed)
    rows = [(f"What is code {i}?", f"It is {drawn.choice('ABCDEFGH')}{drawn.randint(10, 99)}.") for i in range(40)]
    roles = ("user", "assistant")
    lines = [{"messages": [{"role": r, "content": t} for r, t in zip(roles, row, strict=True)]} for row in rows]
    (folder / "codes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "codes.jsonl"


def run_tasks(method: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Two tasks in turn: mean accuracy after the second, and backward transfer."""
    second = codes(folder, seed)
    tasks = [
        {"name": "identity", "dataset_dir": str(DOMAIN), "eval_dir": str(DOMAIN)},
        {"name": "codes", "dataset_dir": second, "eval_dir": second},
    ]
    options = {
        "seed": seed,
        "output_dir": "run",
        "model.model_config.pet_config": LORA,
        "runner_config.max_steps": steps,
        "lr_schedule.learning_rate": 2e-3,
        "objectives": SEQUENCES[method],
        "sequence.tasks": tasks,
    }
    call("sequence", options, folder)
    found = json.loads((folder / "run/sequence.json").read_text())
    return {"mean accuracy": found["mean"], "backward transfer": found["backward_transfer"]}


def table(results: dict[str, dict]) -> list[str]:
    """Mean and standard deviation over seeds."""
    lines = []
    for method, by_seed in results.items():
        runs = list(by_seed.values())
        cells = []
        for name in runs[0]:
            values = [100 * one[name] for one in runs]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{name} {mean(values):.1f}{spread}")
        lines.append(f"{method:16}{len(runs)} seeds  {'  '.join(cells)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps of a run, of 16 rows")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *SEQUENCES])
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for seed in range(args.seeds):
        for method in args.methods:
            if str(seed) in results.get(method, {}):
                continue
            with tempfile.TemporaryDirectory() as folder:
                one = (run if method in METHODS else run_tasks)(method, seed, args.steps, Path(folder))
            results.setdefault(method, {})[str(seed)] = one
            args.out.write_text(json.dumps(results, indent=2) + "\n")
            print(f"seed {seed}  {method}: " + "  ".join(f"{k} {100 * v:.1f}" for k, v in one.items()), flush=True)
    print(*table(results), sep="\n")


if __name__ == "__main__":
    main()
