"""Two versions of the sources train to the same numbers, bit for bit: short runs of each, and their metrics compared.

python benchmarks/same_numbers.py --old ../before --new .

Both are folders with a checkout of this repository. Every case runs 20 steps of the bundled tiny model through the
command line. Compared are loss, gradient norm, learning rate and token counts of each step; where the loss has extra
terms, the older version's ``loss`` may be the newer one's ``cross_entropy``.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
DROPOUT = {"pet_config.lora_dropout": 0.1}
CASES: dict[str, dict[str, object]] = {
    "LoRA with dropout": DROPOUT,
    "DoRA": DROPOUT | {"pet_config.use_dora": True},
    "AdaLoRA": DROPOUT | {"pet_config.pet_type": "adalora", "pet_config.init_rank": 8},
    "all layers recomputed": DROPOUT | {"recompute_config.recompute": True},
    "two layers recomputed": DROPOUT | {"recompute_config.recompute": 2},
    "all parameters": {"pet_config": None},
    "all parameters, recomputed": {"pet_config": None, "recompute_config.recompute": True},
    "float16": DROPOUT | {"model.model_config.compute_dtype": "float16"},
    "LoRA+ and noise": {"pet_config.loraplus_lr_ratio": 8, "pet_config.neftune_noise_alpha": 5},
    "accumulation, packed, two epochs": {
        "runner_config.gradient_accumulation_steps": 2,
        "train_dataset.packing": True,
        "runner_config.epochs": 2,
    },
    "evaluation": DROPOUT | {"train_dataset.validation_split": 0.2, "evaluation.keep_best": False, "do_eval": True},
    "two processes": DROPOUT | {"use_parallel": True},
    "two processes share the model": DROPOUT | {"use_parallel": True, "parallel_config.model_parallel": 2},
}
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "label_tokens", "eval_loss", "eval_accuracy")


def words_of(settings: dict[str, object], folder: str, steps: int) -> list[str]:
    """The flags of a run."""
    settings = {
        "load_checkpoint": HERE / "examples/tiny/model",
        "train_dataset_dir": HERE / "examples/huanhuan.jsonl",
        "output_dir": folder,
        "max_steps": steps,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "seq_length": 96,
        "seed": 3,
        "device_target": "CPU",
        "model.model_config.pet_config.target_modules": "all-linear",
        **{key.replace("pet_config", "model.model_config.pet_config", 1): value for key, value in settings.items()},
    }
    if settings.get("model.model_config.pet_config", "") is None:
        del settings["model.model_config.pet_config.target_modules"]
    words = []
    for key, value in settings.items():
        words += [f"--{key}", "null" if value is None else str(value)]
    return words


def run(tree: Path, settings: dict[str, object], steps: int) -> list[dict]:
    """The records of a run by the sources in ``tree``."""
    env = {**os.environ, "PYTHONPATH": str(tree), "GLOG_v": "3"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        words = words_of(settings, "out", steps)
        if settings.get("use_parallel"):
            with socket.socket() as here:
                here.bind(("127.0.0.1", 0))
                port = str(here.getsockname()[1])
            (Path(folder) / "run.yaml").write_text("run_mode: finetune\n")
            line = " ".join([str(tree / "run_mindformer.py"), "--config run.yaml", *words])
            script = str(tree / "scripts/msrun_launcher.sh")
            command = ["bash", script, line, "2", port, "logs", "True", "600"]
        else:
            command = [sys.executable, "-m", "lora_ms.cli", "finetune", *words]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{tree}: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        lines = (Path(folder) / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def differences(old: list[dict], new: list[dict]) -> list[str]:
    """What is not equal to the bit."""
    if len(old) != len(new):
        return [f"{len(old)} records, then {len(new)}"]
    found = []
    for before, after in zip(old, new, strict=True):
        if "cross_entropy" in after and "cross_entropy" not in before:
            after = after | {"loss": after["cross_entropy"]}
        for key in COMPARED:
            if before.get(key) != after.get(key):
                found.append(f"step {before['step']}: {key} {before.get(key)!r}, then {after.get(key)!r}")
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--old", type=Path, required=True, help="checkout of the earlier sources")
    arguments.add_argument("--new", type=Path, default=HERE, help="checkout of the later ones; this one by default")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    args = arguments.parse_args()
    trees = [args.old.resolve(), args.new.resolve()]
    for tree in trees:
        command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
        named = subprocess.run(command, capture_output=True, text=True)
        print(f"{tree}: {named.stdout.strip() or 'not a git checkout'}")
    print(f"{'':34}{'records':>8}  {'last loss':>20}  {'last norm':>20}  equal")
    failed = False
    for name in args.only:
        old, new = (run(tree, CASES[name], args.steps) for tree in trees)
        found = differences(old, new)
        last = [record for record in new if "loss" in record][-1]
        numbers = f"{last.get('cross_entropy', last['loss'])!r:>20}  {last['grad_norm']!r:>20}"
        print(f"{name:34}{len(new):>8}  {numbers}  {'no' if found else 'to the bit'}", flush=True)
        print(*(f"    {line}" for line in found[:4]), sep="\n", end="\n" if found else "")
        failed = failed or bool(found)
    sys.exit(failed)


if __name__ == "__main__":
    main()
