"""The file that ``lora-ms fisher`` writes, and the factors of earlier adapters: what terms of the loss read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.adapters.peft_files import read_entries, split_key
from lora_ms.errors import LoraMsError
from lora_ms.reading import parse_json

KEY = "lora_ms_fisher"  # of the metadata
Array = NDArray[np.float32]


class Fisher(NamedTuple):
    """Diagonal Fisher information: of each parameter, the mean over rows of the squared gradient of the row's loss."""

    values: Mapping[str, storage.Entry]  # by the parameter's dotted path, float32
    rows: int
    start: str  # digest_of_values of the parameters that it was measured at

    def of(self, name: str) -> Array | None:
        """The values of one parameter; None where there are none."""
        return storage.read(self.values[name], np.float32) if name in self.values else None


def read(file: Path) -> Fisher:
    """Raises LoraMsError where ``file`` is none that ``write`` wrote, or holds other numbers than 0 and more."""
    if not file.is_file():
        raise LoraMsError(f"{file}: no such file: lora-ms fisher writes it (objectives: ewc: fisher)")
    entries = storage.read_header(file)
    try:
        settings = parse_json(storage.read_metadata(file)[KEY])
        rows, start = settings["rows"], settings["start"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise LoraMsError(f"{file}: no Fisher information: lora-ms fisher writes such files") from None
    if type(rows) is not int or rows < 1 or not isinstance(start, str) or not entries:
        raise LoraMsError(f"{file}: its metadata are none that lora-ms fisher has written")
    for name, entry in entries.items():
        blocks = storage.read_blocks(entry)
        if entry.dtype != "F32" or not all(np.isfinite(block).all() and (block >= 0).all() for block in blocks):
            raise LoraMsError(f"{file}: {name} holds other than float32 numbers of 0 and more")
    return Fisher(entries, rows, start)


def write(file: Path, values: Mapping[str, Array], settings: Mapping[str, Any]) -> None:
    """settings: ``rows`` and ``start`` among them, as JSON values."""
    storage.write_tensors(file, values, {KEY: json.dumps(settings)})


def digest_of_values(values: Mapping[str, NDArray]) -> str:
    """Tells whether parameters have the same names and values."""
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].shape}".encode())
        digest.update(np.ascontiguousarray(values[name], np.float32).tobytes())
    return digest.hexdigest()


def earlier_factors(folder: Path) -> dict[str, Array]:
    """A [rank, in] of every module of the adapter in ``folder``, by the module's path.

    Raises:
        LoraMsError: there are none.
    """
    if not folder.is_dir():
        raise LoraMsError(f"objectives: orthogonal: adapters: {folder} is not a folder")
    found = {}
    for name, entry in read_entries(folder).items():
        key = split_key(name)
        if key is not None and key.tensor.startswith("lora_A") and len(entry.shape) == 2:
            found[key.module] = storage.read(entry, np.float32)
    if not found:
        raise LoraMsError(f"{folder}: an adapter without A, which has nothing to be orthogonal to")
    return found
