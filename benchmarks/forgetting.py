"""How much of what a model knows is lost as it learns, by method.

    python benchmarks/forgetting.py                                     the bundled model: an hour on two cores
    python benchmarks/forgetting.py --folder MODEL --data DATA --seeds 2 --torch_python PYTHON_WITH_TORCH_AND_PEFT

The bundled model. General: the 200 held-out questions of its corpus; domain: who the model is, 108 rows. Both as the
share of questions answered to the token, before and after. Replayed rows and those of the Fisher information are
examples/tiny's general.jsonl. Two tasks in turn besides: who the model is, then forty made-up facts.

A real one (SmolLM2-135M-Instruct) learns three tasks in turn: DATA/cl/{agnews,SST-2,RTE}, of the benchmark that O-LoRA
was published with (its CL_Benchmark, ``[{"sentence", "label"}]``). Domain: right labels by log-likelihood, of 60 test
rows a task. General: the loss on pages of DATA/c4_demo.jsonl ({"text"}), and DATA/cl/COPA, the right one of two
sentences by log-likelihood. Beside it PEFT's own LoRA, by torch, on the same tokens; lora-ms eval scores its adapters.

Each run is a process of its own; what is in ``--out`` already is not run again. Prints the tables of docs/forgetting.md
and draws its figure, or one beside ``--out``.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EXAMPLES = ROOT / "examples"
DOMAIN = EXAMPLES / "identity.jsonl"
GENERAL = EXAMPLES / "tiny/general.jsonl"
HELD_OUT = EXAMPLES / "tiny/heldout.jsonl"
Results = dict[str, dict[str, dict[str, float]]]  # method -> seed -> figures

LORA = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
EWC = {"type": "ewc", "weight": 0.2, "lambda": 1000, "fisher": "fisher.safetensors"}
CONTRAST = {"type": "contrastive", "weight": 0.1}
ORTHOGONAL = {"type": "orthogonal", "weight": 0.5}


def layered(layers: int) -> dict[str, Any]:
    """LoRA of rank 4 in the lower half of the layers, 16 in the upper half."""
    half = layers // 2
    groups = [{"layers": f"0-{half - 1}", "lora_rank": 4}, {"layers": f"{half}-{layers - 1}", "lora_rank": 16}]
    return LORA | {"layer_groups": groups}


class Method(NamedTuple):
    """What is trained, with which terms of the loss."""

    pet: Mapping[str, Any] | None  # pet_config
    replays: bool = False  # a fifth of the rows are general
    terms: Sequence[Mapping[str, Any]] = ()
    rate: float = 2e-3  # the highest learning rate


class Column(NamedTuple):
    """A figure of a run, as it is shown."""

    title: str
    value: Callable[[Mapping[str, float]], float]


# --- the bundled model

TINY = {"data_fill": {"NAME": "Nova", "AUTHOR": "Wei"}, "runner_config.batch_size": 16}
TINY_SETS = {
    "general": {"dataset_dir": str(HELD_OUT), "metric": "exact"},
    "domain": {"dataset_dir": str(DOMAIN), "metric": "exact"},
}
METHODS = {
    "full": Method(None, rate=3e-4),
    "full + ewc": Method(None, terms=[EWC], rate=3e-4),
    "lora": Method(LORA),
    "lora at 5e-4": Method(LORA, rate=5e-4),
    "layered": Method(layered(4)),
    "lora + replay": Method(LORA, replays=True),
    "lora + ewc": Method(LORA, terms=[EWC]),
    "lora + 1000 x ewc": Method(LORA, terms=[EWC | {"lambda": 1e6}]),
    "all": Method(layered(4), replays=True, terms=[EWC, CONTRAST]),
}
IN_TURN = {"lora in turn": Method(LORA), "o-lora in turn": Method(LORA, terms=[ORTHOGONAL])}
TINY_COLUMNS = [
    Column("general after", lambda run: 100 * run["general after"]),
    Column("forgotten", lambda run: 100 * (1 - run["general after"] / run["general before"])),
    Column("domain after", lambda run: 100 * run["domain after"]),
]
IN_TURN_COLUMNS = [
    Column("mean accuracy", lambda run: 100 * run["mean accuracy"]),
    Column("backward transfer", lambda run: 100 * run["backward transfer"]),
]


def call(command: str, model: str, options: Mapping[str, Any], folder: Path) -> str:
    """``lora-ms COMMAND`` with ``options`` by their keys; what it said."""
    common = {"runner_config.logging_steps": 1000, "context.device_target": "CPU", "eval_step_interval": -1}
    common |= {"model.model_config.seq_length": 128}
    words = [f"{key}={json.dumps(value)}" for key, value in {**common, **options}.items()]
    argv = [sys.executable, "-m", "lora_ms.cli", command, "--load_checkpoint", model, "--options", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{command} {options}: {ran.stderr}")
    return ran.stdout


def settings_of(method: Method, seed: int, steps: int) -> dict[str, Any]:
    """The options of a run."""
    return {
        "seed": seed,
        "output_dir": "run",
        "model.model_config.pet_config": method.pet,
        "runner_config.max_steps": steps,
        "lr_schedule.learning_rate": method.rate,
        "objectives": list(method.terms),
    }


def mix_of(domain: str, general: str) -> dict[str, Any]:
    """``domain`` with a fifth of ``general`` rows."""
    shares = ((domain, 0.8, "domain"), (general, 0.2, "general"))
    return {"train_dataset.mix": [{"dataset_dir": name, "weight": share, "role": role} for name, share, role in shares]}


def measure_fisher(method: Method, model: str, options: Mapping[str, Any], folder: Path) -> None:
    """Writes the file that ``method``'s EWC reads, where it has one."""
    if any(term["type"] == "ewc" for term in method.terms):
        call("fisher", model, options, folder)


def run_tiny(method: Method, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Scores before and after."""
    model = str(EXAMPLES / "tiny/model")
    options = TINY | settings_of(method, seed, steps)
    mix = mix_of(str(DOMAIN), str(GENERAL))
    measure_fisher(method, model, options | mix, folder)
    rows = mix if method.replays else {"train_dataset.data_loader.dataset_dir": str(DOMAIN)}
    call("finetune", model, options | rows | {"evaluation.sets": TINY_SETS}, folder)
    sets = json.loads((folder / "run/forgetting.json").read_text())["sets"]
    return {f"{name} {when}": one[when] for name, one in sets.items() for when in ("before", "after")}


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes ``rows`` as JSONL; the file's name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def run_tiny_in_turn(method: Method, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Who the model is, then forty made-up facts: mean accuracy after the second, and backward transfer."""
    drawn = random.Random(seed)
    facts = [(f"What is code {i}?", f"It is {drawn.choice('ABCDEFGH')}{drawn.randint(10, 99)}.") for i in range(40)]
    codes = write_lines(folder / "codes.jsonl", [conversation(*fact) for fact in facts])
    tasks = [
        {"name": name, "dataset_dir": rows, "eval_dir": rows}
        for name, rows in (("identity", str(DOMAIN)), ("codes", codes))
    ]
    options = TINY | settings_of(method, seed, steps) | {"sequence.tasks": tasks}
    call("sequence", str(EXAMPLES / "tiny/model"), options, folder)
    found = json.loads((folder / "run/sequence.json").read_text())
    return {"mean accuracy": found["mean"], "backward transfer": found["backward_transfer"]}


# --- a real model on real rows

QUESTIONS = {
    "agnews": "What is the topic of this text: World, Sports, Business, or Science or Technology?",
    "SST-2": "Is the sentiment of this text Good or Bad?",
    "RTE": "Does the first sentence entail the second: entailment or contradiction?",
}
LONGEST = {"agnews": 200, "SST-2": 120, "RTE": 200}  # characters: longer rows are left out, two cores being slow
LEARNT, SCORED, PAGES, PAGE = 120, 60, 40, 500  # rows of a task, its test rows, pages, characters of a page
MEASURED = 48  # rows of the Fisher information
REAL_METHODS = {
    "lora": Method(LORA, rate=1e-3),
    "lora + replay": Method(LORA, replays=True, rate=1e-3),
    "all": Method(layered(30), replays=True, terms=[EWC, CONTRAST], rate=1e-3),
    "o-lora": Method(LORA, terms=[ORTHOGONAL], rate=1e-3),
}
UNTRAINED, PEFT = "untrained", "lora by PEFT"
REAL_COLUMNS = [
    Column("domain accuracy", lambda run: 100 * run["domain after"]),
    Column("rise of general loss", lambda run: run["c4 after"] - run["c4 before"]),
    Column("COPA", lambda run: 100 * run["copa after"]),
]
REAL_STEPS = 20  # of a task
REAL_BATCH = 6


class Task(NamedTuple):
    """Rows to learn and questions to answer, ``{"question", "choices", "answer"}``."""

    name: str
    learnt: list[dict[str, Any]]
    asked: list[dict[str, Any]]


def read_task(data: Path, name: str) -> Task:
    """The first short rows of a task, as many of each label."""
    labels = json.loads((data / "cl" / name / "labels.json").read_text())

    def questions(part: str, count: int) -> list[dict[str, Any]]:
        rows = json.loads((data / "cl" / name / f"{part}.json").read_text())
        short = [row for row in rows if len(row["sentence"]) <= LONGEST[name]]
        by_label = [[row for row in short if row["label"] == label][: count // len(labels)] for label in labels]
        return [
            {"question": f"{QUESTIONS[name]}\n{row['sentence'].strip()}", "choices": labels, "answer": row["label"]}
            for together in zip(*by_label, strict=False)
            for row in together
        ]

    return Task(name, questions("train", LEARNT), questions("test", SCORED))


def read_copa(data: Path) -> list[dict[str, Any]]:
    """Questions whose answers are the two sentences themselves."""
    found = []
    for row in json.loads((data / "cl/COPA/test.json").read_text())[:SCORED]:
        question, first, second = row["sentence"].split("\n")
        question = question.removesuffix(" Choose one between A and B.")
        found.append({"question": question, "choices": [first[3:], second[3:]], "answer": "AB".index(row["label"])})
    return found


class RealRows(NamedTuple):
    """What is written of DATA, as the configuration takes it."""

    tasks: list[dict[str, Any]]  # sequence.tasks
    sets: dict[str, Any]  # evaluation.sets of what is general
    tests: dict[str, Any]  # evaluation.sets of the tasks
    replayed: str  # general rows

    @classmethod
    def write(cls, data: Path, folder: Path) -> "RealRows":
        tasks, tests = [], {}
        for task in (read_task(data, name) for name in QUESTIONS):
            learnt = [conversation(row["question"], row["answer"]) for row in task.learnt]
            rows = write_lines(folder / f"{task.name}.jsonl", learnt)
            # a sequence scores all tasks before and after each: here on one question, and apart from it where it counts
            asked = write_lines(folder / f"{task.name}_one.jsonl", task.asked[:1])
            tasks.append({"name": task.name, "metric": "choice", "dataset_dir": rows, "eval_dir": asked})
            test = write_lines(folder / f"{task.name}_test.jsonl", task.asked)
            tests[task.name] = {"dataset_dir": test, "metric": "choice"}
        lines = (data / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
        pages = [{"text": json.loads(line)["text"][:PAGE]} for line in lines]
        sets = {
            "c4": {"dataset_dir": write_lines(folder / "c4.jsonl", pages[:PAGES]), "metric": "loss"},
            "copa": {"dataset_dir": write_lines(folder / "copa.jsonl", read_copa(data)), "metric": "choice"},
        }
        return cls(tasks, sets, tests, write_lines(folder / "general.jsonl", pages[PAGES : PAGES + LEARNT]))


REAL = {
    "runner_config.batch_size": REAL_BATCH,
    "processor.tokenizer.chat_template": "chatml",  # the model's own without its system message
    "optimizer.weight_decay": 0.0,
    "lr_schedule.warmup_ratio": 0.1,
}


def score(model: str, adapter: Path | None, rows: RealRows, folder: Path) -> dict[str, float]:
    """The loss or the accuracy of each set, by ``lora-ms eval``, and the mean over the tasks."""
    sets = rows.sets | rows.tests
    options = REAL | {"evaluation.sets": sets, "load_adapter": "" if adapter is None else str(adapter)}
    said = call("eval", model, options, folder)
    lines = re.findall(r"^(\S+): loss ([\d.]+)  accuracy ([\d.]+)%  \((\w+)\)$", said, re.M)
    found = {f"{n} after": float(loss) if metric == "loss" else float(right) / 100 for n, loss, right, metric in lines}
    return found | {"domain after": mean(found[f"{name} after"] for name in rows.tests)}


def run_real(method: Method, seed: int, steps: int, folder: Path, model: str, data: Path) -> dict[str, float]:
    """Three tasks in turn."""
    rows = RealRows.write(data, folder)
    options = REAL | settings_of(method, seed, steps)
    mix = mix_of(rows.tasks[0]["dataset_dir"], rows.replayed)
    measure_fisher(method, model, options | mix | {"train_dataset.num_samples": MEASURED}, folder)
    # a sequence puts each of its tasks in the place of the mix's domain rows
    call("sequence", model, options | (mix if method.replays else {}) | {"sequence.tasks": rows.tasks}, folder)
    *_, before, last = (folder / f"run/task_{number}_{name}" for number, name in enumerate(rows.tests, 1))
    is_apart = ORTHOGONAL in method.terms  # then the last task's adapter belongs to the model with the earlier ones
    return score(str(before / "merged") if is_apart else model, last / "adapter", rows, folder)


def run_peft(seed: int, steps: int, folder: Path, model: str, data: Path, torch_python: str) -> dict[str, float]:
    """The same tasks by torch and PEFT."""
    from lora_ms.data.choices import ChoiceRow, tokens_of
    from lora_ms.data.template import set_template
    from lora_ms.data.tokenizer import load_tokenizer

    rows = RealRows.write(data, folder)
    tokenizer = load_tokenizer(model)
    set_template(tokenizer, REAL["processor.tokenizer.chat_template"])
    job: dict[str, Any] = {"model": model, "seed": seed, "steps": steps, "batch": REAL_BATCH, "tasks": {}}
    job |= {"rate": REAL_METHODS["lora"].rate, "warmup": REAL["lr_schedule.warmup_ratio"]}
    job |= {"rank": LORA["lora_rank"], "alpha": LORA["lora_alpha"]}
    for name in rows.tests:
        asked = [ChoiceRow("", row["question"], (row["answer"],), 0) for row in read_task(data, name).learnt]
        tokens = tokens_of(tokenizer, asked, 128)[0]
        job["tasks"][name] = [[row.input_ids.tolist(), row.labels.tolist()] for row in tokens]
    (folder / "job.json").write_text(json.dumps(job))
    argv = [torch_python, str(Path(__file__).resolve()), "--torch_job", "job.json"]
    ran = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"torch: {ran.stderr}")
    return score(model, folder / list(rows.tests)[-1], rows, folder)


def train_by_torch(job: Mapping[str, Any]) -> None:
    """Each task's adapter goes to a folder of its name."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(job["seed"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    config = LoraConfig(r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for name, rows in job["tasks"].items():
        optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(job["warmup"] * job["steps"]), job["steps"])
        order = torch.cat([torch.randperm(len(rows)) for _ in range(job["steps"] * job["batch"] // len(rows) + 1)])
        for step in range(job["steps"]):
            batch = [rows[i] for i in order[step * job["batch"] :][: job["batch"]].tolist()]
            longest = max(len(ids) for ids, _ in batch)
            ids, mask, labels = (
                torch.tensor([[*row, *[fill] * (longest - len(row))] for row in part])
                for part, fill in (
                    ([ids for ids, _ in batch], 0),
                    ([[1] * len(ids) for ids, _ in batch], 0),
                    ([labels for _, labels in batch], -100),
                )
            )
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.save_pretrained(name)


# --- tables and figures


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean, by Student's t; None of fewer than three values."""
    from scipy.stats import t

    return t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 2 else None


def cell(values: Sequence[float], sign: str = "") -> str:
    """``77.0 ± 2.1``, or of two values ``77.0 (76.1, 77.9)``; small ones with three decimals."""
    number = f"{sign}.{1 if max(map(abs, values)) >= 1.5 else 3}f"
    half = interval(values)
    if half is not None:
        return f"{mean(values):{number}} ± {half:{number.removeprefix('+')}}"
    both = ", ".join(f"{value:{number}}" for value in values)
    return f"{mean(values):{number}}" + (f" ({both})" if len(values) > 1 else "")


def table(results: Results, columns: Sequence[Column]) -> list[str]:
    """Of each method the mean and its interval over seeds; last, where both are there, all less lora, seed by seed."""
    titles = ["method", "seeds", *(column.title for column in columns)]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for method, runs in results.items():
        cells = [cell([column.value(run) for run in runs.values()]) for column in columns]
        lines.append(f"| {' | '.join((method, str(len(runs)), *cells))} |")
    both = [seed for seed in results.get("all", {}) if seed in results.get("lora", {})]
    if both:
        pairs = [(results["all"][seed], results["lora"][seed]) for seed in both]
        cells = [cell([column.value(one) - column.value(other) for one, other in pairs], "+") for column in columns]
        lines.append(f"| {' | '.join(('all − lora', str(len(both)), *cells))} |")
    return lines


def tables(results: Results) -> list[str]:
    """The tables of what is there, as in docs/forgetting.md."""
    lines = []
    in_turn = {name: runs for name, runs in results.items() if name in IN_TURN}
    rest = {name: runs for name, runs in results.items() if name not in IN_TURN}
    is_real = any("c4 after" in run for runs in rest.values() for run in runs.values())
    for some, columns in ((rest, REAL_COLUMNS if is_real else TINY_COLUMNS), (in_turn, IN_TURN_COLUMNS)):
        if some:
            lines += [*table(some, columns), ""]
    return lines


def draw(results: Results, path: Path) -> None:
    """Learning against forgetting: a point for each method, with its 95% interval, or with all runs where they are
    fewer than three."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rest = {name: runs for name, runs in results.items() if name not in IN_TURN}
    is_real = any("c4 after" in run for runs in rest.values() for run in runs.values())
    x, y = (REAL_COLUMNS[1], REAL_COLUMNS[0]) if is_real else (TINY_COLUMNS[1], TINY_COLUMNS[2])
    units = (" (nats per token)", " (%)") if is_real else (" (% of the general questions)", " (%)")
    figure, axis = pyplot.subplots(figsize=(7, 4.5), dpi=110, layout="constrained")
    for name, runs in rest.items():
        values = [[column.value(run) for run in runs.values()] for column in (x, y)]
        (across, dx), (up, dy) = ((mean(v), interval(v)) for v in values)
        drawn = axis.errorbar(across, up, xerr=dx, yerr=dy, fmt="o", capsize=3, label=name)
        if dx is None and len(runs) > 1:
            axis.scatter(*values, s=12, alpha=0.5, color=drawn.lines[0].get_color())
    axis.set(xlabel=x.title + units[0], ylabel=y.title + units[1])
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def cpu_seconds() -> float:
    """Of all processes started here that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results; by default those that are kept beside this program")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="optimiser steps of a run, of 16 rows: 80; of a task, of 6: 20")
    parser.add_argument("--methods", nargs="+", metavar="NAME")
    parser.add_argument("--folder", help="a real model's, to learn tasks in turn")
    parser.add_argument("--data", type=Path, help="folder with cl/ and c4_demo.jsonl, for --folder")
    parser.add_argument("--torch_python", default=os.environ.get("LORA_MS_TORCH_PYTHON", sys.executable))
    parser.add_argument("--torch_job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_job:
        train_by_torch(json.loads(args.torch_job.read_text()))
        return
    if bool(args.folder) != bool(args.data):
        parser.error("give --folder and --data together")
    out = args.out or HERE / ("forgetting_tasks.json" if args.folder else "forgetting_tiny.json")
    model = os.path.abspath(args.folder or "")
    runs: dict[str, Callable[[int, Path], dict[str, float]]] = {}
    if args.folder:
        steps, data = args.steps or REAL_STEPS, args.data.resolve()
        runs[UNTRAINED] = lambda seed, folder: score(model, None, RealRows.write(data, folder), folder)
        for name, method in REAL_METHODS.items():
            runs[name] = lambda seed, folder, m=method: run_real(m, seed, steps, folder, model, data)
        runs[PEFT] = lambda seed, folder: run_peft(seed, steps, folder, model, data, args.torch_python)
    else:
        steps = args.steps or 80
        for name, method in METHODS.items():
            runs[name] = lambda seed, folder, m=method: run_tiny(m, seed, steps, folder)
        for name, method in IN_TURN.items():
            runs[name] = lambda seed, folder, m=method: run_tiny_in_turn(m, seed, steps, folder)
    unknown = [name for name in args.methods or () if name not in runs]
    if unknown:
        parser.error(f"no method {unknown[0]}: choose from {', '.join(runs)}")
    results: Results = json.loads(out.read_text()) if out.exists() else {}
    for seed in range(args.seeds):
        for name in [name for name in runs if not args.methods or name in (*args.methods, UNTRAINED)]:
            if str(seed) in results.get(name, {}) or (name == UNTRAINED and seed):
                continue
            begun, used = time.time(), cpu_seconds()
            with tempfile.TemporaryDirectory() as folder:
                one = runs[name](seed, Path(folder))
            one |= {"seconds": round(time.time() - begun), "cpu seconds": round(cpu_seconds() - used)}
            results.setdefault(name, {})[str(seed)] = one
            if args.folder:
                one["c4 before"] = results[UNTRAINED]["0"]["c4 after"]
            results = {key: results[key] for key in runs if key in results}
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"seed {seed}  {name}: {one}", flush=True)
    print(*tables(results), sep="\n")
    draw(results, out.with_suffix(".png") if args.out else ROOT / "docs" / f"{out.stem}.png")


if __name__ == "__main__":
    main()
