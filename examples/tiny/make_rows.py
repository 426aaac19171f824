"""Tokenises the corpus. One row in ten has labels on its question too: that teaches the words sooner."""

import argparse
import json
import random
from pathlib import Path

from lora_ms.data.pipeline import read_rows
from lora_ms.data.template import encode
from lora_ms.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="folder of train.jsonl")
    parser.add_argument("--model", default="examples/tiny/model", help="folder of the tokenizer")
    parser.add_argument("--whole", type=float, default=0.1, help="share of rows with labels on every token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer, chance = load_tokenizer(args.model), random.Random(args.seed)
    with open(Path(args.corpus) / "rows.jsonl", "w", encoding="utf-8") as out:
        for example in read_rows(Path(args.corpus) / "train.jsonl"):
            (row,) = encode(tokenizer, example)
            labels = row.input_ids if chance.random() < args.whole else row.labels
            out.write(json.dumps({"input_ids": row.input_ids.tolist(), "labels": labels.tolist()}) + "\n")


if __name__ == "__main__":
    main()
