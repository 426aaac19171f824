"""``lora-ms check-adapter``: is an adapter whole, does it fit its model, would a server take it."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.adapters import check
from lora_ms.adapters import peft_files as files
from lora_ms.adapters.check import FAULT, OK, WARNING, Check
from lora_ms.errors import LoraMsError
from lora_ms.runtime import host as machine

PROMPT = "Who are you? Tell me in one sentence."
TOKENS = 16  # of the prompt
WIDTH = 80
COLUMNS = (16, 9)


def lines_of(checks: Iterable[Check]) -> list[str]:
    """The table, at most 80 columns wide."""
    lines, indent = [], " " * sum(COLUMNS)
    for name, status, text in checks:
        first = f"{name:{COLUMNS[0]}}{status:{COLUMNS[1]}}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    return lines


def base_of(adapter: Path, load_checkpoint: str | None) -> Path | None:
    """The model's directory, if there is one.

    Raises:
        LoraMsError: ``load_checkpoint`` is given and is no directory.
    """
    if load_checkpoint is not None and not Path(load_checkpoint).is_dir():
        raise LoraMsError(f"load_checkpoint: {load_checkpoint} is no folder; give the model's Hugging Face directory")
    try:
        named = load_checkpoint or files.base_name(adapter)
    except LoraMsError:
        return None  # the table says what is wrong with the settings
    return Path(named) if named and Path(named).is_dir() else None


def prompt_ids(adapter: Path, base: Path, vocab_size: int) -> np.ndarray:
    """[1, 16] ids of ``PROMPT``, over and over; without a tokenizer, the first ids behind the special ones."""
    from lora_ms.data.tokenizer import load_tokenizer

    ids = list(range(3, 3 + TOKENS))
    for folder in (adapter, base):
        if (folder / "tokenizer_config.json").is_file():
            ids = load_tokenizer(folder).encode(PROMPT, add_special_tokens=False)
            break
    return np.resize(np.array(ids, np.int32), (1, TOKENS)) % vocab_size


def check_logits(adapter: Path, base: Path) -> Check:
    """Whether the model says something else with the adapter than without: both are computed."""
    entries = storage.open_dir(base)
    needed, free = 5 * check.size_of(entries), int(machine.available() * machine.MB)  # float32, a quarter to work with
    if needed > free:
        text = f"not compared: {storage.size_text(needed)} of memory are needed, {storage.size_text(free)} are free"
        return Check("logits", WARNING, text)
    from mindspore import Tensor

    from lora_ms.adapters.peft_format import load_adapter
    from lora_ms.models import hub
    from lora_ms.runtime import device as runtime

    try:
        here, _ = runtime.setup()
        model = hub.load_directory(base, operators=here.operators).set_train(False)
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
    return Check("logits", FAULT if moved == 0 else WARNING if moved < 1e-3 else OK, text)


def run(load_adapter: str, load_checkpoint: str | None = None) -> int:
    """Prints a table of checks; returns how many are faults.

    Raises:
        LoraMsError: there is no such folder.
    """
    adapter = Path(load_adapter)
    if not adapter.is_dir():
        raise LoraMsError(f"load_adapter: {adapter} is no folder; give the one that holds {files.CONFIG}")
    base = base_of(adapter, load_checkpoint)
    checks = []
    for found in check.check_files(adapter, base):
        checks.append(found)
        print(*lines_of([found]), sep="\n")
    if base is not None and all(found.status != FAULT for found in checks):
        checks.append(check_logits(adapter, base))
        print(*lines_of(checks[-1:]), sep="\n")
    faults, warnings = (sum(found.status == status for found in checks) for status in (FAULT, WARNING))
    print(f"{adapter}: {check.counted(faults, 'fault')}, {check.counted(warnings, 'warning')}")
    return faults
