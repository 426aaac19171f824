"""What transformers 5 writes of models and tokenizers that 4 has written: config.json and tokenizer_config.json.

python tests/reference/make_transformers5.py   # with torch and transformers 5.23
"""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "examples/tiny/model"
TARGET = HERE / "transformers5"

TARGET.mkdir(exist_ok=True)
with tempfile.TemporaryDirectory() as folder:
    for name in ("llama3", "qwen2", "qwen3"):
        AutoModelForCausalLM.from_pretrained(HERE / "models" / name, dtype=torch.float32).save_pretrained(folder)
        shutil.copyfile(Path(folder) / "config.json", TARGET / f"{name}.json")
    for kind, file in ((PreTrainedTokenizerFast, "tokenizer_config"), (AutoTokenizer, "tokenizer_config_qwen2")):
        kind.from_pretrained(TINY).save_pretrained(folder)
        shutil.copyfile(Path(folder) / "tokenizer_config.json", TARGET / f"{file}.json")
