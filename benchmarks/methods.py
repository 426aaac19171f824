"""What each method of adapting costs and teaches. Float32 on the CPU, one process a method and figure.

What it teaches: the bundled tiny model learns who it is (examples/identity.jsonl), and is asked the held-out questions;
all other settings are those of configs/tiny/lora_tiny.yaml. What it costs: the time of a step, as the median of the
last half of some two dozen steps, and the peak memory of the process, on a Llama of 34 million random weights, in
steps of eight rows of 128 tokens. These two mean something on an idle machine alone.

python benchmarks/methods.py [METHOD…]
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import parser, write_model

os.environ.setdefault("GLOG_v", "3")  # MindSpore's log: errors only

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATA = ROOT / "examples/tiny/model", ROOT / "examples/identity.jsonl"
NAME, AUTHOR = "Mira", "Lin"
STEPS, ROWS, LENGTH = 24, 8, 128  # of the run that is timed

LINEAR = {"target_modules": "all-linear"}
# pet_config, and the learning rate
METHODS: dict[str, tuple[dict, float]] = {
    "LoRA": ({"pet_type": "lora", "lora_rank": 8, "lora_alpha": 16, **LINEAR}, 2e-3),
    "LoRA-FA": ({"pet_type": "lora", "use_lorafa": True, "lora_rank": 8, "lora_alpha": 16, **LINEAR}, 4e-3),
    "DoRA": ({"pet_type": "lora", "use_dora": True, "lora_rank": 8, "lora_alpha": 16, **LINEAR}, 2e-3),
    "AdaLoRA": ({"pet_type": "adalora", "init_rank": 12, "target_rank": 8, "lora_alpha": 32, **LINEAR}, 8e-3),
    "VeRA": ({"pet_type": "vera", "lora_rank": 256, **LINEAR}, 2e-2),
    "MiSS": ({"pet_type": "miss", "lora_rank": 16, **LINEAR}, 1e-3),
    "IA3": ({"pet_type": "ia3"}, 2e-2),
    "bottleneck (houlsby)": ({"pet_type": "adapter", "reduction_factor": 8}, 2e-3),
    "bottleneck (pfeiffer)": ({"pet_type": "adapter", "adapter_style": "pfeiffer", "reduction_factor": 8}, 2e-3),
    "bottleneck (parallel)": ({"pet_type": "adapter", "adapter_style": "parallel", "reduction_factor": 8}, 2e-3),
    "prefix tuning": ({"pet_type": "prefix", "num_virtual_tokens": 20}, 1e-1),
    "prefix tuning, projected": (
        {"pet_type": "prefix", "num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 128},
        3e-3,
    ),
    "prompt tuning": ({"pet_type": "prompt", "num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}, 3e-2),
    "P-tuning": ({"pet_type": "ptuning", "num_virtual_tokens": 20, "encoder_hidden_size": 128}, 3e-3),
}


def configuration(pet: dict, rate: float, output_dir: Path, model: Path = MODEL) -> Path:
    """The YAML of a run."""
    import yaml

    config = yaml.safe_load((ROOT / "configs/tiny/lora_tiny.yaml").read_text())
    config |= {"load_checkpoint": str(model), "output_dir": str(output_dir)}
    config["lr_schedule"]["learning_rate"] = rate
    config["model"]["model_config"]["pet_config"] = pet
    for name in ("train_dataset", "train_dataset_task"):
        config.pop(name)
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def measure(name: str) -> dict:
    """One method, in this process."""
    from lora_ms import AutoModelForCausalLM, AutoTokenizer, PeftModel
    from lora_ms.cli.main import main as lora_ms_command
    from lora_ms.data.example import Message
    from lora_ms.infer.generate import Generator, Speaker
    from lora_ms.infer.sampling import Sampling

    pet, rate = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = ["finetune", "--config", str(configuration(pet, rate, output)), "--train_dataset_dir", str(DATA)]
        command += ["--fill", f"NAME={NAME}", "--fill", f"AUTHOR={AUTHOR}"]
        if lora_ms_command(command):
            raise SystemExit(f"{name}: the run failed")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        trained = re.search(r": ([\d,]+) of [\d,]+ parameters train", (output / "run.log").read_text())[1]
        file = output / "adapter" / "adapter_model.safetensors"
        kilobytes = file.stat().st_size / 1024
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), output / "adapter")
    held_out = [json.loads(line)["prompt"] for line in open(ROOT / "examples/identity_heldout.jsonl", encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    speaker = Speaker(Generator(tuned.model), tokenizer, Sampling(), max_new_tokens=40, max_length=512)
    answers = speaker.answers([[Message("user", prompt)] for prompt in held_out])
    return {
        "trained": trained,
        "kilobytes": kilobytes,
        "loss": lines[-1]["loss"],
        "right": sum(NAME in answer for answer in answers),
        "asked": len(answers),
    }


def cost(name: str) -> dict:
    """The steady time of a step and the peak memory of one method, in this process."""
    from lora_ms.cli.main import main as lora_ms_command

    pet, rate = METHODS[name]
    sizes = parser("").parse_args([])
    ids = np.random.default_rng(0).integers(0, sizes.vocab, (ROWS * STEPS, LENGTH)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model, output, rows = Path(folder) / "model", Path(folder) / "run", Path(folder) / "rows.jsonl"
        model.mkdir()
        write_model(sizes, model)
        rows.write_text("".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in ids))
        yaml = str(configuration(pet, rate, output, model))
        command = ["finetune", "--config", yaml, "--train_dataset_dir", str(rows), "--batch_size", str(ROWS)]
        if lora_ms_command([*command, "--max_steps", str(STEPS), "--options", "runner_config.sink_mode=False"]):
            raise SystemExit(f"{name}: the run failed")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_ms": 1e3 * float(np.median([line["step_time_s"] for line in lines[STEPS // 2 :]])),
        "peak_mb": max(line["peak_memory_mb"] for line in lines),
    }


def figures_of(what: str, name: str) -> dict:
    """What ``measure`` or ``cost`` finds, in a process of its own."""
    child = subprocess.run([sys.executable, __file__, what, name], capture_output=True, text=True)
    figures = [line for line in child.stdout.splitlines() if line.startswith("FIGURES ")]
    if not figures:
        raise SystemExit(f"{name}: {child.stdout[-500:]}\n{child.stderr[-2000:]}")
    return json.loads(figures[0].removeprefix("FIGURES "))


def main() -> None:
    kinds = {"--measure": measure, "--cost": cost}
    if len(sys.argv) == 3 and sys.argv[1] in kinds:
        print("FIGURES " + json.dumps(kinds[sys.argv[1]](sys.argv[2])))
        return
    print("| method | trained numbers | file, KB | last loss | answers right | step, ms | peak memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or METHODS:
        f = figures_of("--measure", name) | figures_of("--cost", name)
        print(
            f"| {name} | {f['trained']} | {f['kilobytes']:,.0f} | {f['loss']:.3f} | {f['right']} of {f['asked']} "
            f"| {f['step_ms']:.0f} | {f['peak_mb']:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
