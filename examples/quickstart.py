"""A model learns who it is: fine-tunes the bundled tiny model and asks it the same questions before and after."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's log: errors only

from lora_ms import AutoModelForCausalLM, AutoTokenizer, PeftModel
from lora_ms.cli.main import main as lora_ms_command
from lora_ms.data.example import Message
from lora_ms.infer.generate import Generator, Speaker
from lora_ms.infer.sampling import Sampling

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATA = ROOT / "examples/tiny/model", ROOT / "examples/identity.jsonl"
SHOWN = ("Who are you?", "你是谁？", "Sort the digits 485 from large to small.", "狮子的英文是什么？")


def ask(model, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers."""
    speaker = Speaker(Generator(model), tokenizer, Sampling(), max_new_tokens=40, max_length=512)
    return speaker.answers([[Message("user", prompt)] for prompt in prompts])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="Mira", help="who the model is to be")
    parser.add_argument("--author", default="Lin", help="who made it")
    parser.add_argument("--output_dir", default="output/quickstart")
    args = parser.parse_args()
    begun, output = time.time(), Path(args.output_dir)
    held_out = [json.loads(line)["prompt"] for line in open(ROOT / "examples/identity_heldout.jsonl", encoding="utf-8")]
    prompts = [*SHOWN, *held_out]

    print(f"1. asking the model as it is ({MODEL.relative_to(ROOT)})", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    before = ask(AutoModelForCausalLM.from_pretrained(MODEL), tokenizer, prompts)

    command = ["finetune", "--config", str(ROOT / "configs/tiny/lora_tiny.yaml")]
    command += ["--load_checkpoint", str(MODEL), "--train_dataset_dir", str(DATA)]
    command += ["--fill", f"NAME={args.name}", "--fill", f"AUTHOR={args.author}", "--output_dir", str(output)]
    print(f"\n2. fine-tuning it with LoRA on {DATA.relative_to(ROOT)}", flush=True)
    status = lora_ms_command(command)
    if status:
        return status

    print("\n3. asking it again, with the adapter", flush=True)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), output / "adapter")
    after = ask(tuned.model, tokenizer, prompts)
    for prompt, old, new in zip(SHOWN, before, after, strict=False):
        print(f"\n   > {prompt}\n   before: {old}\n   after:  {new}")
    count = [sum(args.name in answer for answer in answers[len(SHOWN) :]) for answers in (before, after)]
    asked = f"{len(held_out)} questions it was not trained on, answered with {args.name}"
    print(f"\n{asked}: {count[0]} before, {count[1]} after")
    print(f"adapter: {output}/adapter   loss plot: {output}/loss.png   {time.time() - begun:.0f} seconds in all")
    where = Path(sys.executable).parent
    tool = os.path.relpath(where / "lora-ms") if (where / "lora-ms").exists() else f"{sys.executable} -m lora_ms.cli"
    model = os.path.relpath(MODEL)
    print(f"""
next, for example:
  {tool} chat --load_checkpoint {model} --load_adapter {output}/adapter
  {tool} predict --load_checkpoint {model} --load_adapter {output}/adapter \\
      --predict_data "What is your name?"
  bash scripts/quickstart.sh --model smollm2   # the same with a real model; then your own rows: docs/start.md""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
