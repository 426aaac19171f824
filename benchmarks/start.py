"""What a person waits for: the first step and the first token after the start of a process, ours against torch + PEFT.

Of a model's folder, or of random weights of each depth in --layers: from the start of the process to the end of the
first and of the tenth training step, and to the first and the sixtieth generated token. Ours runs twice: cold, with no
compiled graph kept, and warm, with those of the cold run. The parts are those up to the first step or token: the
imports, model and data, the compiler, and the rest, which is the work itself.

python benchmarks/start.py --layers 8,30,60 --torch_python PYTHON_WITH_TORCH_AND_PEFT
python benchmarks/start.py --folder MODEL --torch_python PYTHON_WITH_TORCH_AND_PEFT
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import parser, peak_rss_mb, write_model

ROOT = Path(__file__).resolve().parent.parent
RANK, ALPHA, TARGETS = 16, 32, ["q_proj", "k_proj", "v_proj", "o_proj"]
STEPS, TOKENS = 10, 60
WORKS = {"train": ("step", STEPS), "generate": ("token", TOKENS)}
PARTS = ("import", "load", "compile", "run")


class Clock:
    """Seconds since the process was started: when each step or token was ready, and the parts before the first."""

    def __init__(self):
        self.origin = float(os.environ["LORA_MS_START"])
        self.parts = {}
        self.compiled = 0.0  # seconds in the compiler
        self.ends = []
        self.last = 0.0

    def part(self, name: str) -> None:
        """What was done since the last part."""
        now = time.time() - self.origin
        self.parts[name] = now - self.last
        self.last = now

    def tick(self) -> None:
        """A step or token is ready."""
        if not self.ends:
            self.part("run")
            self.parts["compile"] = self.compiled
            self.parts["run"] -= self.compiled
        self.ends.append(time.time() - self.origin)


def rows(args) -> list[list[int]]:
    """Token ids of as many rows as the steps take; all but the first token of each are learnt."""
    return np.random.default_rng(1).integers(5, args.vocab, (STEPS * args.batch, args.seq)).tolist()


def prompt(args) -> list[int]:
    return np.random.default_rng(2).integers(5, args.vocab, args.prompt).tolist()


# --- ours


def time_compiler(clock: Clock) -> None:
    """Counts the compiler's seconds: every call of a graph asks for its compilation first."""
    from lora_ms.nn.graph import Graph

    compile_once = Graph.compile

    def timed(graph, *inputs, **keywords):
        begun = time.perf_counter()
        compile_once(graph, *inputs, **keywords)
        clock.compiled += time.perf_counter() - begun

    Graph.compile = timed


def our_training(args, clock: Clock) -> None:
    """What ``lora-ms finetune`` does, in its order."""
    from lora_ms.config import load_config
    from lora_ms.recipes.reading_ahead import begin

    data = Path(args.output) / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in rows(args)))
    pet = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": TARGETS}
    flags = {
        "load_checkpoint": args.model,
        "train_dataset.data_loader.dataset_dir": str(data),
        "output_dir": str(Path(args.output) / "run"),
        "runner_config.batch_size": args.batch,
        "runner_config.max_steps": STEPS,
        "model.model_config.seq_length": args.seq,
        "context.device_target": "CPU",
    }
    config = load_config(None, flags=flags | {f"model.model_config.pet_config.{k}": v for k, v in pet.items()})
    begin(config, "finetune")
    from lora_ms.recipes import native
    from lora_ms.recipes.train import train
    from lora_ms.train.callbacks import TrainerCallback
    from lora_ms.train.log import Tee

    clock.part("import")
    time_compiler(clock)

    class Ticks(TrainerCallback):
        def on_step_end(self, state, record) -> None:
            clock.tick()

    inputs = native.read_inputs(config)
    with Tee() as log:
        run = native.prepare(inputs, log)
        run.loop.callbacks = [*run.loop.callbacks, Ticks()]
        clock.part("load")
        train(run)


def our_generation(args, clock: Clock) -> None:
    """What ``lora-ms predict`` does, without a tokenizer, in its order."""
    from lora_ms.config import load_config
    from lora_ms.recipes.reading_ahead import begin

    config = load_config(None, flags={"load_checkpoint": args.model, "context.device_target": "CPU"})
    begin(config, "predict")
    from lora_ms.infer.generate import Generator
    from lora_ms.recipes import session
    from lora_ms.recipes.generate import model_for_use

    clock.part("import")
    time_compiler(clock)
    generator = Generator(model_for_use(config, session.start(config)))
    clock.part("load")
    generator.generate([prompt(args)], TOKENS, on_token=lambda row, token: clock.tick())


# --- torch


def torch_model(args, clock: Clock):
    import torch
    from transformers import AutoModelForCausalLM

    clock.part("import")
    torch.set_num_threads(os.cpu_count())
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def torch_training(args, clock: Clock) -> None:
    """The same by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = torch_model(args, clock)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.tensor(rows(args)).reshape(STEPS, args.batch, args.seq)
    clock.part("load")
    for batch in ids:
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


def torch_generation(args, clock: Clock) -> None:
    """The same by transformers."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    model = torch_model(args, clock).eval()
    clock.part("load")

    class Ticks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            clock.tick()
            return scores

    ids = torch.tensor([prompt(args)])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Ticks()]),
    )


SIDES = {
    ("ours", "train"): our_training,
    ("ours", "generate"): our_generation,
    ("torch", "train"): torch_training,
    ("torch", "generate"): torch_generation,
}


def run_side(args) -> None:
    """In the process that is measured: the last line that it prints is its JSON."""
    clock = Clock()
    SIDES[args.side, args.work](args, clock)
    result = {"first": clock.ends[0], "last": clock.ends[-1], "peak_mb": peak_rss_mb(), **clock.parts}
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


# --- both


def measured(args, folder: str, side: str, work: str, graphs: str) -> dict[str, float]:
    """One process. graphs: the folder of compiled graphs."""
    python = os.path.abspath(sys.executable if side == "ours" else args.torch_python)  # it runs in another folder
    with tempfile.TemporaryDirectory() as output:
        command = [python, os.path.abspath(__file__), "--side", side, "--work", work, "--model", folder]
        command += ["--output", output, "--vocab", str(args.vocab)]
        command += [word for name in ("batch", "seq", "prompt") for word in (f"--{name}", str(getattr(args, name)))]
        env = {**os.environ, "GLOG_v": "3", "PYTHONPATH": str(ROOT), "LORA_MS_GRAPH_CACHE": graphs}
        if side == "ours":
            env["OMP_NUM_THREADS"] = "1"  # as the command line sets it; see lora_ms/cli/main.py
        env["LORA_MS_START"] = str(time.time())
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=output)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args, folder: str) -> None:
    """Runs both works on all sides, ``args.rounds`` times in turn, and prints two tables of the medians."""
    for work, (unit, count) in WORKS.items():
        results: dict[str, list[dict[str, float]]] = {"ours, cold": [], "ours, warm": [], "torch": []}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as graphs:
                results["ours, cold"].append(measured(args, folder, "ours", work, graphs))
                results["ours, warm"].append(measured(args, folder, "ours", work, graphs))
                results["torch"].append(measured(args, folder, "torch", work, graphs))
        medians = {
            name: {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
            for name, runs in results.items()
        }
        print(f"\n{work:10}" + "".join(f"{title:>12}" for title in (f"{unit} 1, s", f"{unit} {count}, s", "peak, MB")))
        for name, run in medians.items():
            print(f"{name:10}{run['first']:12.1f}{run['last']:12.1f}{run['peak_mb']:12.0f}")
        for name in ("ours, cold", "ours, warm"):
            ratios = [medians[name][key] / medians["torch"][key] for key in ("first", "last", "peak_mb")]
            print(
                f"{name.removeprefix('ours, ') + ' / torch':12}"
                + f"{ratios[0]:10.2f}{ratios[1]:12.2f}{ratios[2]:12.2f}"
            )
        print(f"{'parts, s':10}" + "".join(f"{part:>12}" for part in PARTS))
        for name, run in medians.items():
            print(f"{name:10}" + "".join(f"{run[part]:12.1f}" for part in PARTS), flush=True)


def models(args) -> Iterator[str]:
    """The folders that are measured, each named in a line."""
    if args.folder:
        config = json.loads((Path(args.folder) / "config.json").read_text())
        args.vocab = config["vocab_size"]
        print(f"\n{args.folder}: {config['num_hidden_layers']} layers of {config['hidden_size']}", flush=True)
        yield os.path.abspath(args.folder)
        return
    for layers in args.layers.split(","):
        with tempfile.TemporaryDirectory() as folder:
            sizes = argparse.Namespace(**{**vars(args), "layers": int(layers)})
            write_model(sizes, Path(folder))
            print(f"\nrandom weights: {layers} layers of {args.hidden}", flush=True)
            yield folder


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], layers=str)
    arguments.set_defaults(layers="8,30,60", hidden=576, heads=9, ffn=1536, vocab=49152, rounds=1)  # SmolLM2-135M's
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--seq", type=int, default=128)
    arguments.add_argument("--prompt", type=int, default=32)
    arguments.add_argument("--work", choices=tuple(WORKS), help=argparse.SUPPRESS)
    arguments.add_argument("--output", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.side:
        run_side(args)
        return
    for folder in models(args):
        compare(args, folder)


if __name__ == "__main__":
    main()
