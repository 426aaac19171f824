"""Flips bits at random places of a checkpoint: ``python tests/saving/flips.py output/checkpoints/step_100 [NUMBER]``

One bit at a time, of any of its files, its list of digests among them, every byte being as likely as any other; every
second flip is in one of the small files, which would hardly be met otherwise. A copy is damaged. The exit status is the
number of flips that were not found.
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from lora_ms import saving


def main(checkpoint: Path, number: int) -> int:
    dice = random.Random(0)
    missed = 0
    flipped: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(checkpoint, Path(name) / checkpoint.name))
        saving.verify(copy)
        sizes = {file: (copy / file).stat().st_size for file in saving.files_of(copy)}
        for turn in range(number):
            weights = list(sizes.values()) if turn % 2 else [size < 10_000 for size in sizes.values()]
            (file,) = dice.choices(list(sizes), weights)
            whole = (copy / file).read_bytes()
            data = bytearray(whole)
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            (copy / file).write_bytes(data)
            missed += saving.is_intact(copy)
            flipped[file] += 1
            (copy / file).write_bytes(whole)
    print(f"{number - missed} of {number} found: {dict(flipped)}")
    return missed


if __name__ == "__main__":
    sys.exit(min(100, main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 200)))
