#!/usr/bin/env bash
# Makes the tiny model again, from nothing to its score: corpus, tokenizer, training, float16 weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python examples/tiny/make_corpus.py --out output/tiny_corpus
python examples/tiny/make_tokenizer.py --corpus output/tiny_corpus --out examples/tiny/model
python examples/tiny/make_rows.py --corpus output/tiny_corpus
python run_mindformer.py --config examples/tiny/pretrain.yaml
python examples/tiny/halve.py --model output/tiny/model --out examples/tiny/model
cp output/tiny_corpus/heldout.jsonl examples/tiny/heldout.jsonl
python examples/tiny/score.py
