"""Shared by the scripts that write the reference files: paths, atomic writing, loading, ragged rows.

Every script runs with torch, transformers and PEFT, on one thread, in float32 with eager attention, so that
a second run writes the same arrays.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel

REFERENCE_DIR = Path(__file__).resolve().parent
MODEL_NAMES = ("llama2", "llama3", "qwen2", "qwen3", "deepseek_r1_qwen", "smollm3")
VOCAB_SIZE = 128
# Ids below this one are special (pad 0, bos 1, eos 2 and 3): no prompt or training row contains them.
FIRST_TEXT_ID = 4
PAD_ID = 0

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def asked(name: str) -> bool:
    """Whether the command line asks for `name`: by a word that is in it, or for all, by none."""
    return any(word in name for word in sys.argv[1:] or [""])


def load_model(model_dir: Path | str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Base model in eval mode with its weights cast to `dtype`; a missing or left-over tensor is an error."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    faults = {kind: names for kind, names in info.items() if names}
    if faults:
        raise SystemExit(f"{model_dir}: weights do not fit config.json: {faults}")
    return model.eval()


def load_reference_model(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """`load_model` by name. The path is relative: PEFT copies it into adapter_config.json."""
    os.chdir(REFERENCE_DIR)
    return load_model(Path("models") / name, dtype)


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Compressed npz: integers as int32, floats as float32, so that nothing depends on the platform's widths."""
    narrow = {}
    for key, value in arrays.items():
        value = np.asarray(value)
        narrow[key] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        np.savez_compressed(file, **narrow)
    os.replace(beside, path)


def save_adapter(model: PeftModel, target: Path, **options: str) -> None:
    """PEFT's own files without its model card. Its sets of module names are sorted, for the same file each time."""
    config = model.peft_config["default"]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, key, None), set):
            setattr(config, key, sorted(getattr(config, key)))
    beside = target.with_name(target.name + ".tmp")
    model.save_pretrained(beside, **options)
    (beside / "README.md").unlink()
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)


def save_json(path: Path, value: dict) -> None:
    """JSON as the Hugging Face hub has it: two spaces, sorted keys, a final newline."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, path)


def text_ids(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random token ids without special ones, int64 of `shape`."""
    return rng.integers(FIRST_TEXT_ID, VOCAB_SIZE, size=shape)


def ragged_mask(lengths: np.ndarray, width: int, side: str) -> np.ndarray:
    """Attention mask of 0 and 1, [rows, width], with the padding on `side` ("left" or "right")."""
    right = (np.arange(width)[None, :] < np.asarray(lengths)[:, None]).astype(np.int64)
    return right[:, ::-1].copy() if side == "left" else right


def position_ids_from(mask: np.ndarray) -> np.ndarray:
    """Position ids as transformers' `generate` makes them: the first attended token is 0, padding is 0."""
    return np.where(mask == 1, mask.cumsum(-1) - 1, 0)
