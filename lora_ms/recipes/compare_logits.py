"""A model's logits with an adapter and without: what ``check-adapter`` computes."""

from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.adapters import check
from lora_ms.adapters.check import FAULT, OK, WARNING, Check
from lora_ms.errors import LoraMsError
from lora_ms.runtime import host
from lora_ms.text import size_text

PROMPT = "Who are you? Tell me in one sentence."
TOKENS = 16  # of the prompt
LEAST_CHANGE = 1e-3  # of the logits, below which an adapter has hardly been trained


def prompt_ids(adapter: Path, base: Path, vocab_size: int) -> np.ndarray:
    """[1, 16] ids of ``PROMPT``, repeated to that length; without a tokenizer, the first ids after the special ones."""
    from lora_ms.data.tokenizer import load_tokenizer

    ids = list(range(3, 3 + TOKENS))
    for folder in (adapter, base):
        if (folder / "tokenizer_config.json").is_file():
            ids = load_tokenizer(folder).encode(PROMPT, add_special_tokens=False)
            break
    return np.resize(np.array(ids, np.int32), (1, TOKENS)) % vocab_size


def check_logits(adapter: Path, base: Path) -> Check:
    """Whether the adapter changes the logits of its model; left out where there is too little memory for it."""
    entries = storage.open_dir(base)
    needed = 5 * check.size_of(entries)  # bytes: float32, and a quarter to work with
    free = int(host.available() * host.MB)
    if needed > free:
        text = f"not compared: {size_text(needed)} of memory are needed, {size_text(free)} are free"
        return Check("logits", WARNING, text)
    from mindspore import Tensor

    from lora_ms.adapters.peft_format import load_adapter
    from lora_ms.models import hub
    from lora_ms.runtime import device

    try:
        runtime, _ = device.setup()
        model = hub.load_directory(base, operators=runtime.operators).set_train(False)
        ids = Tensor(prompt_ids(adapter, base, model.config.vocab_size))
        before = model(ids).asnumpy()
        load_adapter(model, adapter)
        after = model.set_train(False)(ids).asnumpy()
    except LoraMsError as error:
        return Check("logits", FAULT, str(error))
    if not np.isfinite(after).all():
        return Check("logits", FAULT, "with the adapter they are not finite")
    moved = float(np.abs(after - before).max())
    changed = float((after.argmax(-1) != before.argmax(-1)).mean())
    text = f"differ from the model's by up to {moved:.3g}; {changed:.0%} of the likeliest tokens change"
    if moved == 0:
        return Check("logits", FAULT, text)
    return Check("logits", WARNING if moved < LEAST_CHANGE else OK, text)
