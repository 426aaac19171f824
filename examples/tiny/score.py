"""Scores a model on held-out questions: the share of greedy answers that equal the expected one, by kind."""

import argparse
import collections
import json
import os

os.environ.setdefault("GLOG_v", "3")

from lora_ms import AutoModelForCausalLM, AutoTokenizer, PeftModel
from lora_ms.data.example import Message
from lora_ms.infer.generate import Generator, Speaker
from lora_ms.infer.sampling import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/tiny/model", help="Hugging Face directory")
    parser.add_argument("--adapter", help="PEFT adapter directory")
    parser.add_argument("--tokenizer", default="examples/tiny/model")
    parser.add_argument("--heldout", default="examples/tiny/heldout.jsonl")
    parser.add_argument("--show_wrong", action="store_true")
    args = parser.parse_args()
    items = [json.loads(line) for line in open(args.heldout, encoding="utf-8")]
    model = AutoModelForCausalLM.from_pretrained(args.model)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter).model
    speaker = Speaker(Generator(model), AutoTokenizer.from_pretrained(args.tokenizer), Sampling(), 24, 512)
    right, total = collections.Counter(), collections.Counter()
    for start in range(0, len(items), 50):
        part = items[start : start + 50]
        answers = speaker.answers([[Message("user", item["messages"][0]["content"])] for item in part])
        for item, answer in zip(part, answers, strict=True):
            prompt, wanted = (message["content"] for message in item["messages"])
            total[item["kind"]] += 1
            right[item["kind"]] += answer == wanted
            if args.show_wrong and answer != wanted:
                print(f"{prompt} -> {answer} (should be {wanted})")
    for kind in total:
        print(f"{kind:14} {right[kind]:3}/{total[kind]}")
    print(f"{'all':14} {sum(right.values()):3}/{sum(total.values())}  {sum(right.values()) / sum(total.values()):.1%}")


if __name__ == "__main__":
    main()
