"""Checkpoints of a run: weights, optimiser and position, each directory whole or not at all."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mindspore import Tensor

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.train.optim import FlatAdamW

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"


def _number(path: Path) -> int:
    found = re.fullmatch(r"step_(\d+)", path.name)
    return int(found.group(1)) if found else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folder = output_dir / "checkpoints"
    found = [path for path in folder.glob("step_*") if _number(path) >= 0 and (path / STATE).is_file()]
    return sorted(found, key=_number)


def save(
    output_dir: Path, step: int, optimizer: FlatAdamW, state: dict, write_weights: Callable[[Path], None], keep: int
) -> Path:
    """Writes ``checkpoints/step_N`` and removes the oldest beyond ``keep``; returns its path."""
    final = output_dir / "checkpoints" / f"step_{step}"
    part = final.with_name(final.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_weights(part)
    storage.write_tensors(part / OPTIMIZER, {name: p.asnumpy().reshape(-1) for name, p in optimizer.state().items()})
    storage.write_json(part / STATE, {"step": step, **state})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in list_checkpoints(output_dir)[: -max(keep, 1)]:
        shutil.rmtree(old)
    return final


def clear(output_dir: Path) -> list[str]:
    """Removes the checkpoints of an earlier run, among which a new one would lose its own; returns their names."""
    old = [path.name for path in list_checkpoints(output_dir)]
    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    return old


def find(output_dir: Path, resume: bool | str) -> Path:
    """The checkpoint that ``resume`` means: a name, or the newest where True.

    Raises:
        LoraMsError: there is none; those that exist are listed.
    """
    checkpoints = list_checkpoints(output_dir)
    chosen = [path for path in checkpoints if resume is True or path.name == resume]
    if not chosen:
        names = ", ".join(path.name for path in checkpoints) or "none"
        wanted = "to resume from" if resume is True else f"named {resume}"
        raise LoraMsError(f"{output_dir / 'checkpoints'}: no checkpoint {wanted}; there are: {names}")
    return chosen[-1]


def load_optimizer(path: Path, optimizer: FlatAdamW, state: dict) -> int:
    """Restores the optimiser from checkpoint ``path`` and returns the number of steps done.

    Raises:
        LoraMsError: the checkpoint is of a run with other settings; each difference is listed.
    """
    stored = storage.read_json(path / STATE)
    faults = [f"{key}: {stored.get(key)} there, {here} here" for key, here in state.items() if stored.get(key) != here]
    if faults:
        raise LoraMsError(f"{path}: made by a run with other settings: {'; '.join(faults)}")
    entries = storage.read_header(path / OPTIMIZER)
    for name, parameter in optimizer.state().items():
        value = storage.read(entries[name], "float32").reshape(parameter.shape)
        parameter.set_data(Tensor.from_numpy(value))
    return stored["step"]
