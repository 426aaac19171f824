"""Files and folders that are written whole or not at all. Every saver goes through this module.

What is written stands beside its final name first, as ``.lora_ms-part.NAME``; it is brought to disk and then renamed. A
folder that is replaced stands aside as ``.lora_ms-old.NAME`` meanwhile. A finished folder holds ``lora-ms.sha256``, the
digests of its files in the format of ``sha256sum -c``: it says which files are ours, and finds those that have changed.
Files that belong together in a folder that holds others, too, are written in ``.lora_ms-set.NAME`` there, and have a
list of their own.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_ms.errors import LoraMsError, WriteError
from lora_ms.text import size_text

MARKER = "lora-ms.sha256"
PART, OLD = ".lora_ms-part.", ".lora_ms-old."  # before the name of what is being written, and of what it replaces
SET = ".lora_ms-set."  # before the name of the list of files that are placed together
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".gguf")  # ends of the names of files that nobody may lose
DIGEST_LENGTH = 66  # characters, with two spaces
MOST_LISTED = 1 << 24  # bytes of a list
LINES = re.compile(r"(?:[0-9a-f]{64}  [^\n]+\n)*")
BLOCK = 1 << 20  # bytes


def digest_of(file: Path, sync: bool = False) -> str:
    """SHA-256 of a file's content. sync: also bring it to disk."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
        if sync:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Brings the names in ``folder`` to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there; a link is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def final_of(part: Path) -> Path:
    """The folder that ``part`` is written for; another folder itself."""
    return part.with_name(part.name.removeprefix(PART))


# --- files


def create(file: Path) -> None:
    """A new empty file, with the permissions of the umask. A link of that name is replaced, not followed."""
    with suppress(FileNotFoundError):
        file.unlink()
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A path to write in place of ``file``: it takes its name at the end of the block, and goes where the block fails.
    In a folder that is itself being written (``new_folder``), it is ``file``: the folder is whole or not at all.

    Raises:
        WriteError: it cannot be written; ``file`` is as it was. In a folder that is being written, OSError.
    """
    whole_with_folder = is_unfinished(Path(file.parent.name)) and file.name != MARKER
    part = file if whole_with_folder else file.with_name(PART + file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        create(part)
        mode = part.stat().st_mode
        yield part
        part.chmod(stat.S_IMODE(mode))  # some libraries set their own
        if whole_with_folder:
            return
        sync(part)
        os.replace(part, file)
        _sync_folder(file.parent)
    except OSError as error:
        if whole_with_folder:
            raise
        raise WriteError(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        if not whole_with_folder:
            with suppress(OSError):
                part.unlink()


def _digest_file(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def write_digest(file: Path) -> None:
    """Writes the digest of ``file`` beside it, in the format of ``sha256sum -c``. Raises WriteError."""
    with new_file(_digest_file(file)) as part:
        part.write_text(f"{digest_of(file)}  {file.name}\n", encoding="utf-8")


def has_digest(file: Path) -> bool:
    """Whether ``file`` is what ``write_digest`` has seen."""
    try:
        return _digest_file(file).read_bytes() == f"{digest_of(file)}  {file.name}\n".encode()
    except OSError:
        return False


def append(file: Path, text: str) -> None:
    """Adds ``text`` at the end of ``file``, all of it or nothing; a link is not followed. Raises OSError."""
    data = text.encode("utf-8", "backslashreplace")
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    try:
        size = os.fstat(handle).st_size
        try:
            written = os.write(handle, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def cut(file: Path, size: int) -> None:
    """Leaves the first ``size`` bytes of ``file``; a link is not followed. Raises OSError."""
    handle = os.open(file, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_size > size:
            os.ftruncate(handle, size)
    finally:
        os.close(handle)


def sync(file: Path) -> None:
    """Brings the content of ``file`` to disk. Raises OSError."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


# --- folders


def files_of(folder: Path) -> list[str]:
    """Every file in ``folder`` and in the folders below, by its path from there; links are files."""
    found = []
    for base, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        found += [os.path.relpath(os.path.join(base, name), folder) for name in [*names, *links]]
    return sorted(found)


def listed(folder: Path, marker: str = MARKER) -> dict[str, str] | None:
    """The digests of the files that we wrote into ``folder``, by name; None where it is not ours.

    marker: the list's name.

    Raises:
        LoraMsError: the list is damaged.
    """
    file = folder / marker
    if not os.path.lexists(file):
        return None
    try:
        fits = file.is_file() and file.stat().st_size <= MOST_LISTED
        text = file.read_text(encoding="utf-8") if fits else "too large, or no file"
    except (OSError, ValueError) as error:
        raise LoraMsError(f"{file}: not readable ({error})") from None
    lines = text.split("\n")[:-1] if LINES.fullmatch(text) else [".."]
    names = [line[DIGEST_LENGTH:] for line in lines]
    if any(name.startswith("/") or ".." in name.split("/") for name in names) or lines == [".."]:
        raise LoraMsError(f"{file}: damaged: it is not a list of digests of files in its folder")
    return {name: line[: DIGEST_LENGTH - 2] for name, line in zip(names, lines, strict=True)}


def seal(
    folder: Path,
    names: Sequence[str] | None = None,
    marker: str = MARKER,
    digests: Mapping[str, str] | None = None,
) -> None:
    """Brings files of ``folder`` to disk, and then the list of their digests.

    names: the files that are ours; None: all. digests: of further ones that are ours and known to be on disk.
    """
    names = [name for name in (files_of(folder) if names is None else names) if name != marker]
    found = {**(digests or {}), **{name: digest_of(folder / name, sync=True) for name in names}}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(found.items())]
    for below in {os.path.dirname(name) for name in names} - {""}:
        _sync_folder(folder / below)
    with new_file(folder / marker) as part:
        part.write_text("".join(lines), encoding="utf-8")


def changed(folder: Path, marker: str = MARKER) -> str | None:
    """What is wrong with the files that the list ``marker`` names, in a few words; None where all are as written.

    Raises:
        LoraMsError: there is no such list, or it is damaged.
    """
    digests = listed(folder, marker)
    if digests is None:
        raise LoraMsError(f"{folder}: holds no {marker}, so that its files cannot be verified")
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            found = digest_of(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != digest:
            return f"{name} is damaged: its SHA-256 is {found[:16]}…, and {digest[:16]}… in {marker}"
    return None


def verify(folder: Path) -> None:
    """Raises LoraMsError where a file of ``folder`` is not as it was written."""
    fault = changed(folder)
    if fault:
        raise LoraMsError(f"{folder}: {fault}")


def is_intact(folder: Path, marker: str = MARKER) -> bool:
    """Whether ``folder`` was finished, and all its files are as they were written."""
    try:
        return folder.is_dir() and changed(folder, marker) is None
    except LoraMsError:
        return False


def _ours(folder: Path) -> dict[str, str]:
    """``listed`` of a folder that may be nobody's, or not be there."""
    try:
        return listed(folder) or {}
    except LoraMsError:
        return {}


def foreign(folder: Path) -> list[str]:
    """Files in ``folder`` that we did not write, the folder itself where it is a file or link; empty where it is not
    there. Those of an unfinished ``PART`` or ``OLD`` are not among them."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [folder.name]
    ours = _ours(folder)
    return [name for name in files_of(folder) if name not in ours and name != MARKER and not is_unfinished(Path(name))]


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` is, or is in, something that was being written or replaced when its process ended."""
    return any(part.startswith((PART, OLD)) for part in path.parts)


def _swap(part: Path, folder: Path) -> None:
    """Puts the finished ``part`` in place of ``folder``, which stands aside meanwhile."""
    old = folder.with_name(OLD + folder.name)
    delete(old)
    if os.path.lexists(folder):
        os.rename(folder, old)
        try:
            os.rename(part, folder)
        except OSError:
            os.rename(old, folder)
            raise
    else:
        os.rename(part, folder)
    _sync_folder(folder.parent)
    delete(old)


def _keep(names: Iterable[str], folder: Path, part: Path, replaced: re.Pattern | None) -> None:
    """Links into ``part`` those files ``names`` of ``folder`` that have no name of a new one and do not match
    ``replaced``."""
    for name in names:
        there = os.path.lexists(part / name) or not os.path.lexists(folder / name)
        if there or (replaced is not None and replaced.fullmatch(name)):
            continue
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, part / name, follow_symlinks=False)
        except OSError:  # not every file system has links
            shutil.copy2(folder / name, part / name, follow_symlinks=False)


def recover(folder: Path) -> None:
    """Clears up after a process that ended while it wrote ``folder``: a finished one takes its place, an unfinished
    one is removed, and one that stood aside comes back where nothing took its place. Raises OSError."""
    part, old = folder.with_name(PART + folder.name), folder.with_name(OLD + folder.name)
    if part.is_dir() and is_intact(part):
        _swap(part, folder)
    else:
        delete(part)
    if not os.path.lexists(folder) and os.path.lexists(old):
        os.rename(old, folder)
    else:
        delete(old)


def recover_all(parent: Path) -> None:
    """``recover`` for everything in ``parent``, whose lock is held. Raises OSError."""
    left = [name for name in os.listdir(parent) if name.startswith((PART, OLD))] if parent.is_dir() else []
    for name in sorted({name.removeprefix(PART).removeprefix(OLD) for name in left}):
        recover(parent / name)


def _check_weights(folder: Path, replaced: re.Pattern | None) -> None:
    """Raises WriteError where weights that we wrote into ``folder`` would be gone after ``new_folder``."""
    lost = [
        name
        for name in sorted(_ours(folder))
        if name.endswith(WEIGHTS) and (replaced is None or not replaced.fullmatch(name)) and (folder / name).exists()
    ]
    if lost:
        raise WriteError(f"cannot write {folder}: it holds {lost[0]}, which would be gone: give another folder")


@contextmanager
def new_folder(
    folder: Path, size: int = 0, replaced: re.Pattern | None = None, beside: bool = False, own: bool = False
) -> Iterator[Path]:
    """A folder to fill in place of ``folder``: it takes its name at the end of the block, with all its files on disk.

    Files of others in ``folder`` stay, but for those that have a name of a new one or match ``replaced``. What we wrote
    there earlier goes, but never weights that do not match ``replaced``.

    size: bytes that will be written, or 0 where that is not known.
    beside: what we wrote there earlier stays as files of others do.
    own: of a run, whose earlier weights there may go.

    Raises:
        WriteError: too little room, another process at it, weights that would go, or the folder cannot be written; it
            is as it was then.
    """
    try:
        folder = folder.absolute()
    except OSError as error:
        raise WriteError(f"cannot write {folder}: the current folder is gone ({error.strerror})") from None
    if folder.is_symlink() and folder.exists():
        folder = folder.resolve()  # written where the link leads, and by its disk's room
    part = folder.with_name(PART + folder.name)
    made = [parent for parent in folder.parents if not parent.exists()]
    unfinished = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            os.listdir(folder)  # fails at once where it is a file
            if Path.cwd().is_relative_to(folder.resolve()) or os.path.ismount(folder):
                why = "it is the current folder, or one above it or on a disk of its own, which cannot be replaced"
                raise WriteError(f"cannot write {folder}: {why}; give a new folder in it")
        free = shutil.disk_usage(folder.parent).free
        if free < size:
            raise WriteError(f"cannot write {folder}: {size_text(size)} are needed, {size_text(free)} are free")
        if part.is_dir():
            with locked(part):
                recover(folder)
        else:
            recover(folder)
        if not (beside or own):
            _check_weights(folder, replaced)
        part.mkdir()
        unfinished = True
        with locked(part):
            yield part
            ours = files_of(part)
            earlier = _ours(folder) if beside else {}
            _keep([*foreign(folder), *earlier] if folder.is_dir() else [], folder, part, replaced)
            seal(part, ours, digests={name: digest for name, digest in earlier.items() if os.path.lexists(part / name)})
            unfinished = False
            _swap(part, folder)
    except OSError as error:
        here = error.filename is None or Path(error.filename).absolute().is_relative_to(folder.parent)
        what = f"write {folder}" if here else f"read {error.filename}"
        kept = "" if unfinished or not part.exists() else f"; what was to be there is complete in {part}"
        raise WriteError(f"cannot {what}: {error.strerror or error}{kept}") from None
    finally:
        if unfinished:
            delete(part)
        for parent in made if not (folder.exists() or part.exists()) else ():
            with suppress(OSError):
                parent.rmdir()


def remove(folder: Path) -> None:
    """Removes what we wrote into ``folder``, and the folder where it holds nothing else. Raises OSError."""
    if foreign(folder):
        for name in [*(listed(folder) or {}), MARKER]:
            (folder / name).unlink(missing_ok=True)
        return
    part = folder.with_name(PART + folder.name)
    delete(part)
    os.rename(folder, part)
    (part / MARKER).unlink(missing_ok=True)  # unfinished from here on: ``recover`` removes what is left
    delete(part)


# --- files that belong together


def set_of(folder: Path, marker: str) -> Path:
    """The folder in which files are written that ``place_set`` puts into ``folder`` together, with the list ``marker``.

    It outlives the process that fills it, so that the next one can go on.
    """
    return folder / f"{SET}{marker}"


def place_set(folder: Path, marker: str, names: Sequence[str]) -> None:
    """Puts the files ``names`` of ``set_of`` into ``folder``, in place of those that its earlier list ``marker`` names.
    Where that is interrupted, ``finish_set`` goes on. Raises OSError and WriteError."""
    seal(set_of(folder, marker), names, marker)
    finish_set(folder, marker)


def set_is_unfinished(folder: Path, marker: str) -> bool:
    """Whether ``place_set`` has begun in ``folder`` and not ended: some of its files are missing there."""
    return os.path.lexists(set_of(folder, marker) / marker)


def finish_set(folder: Path, marker: str) -> None:
    """Ends a ``place_set`` that was interrupted, if there is one.

    Raises:
        LoraMsError: its list is damaged.
        OSError: a file cannot be placed.
    """
    part = set_of(folder, marker)
    new = listed(part, marker) if part.is_dir() and not part.is_symlink() else None
    if new is None:
        return
    try:
        old = listed(folder, marker) or {}
    except LoraMsError:
        old = {}
    waiting = [name for name in new if os.path.lexists(part / name)]
    for name in old:  # all of them before the first new one, so that old and new files never stand side by side
        if name in waiting or name not in new:
            (folder / name).unlink(missing_ok=True)
    for name in waiting:
        os.replace(part / name, folder / name)
    _sync_folder(folder)
    os.replace(part / marker, folder / marker)
    _sync_folder(folder)
    delete(part)


# --- who may write, and whose files are read


def lock(folder: Path, wait: bool = False) -> int:
    """Holds ``folder`` against other processes; the handle returned, closed, lets it go, and so does the process's end.

    Where a file system has no locks, nothing is held.

    wait: for the other process to let it go. Raises WriteError where another process has it, and OSError.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ENOLCK, errno.EINVAL):
            os.close(handle)
            if isinstance(error, BlockingIOError):
                message = f"{folder} is being written by another process: wait for it, or stop it"
                raise WriteError(message) from None
            raise
    return handle


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """``lock`` inside the block."""
    handle = lock(folder, wait)
    try:
        yield
    finally:
        os.close(handle)


def make_private(folder: Path) -> str | None:
    """Makes ``folder``, or takes the others' permissions from it; why it cannot be trusted, in a few words, or None.

    A folder is trusted that is nobody else's, and in which nobody else could have written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            return f"belongs to another user ({found.st_uid})"
        if found.st_mode & 0o022:
            return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    return None
