"""Whether the processes of a run were started with the same settings and the same code."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from lora_ms.errors import LoraMsError
from lora_ms.text import listed

PACKAGE = Path(__file__).parents[1]
PIECES, BITS = 3, 16  # of a digest, as whole numbers whose sum over ranks float32 holds exactly


def code_digest() -> str:
    """A digest of this program's sources and of MindSpore's version."""
    digest = hashlib.sha256(ms.__version__.encode())
    for file in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".h", ".cpp")):
        digest.update(str(file.relative_to(PACKAGE)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check_agreement(
    values: Mapping[str, object], sum_over_ranks: Callable[[Tensor], Tensor], world: int, code: str = ""
) -> None:
    """Raises LoraMsError where a process of the run has other ``values``, by name, or other ``code``.

    All ranks call it. Where they differ, at least one of them sees it, and its end ends the run.
    """
    names = sorted(values)
    if _differs([f"{code} {names}"], sum_over_ranks, world).any():
        raise LoraMsError(
            "the processes of this run have different versions of this program, or of MindSpore: install the same one "
            "on every machine"
        )
    differs = _differs([repr(values[name]) for name in names], sum_over_ranks, world)
    if differs.any():
        here = [f"{name} {values[name]!r}" for name, odd in zip(names, differs, strict=True) if odd]
        raise LoraMsError(
            f"the processes of this run were started with different settings: here {listed(here, most=3)}; give all of "
            "them the same YAML and flags"
        )


def _differs(texts: list[str], sum_over_ranks: Callable[[Tensor], Tensor], world: int) -> np.ndarray:
    """[texts]: whether this rank's is another than the ranks' mean."""
    digests = [hashlib.sha256(text.encode(errors="surrogateescape")).digest() for text in texts]
    size = BITS // 8
    own = [[int.from_bytes(d[i * size : (i + 1) * size], "little") for i in range(PIECES)] for d in digests]
    mine = np.array(own, np.float32)
    total = sum_over_ranks(Tensor(mine.ravel())).asnumpy().reshape(mine.shape)
    return (total != mine * world).any(1)
