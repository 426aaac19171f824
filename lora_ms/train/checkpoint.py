"""Checkpoints of a run: weights, optimiser and position, each directory written atomically."""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.text import listed
from lora_ms.train.optimizer import FlatAdamW

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
BEST = "best"  # under output_dir: the weights of the lowest evaluation loss
FOLDERS = ("adapter", "model")  # under output_dir: what was trained, an adapter or all parameters
AS_LORA = "_lora"  # end of the name of one beside it: the same as plain LoRA, where the method has such a form
REPLACED = (BEST, *FOLDERS, f"adapter{AS_LORA}")
MOST_STEPS = 10**12  # optimiser steps


@dataclass(frozen=True)
class Weights:
    """How the trained weights go to and come from a directory."""

    folder: str  # one of FOLDERS
    write: Callable[[Path], None]
    read: Callable[[Path], None]
    identity: Mapping[str, object]  # what decides how the weights are used, such as lora_alpha
    finish: Callable[[Path], None] | None = None  # writes them when the run ends; None: ``write`` does
    collect: Callable[[], None] = lambda: None  # called by every process before the main one writes


def _number(path: Path) -> int:
    found = re.fullmatch(r"step_(\d+)", path.name)
    return int(found.group(1)) if found else -1


def folder_of(output_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return output_dir / "checkpoints"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [path for path in folder_of(output_dir).glob("step_*") if _number(path) >= 0 and (path / STATE).is_file()]
    return sorted(found, key=_number)


def check_foreign(output_dir: Path) -> None:
    """Raises LoraMsError where the folders that a run replaces or clears hold what no run has written."""
    found = [f"{name}/{file}" for name in REPLACED for file in saving.foreign(output_dir / name)]
    checkpoints = folder_of(output_dir)
    if checkpoints.is_dir():
        for path in sorted(path for path in checkpoints.iterdir() if not saving.is_unfinished(Path(path.name))):
            files = [path.name] if _number(path) < 0 else saving.foreign(path)
            found += [f"{checkpoints.name}/{path.name}{'/' if path.is_dir() else ''}" for _ in files[:1]]
    if found:
        raise LoraMsError(
            f"{output_dir} holds {listed(found, most=3, separator=', ')}, which no run is known to have written and "
            "this one would remove: move it away, give another output_dir, or set overwrite_output_dir: True to "
            "delete it"
        )


def remove_foreign(output_dir: Path) -> None:
    """Removes what ``check_foreign`` finds, with the folders that it is in."""
    checkpoints = [path for path in folder_of(output_dir).glob("*") if not saving.is_unfinished(Path(path.name))]
    for folder in [path for path in checkpoints if _number(path) < 0 or saving.foreign(path)]:
        saving.delete(folder)
    for name in REPLACED:
        if saving.foreign(output_dir / name):
            saving.delete(output_dir / name)


def recover(output_dir: Path) -> None:
    """Clears up after a run that was killed while it saved; the lock of ``output_dir`` is held.

    Raises:
        WriteError: it cannot be done.
    """
    try:
        saving.recover_all(output_dir)
        saving.recover_all(folder_of(output_dir))
    except OSError as error:
        raise WriteError(f"cannot clear up {output_dir}: {error.strerror}: {error.filename}") from None


def save(
    output_dir: Path,
    step: int,
    optimizer: Mapping[str, NDArray],
    state: dict,
    write_weights: Callable[[Path], None],
    keep: int,
) -> Path:
    """Writes ``checkpoints/step_N`` and removes the oldest beyond ``keep``; returns its path.

    optimizer: what its ``whole_state`` returned.

    Raises:
        WriteError: it cannot be written; the earlier ones are as they were.
    """
    final = folder_of(output_dir) / f"step_{step}"
    with saving.new_folder(final, own=True) as part:
        write_weights(part)
        storage.write_tensors(part / OPTIMIZER, {name: value.reshape(-1) for name, value in optimizer.items()})
        storage.write_json(part / STATE, {"step": step, **state})
    for old in list_checkpoints(output_dir)[: -max(keep, 1)]:
        with suppress(OSError):  # it costs room, and nothing else
            saving.remove(old)
    return final


def clear(output_dir: Path) -> list[str]:
    """Removes the checkpoints of an earlier run, so that they are not taken for the new one's; returns their names.

    Raises:
        WriteError: they cannot be removed.
    """
    old = list_checkpoints(output_dir)
    best = output_dir / BEST
    try:
        for folder in [*old, best] if best.is_dir() else old:
            saving.remove(folder)
    except OSError as error:
        raise WriteError(f"cannot remove the checkpoints in {output_dir}: {error.strerror}") from None
    return [path.name for path in old]


def find(output_dir: Path, resume: bool | str) -> Path:
    """The checkpoint that ``resume`` means: a name, or the newest where True.

    Raises:
        LoraMsError: there is none; those that exist are listed.
    """
    checkpoints = list_checkpoints(output_dir)
    chosen = [path for path in checkpoints if resume is True or path.name == resume]
    if not chosen:
        wanted = "to resume from" if resume is True else f"named {resume}"
        names = f"; there are: {', '.join(path.name for path in checkpoints)}" if checkpoints else ""
        raise LoraMsError(f"{folder_of(output_dir)}: no checkpoint {wanted}{names}")
    return chosen[-1]


def load(path: Path, optimizer: FlatAdamW, fingerprint: dict) -> dict:
    """Restores the optimiser from checkpoint ``path``; returns what else was saved, ``step`` among it.

    Raises:
        LoraMsError: a file is damaged, or the checkpoint is of a run with other settings; each difference is listed.
    """
    try:
        saving.verify(path)
    except LoraMsError as error:
        others = [other.name for other in list_checkpoints(path.parents[1]) if other != path]
        more = f" (--resume_training {others[-1]} goes on from an earlier one)" if others else ""
        raise LoraMsError(f"{error}{more}") from None
    stored = storage.read_json(path / STATE)
    check_state(path, stored)
    faults = [
        f"{key}: {stored.get(key)} there, {here} here"
        for key, here in fingerprint.items()
        # what checkpoints did not hold before is not compared
        if stored.get(key) != here and not (key == "rows_compared" and key not in stored)
    ]
    if faults:
        raise LoraMsError(f"{path}: made by a run with other settings: {'; '.join(faults)}")
    entries = storage.read_header(path / OPTIMIZER)
    sizes = optimizer.whole_sizes()
    found = {name: math.prod(entry.shape) for name, entry in entries.items()}
    if found != sizes:
        odd = sorted(name for name in {*sizes, *found} if sizes.get(name) != found.get(name))
        raise LoraMsError(f"{path / OPTIMIZER}: not the optimiser of this run: {', '.join(odd)}")
    optimizer.restore({name: _values(entry) for name, entry in entries.items()})
    return stored


def _values(entry: storage.Entry) -> NDArray:
    """Float32, or codes in bytes."""
    return storage.read_raw(entry) if entry.dtype == "U8" else storage.read(entry, "float32")


def check_state(path: Path, stored: dict) -> None:
    """Raises LoraMsError where ``trainer_state.json`` does not hold what a run writes, within its bounds."""

    def whole(value: object) -> bool:
        return type(value) is int and 0 <= value <= MOST_STEPS

    def loss(value: object) -> bool:
        return value is None or (type(value) is float and math.isfinite(value))

    kinds = {"step": whole, "skipped": whole, "best_step": whole, "worse": whole, "best_loss": loss}
    odd = [f"{key} {stored.get(key)!r}" for key, fits in kinds.items() if key not in stored or not fits(stored[key])]
    if stored.get("step") != _number(path):
        odd.append(f"step {stored.get('step')!r} in {path.name}")
    if odd:
        raise LoraMsError(f"{path / STATE}: not what a run has written: {', '.join(dict.fromkeys(odd))}")
