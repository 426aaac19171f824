"""Runs every benchmark beside its peer, keeps the results as JSON, and writes docs/numbers.md and its Chinese twin.

    python benchmarks/all.py --torch_python PYTHON_WITH_TORCH_AND_PEFT           in full: hours, on a quiet machine
    python benchmarks/all.py --quick --torch_python PYTHON_WITH_TORCH_AND_PEFT   small models: whether all run
    python benchmarks/all.py --pages                                             only the pages, from the results kept

Results are kept after each program, one for each processor; one that is there already is not run again unless --again
says so. What the quick form measures means nothing, and is kept nowhere. The figures in README.md and docs/ come from
these pages.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import FIGURES_FILE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results.json"
SMALL = "--layers 2 --hidden 128 --heads 4 --ffn 256 --vocab 1024"
DEEP = SMALL.replace("--layers 2", "--layers 16")  # layers that share graphs, whose operators have names of cells
SMOLLM2 = "--layers 30 --hidden 576 --heads 9 --kv_heads 3 --ffn 1536 --vocab 49152 --tied"  # SmolLM2-135M's shape
HALF = "--layers 24 --hidden 896 --heads 14 --kv_heads 2 --ffn 4864 --vocab 151936 --tied"  # Qwen2-0.5B's
LIMIT = 6 * 3600  # seconds for a program


class Program(NamedTuple):
    """A benchmark: what it is called on the pages, and its arguments in full and in the quick form."""

    english: str
    chinese: str
    full: str
    quick: str
    peer: bool = True  # beside torch


PROGRAMS = {
    "train_step dense": Program(
        "a training step, every token a label",
        "训练一步，每个 token 都有标签",
        "--labels dense --rounds 3",
        f"{SMALL} --batch 2 --seq 64 --steps 3 --rounds 1",
    ),
    "train_step smollm2": Program(
        "a training step in SmolLM2-135M's shape, rank 16 on all seven projections",
        "SmolLM2-135M 的形状，七个投影都用秩 16：训练一步",
        f"{SMOLLM2} --batch 8 --seq 128 --steps 5 --all_linear --rounds 2",
        f"{DEEP} --batch 2 --seq 64 --steps 3 --all_linear --rounds 1",
    ),
    "train_step third": Program(
        "a training step, a third of the tokens labels",
        "训练一步，三分之一的 token 有标签",
        "--labels third --rounds 3",
        f"--labels third {SMALL} --batch 2 --seq 64 --steps 3 --rounds 1",
    ),
    "train_step dropout": Program(
        "a training step with dropout 0.1", "训练一步，dropout 0.1", "--dropout 0.1 --rounds 3",
        f"--dropout 0.1 {SMALL} --batch 2 --seq 64 --steps 3 --rounds 1",
    ),
    "adapters": Program(
        "DoRA against LoRA, and rows with different adapters",
        "DoRA 与 LoRA，以及每行用不同适配器",
        "--rounds 3",
        f"{SMALL} --batch 4 --seq 32 --times 3 --rounds 1",
    ),
    "generate": Program(
        "generation, 128 tokens after a prompt of 64", "生成：64 个 token 的提示之后 128 个", "--rounds 3",
        f"{SMALL} --new 16 --repeat 2 --rounds 1",
    ),
    "generate smollm2": Program(
        "generation in SmolLM2-135M's shape", "SmolLM2-135M 的形状：生成", f"{SMOLLM2} --rounds 2",
        f"{DEEP} --new 16 --repeat 2 --rounds 1",
    ),
    "sft_throughput": Program(
        "fine-tuning on instruction rows, packed", "用指令数据训练（拼接）", "--rounds 2",
        f"{SMALL} --batch 4 --accumulation 2 --seq 256 --steps 2 --rounds 1",
    ),
    "start": Program(
        "from the start of the process", "从进程启动算起", "--layers 8,30,60",
        "--layers 2 --hidden 128 --heads 4 --ffn 256 --vocab 1024",
    ),
    "qlora": Program(
        "QLoRA against PEFT with bitsandbytes, in SmolLM2-135M's shape",
        "QLoRA，与 PEFT + bitsandbytes，SmolLM2-135M 的形状",
        f"{SMOLLM2} --rounds 2", f"{SMALL} --steps 2",
    ),
    "qlora half": Program(
        "QLoRA against PEFT with bitsandbytes, in Qwen2-0.5B's shape",
        "QLoRA，与 PEFT + bitsandbytes，Qwen2-0.5B 的形状",
        f"{HALF} --rounds 1", f"{SMALL} --steps 2",
    ),
    "roofline": Program(
        "where a step's time goes, in SmolLM2-135M's shape", "SmolLM2-135M 的形状：一步的时间花在哪里", SMOLLM2,
        f"{DEEP} --batch 2 --seq 64 --steps 2",
    ),
    "recompute": Program(
        "recomputation: memory and time", "重计算：内存与时间", "--rounds 3",
        f"{SMALL} --batch 2 --seq 64 --steps 3 --rounds 1", peer=False,
    ),
    "low_memory": Program(
        "--low_memory against float32", "--low_memory 与 float32", "--steps 3",
        "--layers 2 --hidden 128 --heads 4 --kv_heads 2 --ffn 256 --vocab 1024 --batch 2 --seq 32 --steps 2",
        peer=False,
    ),
    "methods": Program("what each method costs and teaches", "各方法的代价与效果", "", "LoRA", peer=False),
    "serve": Program(
        "the engine in SmolLM2-135M's shape: requests at once", "SmolLM2-135M 的形状：引擎同时处理请求",
        f"{SMOLLM2} --rounds 1 --repeat 2", f"{SMALL} --new 8 --adapters 1 --repeat 1",
    ),
    "serve_http": Program(
        "requests for many adapters over HTTP", "经 HTTP 请求多个适配器", "--adapters 1 4 16 64",
        "--adapters 1 --seconds 3", peer=False,
    ),
    "forgetting": Program(
        "what is forgotten, by method", "各方法忘掉多少", "--out {results} --seeds 5",
        "--out {results} --seeds 1 --steps 4 --methods lora", peer=False,
    ),
    "loss_terms": Program(
        "what terms of the loss cost, in SmolLM2-135M's shape", "SmolLM2-135M 的形状：损失项的代价",
        f"{SMOLLM2} --steps 8", f"{SMALL} --steps 2", peer=False,
    ),
    "long_run": Program(
        "a long run stays as it began", "长时间训练保持不变", "--steps 20000", "--steps 2000 --every 500", peer=False,
    ),
}  # fmt: skip
TEXTS = {
    "en": {
        "title": "Numbers",
        "other": "[中文](numbers.zh.md)",
        "made": "Written by `benchmarks/all.py` from `benchmarks/results.json`; do not edit.",
        "none": "Not run yet",
        "machine": "Machines",
        "on": "machine {number}, commit {commit}, {date}, {seconds} s",
        "command": "command",
        "ours": "ours",
        "torch": "torch",
        "ratio": "ours / torch",
        "failed": "failed",
        "how": "How the older tables were measured: [what makes it fast](speed.md).",
    },
    "zh": {
        "title": "测量结果",
        "other": "[English](numbers.md)",
        "made": "由 `benchmarks/all.py` 从 `benchmarks/results.json` 写出，请勿手工修改。",
        "none": "尚未运行",
        "machine": "机器",
        "on": "机器 {number}，提交 {commit}，{date}，{seconds} 秒",
        "command": "命令",
        "ours": "本项目",
        "torch": "torch",
        "ratio": "本项目 / torch",
        "failed": "失败",
        "how": "更早的表是怎样测的，见[为什么快](speed.zh.md)。",
    },
}


def machine(torch_python: str) -> dict[str, str]:
    """Processor, memory and versions of both sides."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    widths = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    code = "import torch, transformers, peft; print(torch.__version__, transformers.__version__, peft.__version__)"
    peers = subprocess.run([torch_python, "-c", code], capture_output=True, text=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    names = ("torch", "transformers", "PEFT")
    return {
        "processor": f"{model} ({', '.join(widths)}), {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory:.0f} GB",
        "lora_ms": commit.stdout.strip() or "not a checkout",
        "versions": f"Python {platform.python_version()}, MindSpore {version('mindspore')}",
        "beside": ", ".join(" ".join(pair) for pair in zip(names, peers.stdout.split(), strict=False)) or "nothing",
    }


def run(name: str, program: Program, quick: bool, torch_python: str, folder: Path) -> dict[str, Any]:
    """Runs a program; what there is to keep of it."""
    figures, kept = folder / "figures.json", folder / f"{name}.json"
    words = (program.quick if quick else program.full).format(results=kept).split()
    if program.peer:
        words += ["--torch_python", torch_python]
    script = HERE / f"{name.split()[0]}.py"
    shown = ["python", f"benchmarks/{script.name}", *(program.quick if quick else program.full).split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "3", FIGURES_FILE: str(figures)}
    begun = time.time()
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, env=env, cwd=ROOT, timeout=LIMIT
    )
    result: dict[str, Any] = {
        "command": " ".join(shown).replace("{results}", "results.json"),
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.time() - begun),
        "machine": machine(torch_python),
    }
    said, errors = (text.replace(f"{ROOT}/", "").strip().splitlines() for text in (done.stdout, done.stderr))
    if done.returncode:
        result["failed"] = (errors or said)[-3:]
    elif figures.exists():
        result["figures"] = json.loads(figures.read_text())
    else:
        result["printed"] = said[-40:]
    return result


Results = dict[str, dict[str, dict[str, Any]]]
"""Of each program, by processor."""


def page(results: Results, language: str) -> str:
    """docs/numbers.md from the results that are kept."""
    words = TEXTS[language]
    parts = [f"# {words['title']}", words["other"], words["made"], words["how"]]
    machines: list[dict[str, str]] = []
    for name, program in PROGRAMS.items():
        for number, result in enumerate(results.get(name, {}).values()):
            if number == 0:
                title = program.english if language == "en" else program.chinese
                parts.append(f"## {title[:1].upper()}{title[1:]}")
                parts.append(f"`{result['command']}`")
            described = {key: value for key, value in result["machine"].items() if key != "lora_ms"}
            if described not in machines:
                machines.append(described)
            where = {"number": machines.index(described) + 1, "commit": result["machine"]["lora_ms"]}
            parts.append(words["on"].format(**where, date=result["date"], seconds=result["seconds"]) + ":")
            parts.append(shown(result, words))
    missing = [f"`{name}`" for name in PROGRAMS if name not in results]
    if missing:
        parts += [f"## {words['none']}", ", ".join(missing)]
    if machines:
        parts.append(f"## {words['machine']}")
    for number, each in enumerate(machines, 1):
        parts.append(f"{number}. " + "; ".join(f"{key}: {value}" for key, value in each.items()))
    return "\n\n".join(parts) + "\n"


def shown(result: dict[str, Any], words: dict[str, str]) -> str:
    """The table of a result, or what the program printed."""
    if "failed" in result:
        return f"{words['failed']}: `{result['failed'][-1][:200] if result['failed'] else ''}`"
    if "figures" not in result:
        return "\n".join(("```text", *result["printed"], "```"))
    rows = [f"| | {words['ours']} | {words['torch']} | {words['ratio']} |", "| --- | --- | --- | --- |"]
    for label, (ours, torch) in result["figures"].items():
        ratio = f"{ours / torch:.2f}" if torch else ""
        rows.append(f"| {label} | {ours:.4g} | {torch:.4g} | {ratio} |")
    return "\n".join(rows)


def write_pages(results: Results) -> None:
    for language, suffix in (("en", ""), ("zh", ".zh")):
        (ROOT / "docs" / f"numbers{suffix}.md").write_text(page(results, language), encoding="utf-8")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="small models and few steps")
    arguments.add_argument("--pages", action="store_true", help="run nothing, write the pages")
    arguments.add_argument("--again", action="store_true", help="also run what has a result")
    arguments.add_argument("--only", nargs="+", choices=tuple(PROGRAMS), default=list(PROGRAMS), metavar="NAME")
    arguments.add_argument("--torch_python", default=os.environ.get("LORA_MS_TORCH_PYTHON", sys.executable))
    args = arguments.parse_args()
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = machine(args.torch_python)["processor"]
    failed = False
    for name in [] if args.pages else args.only:
        if "failed" not in results.get(name, {}).get(here, {"failed": []}) and not args.again and not args.quick:
            continue
        print(f"{name} …", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            result = run(name, PROGRAMS[name], args.quick, args.torch_python, Path(folder))
        failed = failed or "failed" in result
        print(f"  {result.get('failed', 'done')}, {result['seconds']} s", flush=True)
        if not args.quick:
            results.setdefault(name, {})[here] = result
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_pages(results)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
