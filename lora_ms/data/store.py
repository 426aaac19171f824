"""Token rows as a few flat arrays, in memory or mapped from files: a million rows cost no million objects."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.example import IGNORE_INDEX, TokenRow

CHUNK = 1 << 22  # numbers looked at together


class Columns(NamedTuple):
    """The arrays of a store; row i is [ends[i - 1], ends[i]) of the first two, and its name likewise."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    ends: NDArray[np.int64]  # [rows]
    names: NDArray[np.uint8]  # UTF-8
    name_ends: NDArray[np.int64]  # [rows]
    liked: NDArray[np.uint8]  # [rows]: 0 for an answer that is not wanted, in data of preferences


class TokenStore(Sequence[TokenRow]):
    """A sequence of ``TokenRow`` over flat arrays. A row is made when it is asked for."""

    def __init__(self, columns: Columns, key: str = "") -> None:
        self.columns = columns
        self.key = key  # name of the content; "" for a store in memory

    @classmethod
    def of(cls, rows: Iterable[TokenRow]) -> TokenStore:
        """A store in memory; a store is returned as it is."""
        if isinstance(rows, TokenStore):
            return rows
        rows = list(rows)
        names = [row.where.encode() for row in rows]
        return cls(
            Columns(
                ids=np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)]),
                labels=np.concatenate([np.empty(0, np.int32), *(row.labels for row in rows)]),
                ends=np.cumsum([len(row.input_ids) for row in rows], dtype=np.int64),
                names=np.frombuffer(b"".join(names), np.uint8),
                name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
                liked=np.array([row.liked for row in rows], np.uint8),
            )
        )

    @classmethod
    def join(cls, stores: Sequence[TokenStore]) -> TokenStore:
        """The rows of all stores, one after another."""
        if len(stores) == 1:
            return stores[0]
        parts = [store.columns for store in stores]
        tokens = np.cumsum([0, *(len(part.ids) for part in parts)])
        letters = np.cumsum([0, *(len(part.names) for part in parts)])
        return cls(
            Columns(
                ids=np.concatenate([part.ids for part in parts]),
                labels=np.concatenate([part.labels for part in parts]),
                ends=np.concatenate([part.ends + start for part, start in zip(parts, tokens, strict=False)]),
                names=np.concatenate([part.names for part in parts]),
                name_ends=np.concatenate([part.name_ends + start for part, start in zip(parts, letters, strict=False)]),
                liked=np.concatenate([part.liked for part in parts]),
            )
        )

    def led_by(self, ids: Sequence[int]) -> TokenStore:
        """Rows that begin with ``ids``, which are not learnt."""
        count = len(ids)
        if not count:
            return self
        old = self.columns
        starts = np.concatenate([[0], old.ends[:-1]]) + count * np.arange(len(self))
        places = np.arange(len(old.ids)) + count * (1 + np.repeat(np.arange(len(self)), self.lengths))

        def put(before: Sequence[int], numbers: NDArray[np.int32]) -> NDArray[np.int32]:
            array = np.empty(len(numbers) + count * len(self), np.int32)
            array[starts[:, None] + np.arange(count)] = np.asarray(before, np.int32)
            array[places] = numbers
            return array

        return TokenStore(
            old._replace(
                ids=put(ids, old.ids),
                labels=put([IGNORE_INDEX] * count, old.labels),
                ends=old.ends + count * np.arange(1, len(self) + 1),
            )
        )

    def take(self, indices: NDArray[np.int64]) -> TokenStore:
        """The rows of these indices."""
        return TokenStore.of([self[int(index)] for index in indices])

    @classmethod
    def load(cls, folder: Path) -> TokenStore:
        """The store that ``StoreWriter`` has left in ``folder``, mapped."""
        return cls(Columns(*(_map(folder / f"{name}.bin", dtype) for name, dtype in DTYPES.items())), folder.name)

    def __len__(self) -> int:
        return len(self.columns.ends)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self._part(self.columns.ends, index)
        return TokenRow(
            self.where(index), self.columns.ids[part], self.columns.labels[part], bool(self.columns.liked[index])
        )

    def where(self, index: int) -> str:
        """Name of a row, for error messages."""
        return self.columns.names[self._part(self.columns.name_ends, index)].tobytes().decode()

    def sources(self) -> NDArray[np.int64]:
        """[rows]: number of the row of a file that each comes from. Some conversations and texts become several rows,
        one after another under one name."""
        names = self.columns.names.tobytes()
        ends = self.columns.name_ends.tolist()
        numbers = np.zeros(len(self), np.int64)
        start = 0
        before = None
        for index, end in enumerate(ends):
            name = names[start:end]
            numbers[index] = name != before
            start = end
            before = name
        return np.cumsum(numbers) - 1

    @staticmethod
    def _part(ends: NDArray[np.int64], index: int) -> slice:
        return slice(int(ends[index - 1]) if index else 0, int(ends[index]))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.columns.ends, prepend=0)

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """Tokens of each row that are learnt; the size of ``TokenRow.learnt``."""
        return self._targets[0]

    @cached_property
    def input_lengths(self) -> NDArray[np.int64]:
        """Leading tokens of each row that the model must see; as ``TokenRow.input_length``."""
        return self._targets[1]

    @cached_property
    def _targets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        counts = np.zeros(len(self), np.int64)
        input_lengths = np.zeros(len(self), np.int64)
        for first, last in self.chunks():
            start = int(self.columns.ends[first - 1]) if first else 0
            learnt = self.columns.labels[start : int(self.columns.ends[last - 1])] != IGNORE_INDEX
            starts = np.concatenate([[0], self.columns.ends[first : last - 1] - start]).astype(np.int64)
            learnt[starts] = False  # nothing comes before a first token
            counts[first:last] = np.add.reduceat(learnt, starts, dtype=np.int64)
            positions = np.where(learnt, np.arange(len(learnt)), 0)
            input_lengths[first:last] = np.maximum(np.maximum.reduceat(positions, starts) - starts, 0)
            self.release()
        return counts, input_lengths

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about ``CHUNK`` tokens."""
        ends = self.columns.ends
        first = 0
        while first < len(self):
            start = int(ends[first - 1]) if first else 0
            last = max(int(np.searchsorted(ends, start + CHUNK, "right")), first + 1)
            yield first, last
            first = last

    def release(self) -> None:
        """Lets go of what was read of mapped files, so that a walk through all rows needs no memory."""
        for array in self.columns[:2]:
            if isinstance(array, np.memmap):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def checksum(self) -> int:
        """CRC-32 of all tokens, labels and lengths: tells whether the data is the same."""
        total = crc32(self.columns.ends.tobytes())
        for array in (self.columns.ids, self.columns.labels):
            for start in range(0, len(array), CHUNK):
                total = crc32(array[start : start + CHUNK].tobytes(), total)
                self.release()
        liked = self.columns.liked
        return total if liked.all() else crc32(liked.tobytes(), total)


DTYPES = {
    "ids": np.int32,
    "labels": np.int32,
    "ends": np.int64,
    "names": np.uint8,
    "name_ends": np.int64,
    "liked": np.uint8,
}


def _map(file: Path, dtype: type) -> NDArray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


class StoreWriter:
    """Appends rows to the files of a store; ``flush`` makes them last, and a later start goes on from there.

    rows, tokens, letters, digests: what an earlier start has flushed; whatever came after is cut off.

    Raises ValueError where the files do not hold that, and OSError.
    """

    def __init__(
        self, folder: Path, rows: int = 0, tokens: int = 0, letters: int = 0, digests: Mapping[str, str] | None = None
    ) -> None:
        self.rows = rows
        self.tokens = tokens
        self.letters = letters
        sizes = {"ids": tokens, "labels": tokens, "ends": rows, "names": letters, "name_ends": rows, "liked": rows}
        self.files: dict[str, BinaryIO] = {}
        self.digests = {}
        for name, count in sizes.items():
            size = count * np.dtype(DTYPES[name]).itemsize
            file = self.files[name] = open(folder / f"{name}.bin", "ab+")
            digest = self.digests[name] = sha256()
            file.seek(0)
            while piece := file.read(min(size - file.tell(), 1 << 20)):
                digest.update(piece)
            if digests is not None and digest.hexdigest() != digests[name]:
                self.close()
                raise ValueError(f"{name}.bin is damaged")
            file.truncate(size)

    def add(self, row: TokenRow) -> None:
        """One more row."""
        name = row.where.encode()
        self.rows += 1
        self.tokens += len(row.input_ids)
        self.letters += len(name)
        self._write("ids", row.input_ids.tobytes())
        self._write("labels", row.labels.tobytes())
        self._write("ends", self.tokens.to_bytes(8, "little"))
        self._write("names", name)
        self._write("name_ends", self.letters.to_bytes(8, "little"))
        self._write("liked", bytes([row.liked]))

    def _write(self, name: str, data: bytes) -> None:
        self.files[name].write(data)
        self.digests[name].update(data)

    def flush(self) -> dict[str, Any]:
        """Brings to disk what is buffered; the counts and digests to go on from."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        return {"rows": self.rows, "tokens": self.tokens, "letters": self.letters, "digests": digests}

    def close(self) -> None:
        """No more rows."""
        for file in self.files.values():
            file.close()
