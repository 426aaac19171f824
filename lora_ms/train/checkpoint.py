"""Checkpoints of a run: weights, optimiser and position, each directory written atomically."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.train.optimizer import FlatAdamW

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
PART = ".part"  # end of the name of a folder that is being written
OLD = ".old"  # of one that is being replaced
BEST = "best"  # under output_dir: the weights of the lowest evaluation loss
FOLDERS = ("adapter", "model")  # under output_dir: what was trained, an adapter or all parameters


@dataclass(frozen=True)
class Weights:
    """How the trained weights go to and come from a directory."""

    folder: str  # one of FOLDERS
    write: Callable[[Path], None]
    read: Callable[[Path], None]
    identity: Mapping[str, object]  # what decides how the weights are used, such as lora_alpha
    finish: Callable[[Path], None] | None = None  # writes them when the run ends; None: ``write`` does
    collect: Callable[[], None] = lambda: None  # called by every process before the main one writes


def replace_folder(part: Path, final: Path) -> None:
    """Renames the finished folder ``part`` to ``final``, which may exist; its files are on disk before.

    ``recover_folders`` finishes what was killed halfway.
    """
    for file in part.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    old = final.with_name(final.name + OLD)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes ``folder`` atomically."""
    gone = folder.with_name(folder.name + PART)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def recover_folders(parent: Path, names: str) -> None:
    """Clears up after a killed run, among folders ``names`` (a glob): unfinished ones are removed, and one that was
    about to be replaced comes back."""
    for folder in parent.glob(f"{names}{OLD}"):
        final = folder.with_name(folder.name.removesuffix(OLD))
        if final.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            os.replace(folder, final)
    for part in parent.glob(f"{names}{PART}"):
        shutil.rmtree(part, ignore_errors=True)


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


def recover(output_dir: Path) -> None:
    """Clears up after a run that was killed while it saved."""
    recover_folders(folder_of(output_dir), "step_*")
    for name in (BEST, *FOLDERS):
        recover_folders(output_dir, name)


def put(final: Path, fill: Callable[[Path], None]) -> None:
    """Writes folder ``final``, or replaces it, atomically; ``fill`` writes what is to be in it.

    Raises:
        WriteError: it cannot be written; what stood there before is as it was.
    """
    part = final.with_name(final.name + PART)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        fill(part)
        replace_folder(part, final)
    except OSError as error:
        raise WriteError(f"cannot write {final}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


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

    def fill(part: Path) -> None:
        write_weights(part)
        storage.write_tensors(part / OPTIMIZER, {name: value.reshape(-1) for name, value in optimizer.items()})
        storage.write_json(part / STATE, {"step": step, **state})

    final = folder_of(output_dir) / f"step_{step}"
    put(final, fill)
    for old in list_checkpoints(output_dir)[: -max(keep, 1)]:
        remove_folder(old)
    return final


def clear(output_dir: Path) -> list[str]:
    """Removes the checkpoints of an earlier run, so that they are not taken for the new one's; returns their names."""
    old = [path.name for path in list_checkpoints(output_dir)]
    shutil.rmtree(folder_of(output_dir), ignore_errors=True)
    shutil.rmtree(output_dir / BEST, ignore_errors=True)
    return old


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
        LoraMsError: the checkpoint is of a run with other settings; each difference is listed.
    """
    stored = storage.read_json(path / STATE)
    faults = [
        f"{key}: {stored.get(key)} there, {here} here" for key, here in fingerprint.items() if stored.get(key) != here
    ]
    if faults:
        raise LoraMsError(f"{path}: made by a run with other settings: {'; '.join(faults)}")
    entries = storage.read_header(path / OPTIMIZER)
    optimizer.restore({name: storage.read(entry, "float32") for name, entry in entries.items()})
    return stored
