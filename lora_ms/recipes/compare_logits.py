"""A model's logits with an adapter and without: what ``check-adapter`` computes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.adapters import check, peft_files
from lora_ms.adapters.check import FAULT, OK, WARNING, Check
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import model_config, open_model
from lora_ms.quant.settings import Quantisation
from lora_ms.runtime import host
from lora_ms.text import size_text

PROMPT = "Who are you? Tell me in one sentence."
ROWS = ("Who are you?", "Tell me about the sea.", "1, 2, 3, 4,", "def add(a, b):")  # that a merged model is asked
TOKENS = 16  # of a prompt
LEAST_CHANGE = 1e-3  # of the logits, below which an adapter has hardly been trained


def prompt_ids(adapter: Path, base: Path, vocab_size: int, prompts: Sequence[str] = (PROMPT,)) -> np.ndarray:
    """[n, 16] ids of the prompts, each repeated to that length; without a tokenizer, ids after the special ones."""
    from lora_ms.data.tokenizer import load_tokenizer

    rows = [list(range(3 + i, 3 + i + TOKENS)) for i in range(len(prompts))]
    for folder in (adapter, base):
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(folder)
            rows = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
            break
    return np.concatenate([np.resize(np.array(ids, np.int32), (1, TOKENS)) for ids in rows]) % vocab_size


def distance_line(base: Path, adapter: Path, merged: Path, quantisation: Quantisation | None) -> str:
    """How far the logits of the folder ``merged`` are from those of ``base`` with the adapter, for the user.

    quantisation: how the weights of ``base`` are quantised as they are read; None: it is stored so.
    """
    needed = 5 * check.size_of(storage.open_dir(merged))  # bytes: float32, and a quarter to work with
    free = int(host.available() * host.MB)
    if needed > free:
        return f"its logits were not compared: {size_text(needed)} of memory are needed, {size_text(free)} are free"
    from mindspore import Tensor

    from lora_ms.adapters.peft_format import load_adapter
    from lora_ms.models import hub
    from lora_ms.runtime import device

    runtime, _ = device.setup()
    model = hub.load_directory(base, operators=runtime.operators, quantisation=quantisation)
    load_adapter(model, adapter)
    ids = Tensor(prompt_ids(adapter, base, model.config.vocab_size, ROWS))
    trained = model.set_train(False)(ids).asnumpy()
    del model
    found = hub.load_directory(merged, operators=runtime.operators).set_train(False)(ids).asnumpy()
    moved = np.abs(found - trained)
    same = float((found.argmax(-1) == trained.argmax(-1)).mean())
    return (
        f"its logits differ from those of the training by {moved.mean():.3g} on average and {moved.max():.3g} at most "
        f"(of {np.abs(trained).max():.3g}), on {len(ROWS)} short rows; {same:.0%} of the likeliest tokens are the same"
    )


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
        whole = not open_model(base, model_config(base)).quantised
        quantisation = peft_files.base_quantisation(adapter) if whole else None
        model = hub.load_directory(base, operators=runtime.operators, quantisation=quantisation).set_train(False)
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
