"""Files that others made: how they are opened, how much of them is read, and what is said of one that cannot be.

A model, an adapter or a dataset comes from strangers. A file of theirs is a regular file inside their folder, of a size
that its kind can have; and whatever goes wrong as it is read is one line that names it.
"""

import codecs
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lora_ms.errors import LoraMsError

CONFIG_SIZE = 10 * 2**20  # bytes of a file of settings
JSON_SIZE = 100 * 10**6  # bytes of other JSON: the index of a model's shards, a tokenizer


def member(folder: str | os.PathLike, name: str) -> Path:
    """The path of file ``name`` of a folder, whether there or not.

    A link may lead to another file of the folder, or to a file in the cache of Hugging Face's hub, whose folders are
    made of such links.

    Raises:
        LoraMsError: the name, or a link, leads out of the folder.
    """
    folder = Path(folder)
    file = folder / name
    try:
        root, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null byte
        raise LoraMsError(f"{folder}: {name!r} is no file of it ({reason(error)})") from None
    if "\0" in name or not (target.is_relative_to(root) or (file.is_symlink() and _in_hub(target))):
        where = f"{folder}: {name} leads out of the folder, to {target}"
        raise LoraMsError(f"{where}: only files inside it are read; copy the file there")
    return file


def _in_hub(target: Path) -> bool:
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")


PICKLES = (".bin", ".pt", ".pth")  # how PyTorch's files are called; others have MindSpore's .ckpt


def refuse_pickle(file: Path) -> None:
    """Raises LoraMsError for a file of PyTorch's, by its name or its beginning: reading it could run code in it."""
    start = b""
    if file.is_file():
        with opened(file) as stream:
            start = stream.read(4)
    if file.suffix in PICKLES or start[:1] == b"\x80" or start == b"PK\x03\x04":
        raise LoraMsError(
            f"{file}: a file of PyTorch's, which can hold code, and is not read: save the model as safetensors "
            "(transformers: model.save_pretrained(DIR))"
        )


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises:
        LoraMsError: there is none, it may not be read, or it is a pipe or a device, which might never end.
    """
    try:
        number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LoraMsError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise LoraMsError(f"{file}: cannot be read: {reason(error)}") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise LoraMsError(f"{file}: not a regular file")
    with os.fdopen(number, "rb") as stream:
        yield stream


@contextmanager
def opened_text(file: Path) -> Iterator[BinaryIO]:
    """As ``opened``, for a text: one in UTF-16, which Windows' programs write and begin with its mark, is in UTF-8, and
    cannot be sought in."""
    with opened(file) as stream:
        mark = stream.read(2)
        stream.seek(0)
        if mark not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            yield stream
            return
        with io.BufferedReader(_InUtf8(file, stream)) as recoded:
            yield recoded


class _InUtf8(io.RawIOBase):
    """The bytes in UTF-8 of a text in UTF-16; line ends are as they are."""

    def __init__(self, file: Path, stream: BinaryIO):
        self._file = file
        self._text = io.TextIOWrapper(stream, encoding="utf-16", newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            try:
                self._rest = self._text.read(2**16).encode()
            except UnicodeError:
                raise LoraMsError(f"{self._file}: begins as UTF-16 and is none; save the file as UTF-8") from None
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def read_bytes(file: Path, most: int) -> bytes:
    """The bytes of a regular file of at most ``most`` of them."""
    with opened(file) as stream, readable(file, "a file"):
        if os.fstat(stream.fileno()).st_size > most:
            raise too_large(file, most)
        content = stream.read(most + 1)
    if len(content) > most:
        raise too_large(file, most)
    return content


def too_large(file: Path, most: int) -> LoraMsError:
    return LoraMsError(f"{file}: larger than {most / 1e6:,.0f} MB, which no file of its kind is")


def read_text(file: Path, most: int = CONFIG_SIZE) -> str:
    """A text in UTF-8."""
    content = read_bytes(file, most)
    with readable(file, "UTF-8 text"):
        return content.decode("utf-8")


def read_json(file: Path, most: int = JSON_SIZE) -> dict:
    """The object in ``file``.

    Raises:
        LoraMsError: the file is missing, too large, does not parse, has a key twice or holds something else.
    """
    content = read_bytes(file, most)
    with readable(file, "JSON"):
        value = parse_json(content.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise LoraMsError(f"{file}: holds no JSON object")
    return value


def parse_json(text: str, **hooks: Any) -> Any:
    """Raises ValueError, also where a key stands twice in an object, or RecursionError. hooks: ``json.loads``'s."""
    return json.loads(text, object_pairs_hook=_object, **hooks)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"the key {name[:80]!r} stands twice in one object")
        seen.add(name)
    raise AssertionError


@contextmanager
def readable(where: object, kind: str, advice: str = "") -> Iterator[None]:
    """Inside, whatever a library raises as it reads becomes one line: libraries raise more than their pages say, and
    those in Rust panic.

    where: the file, at the beginning of the line.
    kind: what it should have been.
    """
    try:
        yield
    except (LoraMsError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as fault:  # a panic is no Exception
        text = f"{where}: not readable as {kind} ({reason(fault)})"
        raise LoraMsError(f"{text}; {advice}" if advice else text) from fault


def reason(fault: BaseException) -> str:
    """What went wrong, in a few words."""
    if isinstance(fault, RecursionError):
        return "nested too deeply"
    if isinstance(fault, MemoryError):
        return "too little memory"
    if isinstance(fault, UnicodeDecodeError):
        return f"byte 0x{fault.object[fault.start]:02x} at {fault.start:,} is not UTF-8"
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    if isinstance(fault, KeyError):
        return f"{fault} is missing"
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]  # MindSpore's are followed by its own
    return lines[0][:200].rstrip(". ") if lines else type(fault).__name__
