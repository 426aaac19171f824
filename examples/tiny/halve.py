"""Writes a model's weights in float16: half the size."""

import argparse

import mindspore as ms

from lora_ms import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    AutoModelForCausalLM.from_pretrained(args.model, ms_dtype=ms.float16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
