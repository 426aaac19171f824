"""Models, adapters and datasets by name: a hub's own library fetches them, and they are read like any other folder.

What is there under the name as a path is that path, always. Only files that are read here are fetched, never code or
pickles; a download goes on where the last one was cut, and each file must have the digest that the hub lists. What has
once been fetched is used without asking the hub; ``lora-ms download`` looks for newer files.
"""

import fnmatch
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from lora_ms import saving, storage
from lora_ms.config import RunConfig
from lora_ms.config.sections import Dataset
from lora_ms.data.readers import SPLITS, is_of_split
from lora_ms.errors import LoraMsError
from lora_ms.recipes.model_folder import TOKENIZER_FILES
from lora_ms.runtime.host import cache_folder
from lora_ms.text import counted, escaped, listed, size_text, unescaped

# two parts of letters, digits, dots, dashes and underscores, as both hubs have it
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# a name that ends so is a path
FILE_SUFFIXES = (*DATA_SUFFIXES, ".mindrecord", ".ckpt", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".yaml")
TOKENIZER = (*TOKENIZER_FILES, "additional_chat_templates/*.jinja")
MODEL = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
PATTERNS = {
    "model": (*MODEL, "model-*-of-*.safetensors", *TOKENIZER),
    "adapter": ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER),
    "dataset": tuple(f"*{suffix}" for suffix in DATA_SUFFIXES),
}
NEEDED = {"model": "config.json", "adapter": "adapter_config.json"}  # no folder of the kind is without it
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt")
DESCRIPTIONS = re.compile(r"(.*/)?(dataset_infos?|dataset_dict|state|config)\.json")  # no rows are in these
HUBS = ("hf", "modelscope")
ANSWER_SECONDS = 10.0  # until a hub that does not answer is given up
ATTEMPTS = 5  # at a download whose connection is cut
BLOCK = 1 << 20  # bytes


class Wanted(NamedTuple):
    """What is asked of a hub.

    Fields:
        name: ``owner/name``.
        kind: model, adapter or dataset.
        hub: hf or modelscope.
        revision: branch, tag or commit; None for the hub's default branch.
        split: of a dataset, or None for all its files.
        said: begins error lines, such as "load_checkpoint: ".
    """

    name: str
    kind: str = "model"
    hub: str = "hf"
    revision: str | None = None
    split: str | None = None
    said: str = ""

    def fault(self, text: str) -> LoraMsError:
        return LoraMsError(f"{self.said}{text}")


class Listing(NamedTuple):
    """What a hub holds under a name. files: size in bytes and digest of each; a digest is ``sha256:…``, ``git:…`` or
    ``""``, where the hub lists none."""

    commit: str
    files: dict[str, tuple[int, str]]
    host: str


# --- names and paths


def is_name(text: str) -> bool:
    """Whether ``text`` is a name for a hub: one slash, and nothing of that name here."""
    if not NAME.fullmatch(text) or text.lower().endswith(FILE_SUFFIXES):
        return False
    return not os.path.lexists(text)


def local_folder(
    path: str | os.PathLike, kind: str = "model", hub: str = "hf", revision: str | None = None, said: str = ""
) -> Path:
    """``path`` itself, or, where it is a name, the folder into which it was fetched.

    Raises:
        LoraMsError: nothing of that name is here, and the hub does not have it, or cannot be reached.
    """
    if not is_name(os.fspath(path)):
        return Path(path)
    return fetch(Wanted(os.fspath(path), kind, hub, revision, None, said))


def cached_folder(name: str) -> Path | None:
    """The folder of the model ``name`` in a cache of this machine; None where it is not there. Asks no hub."""
    wanted = Wanted(name)
    return _fetched_before(wanted) or _cached_by_others(wanted)


def local_rows(path: str, split: str = "train", hub: str = "hf", revision: str | None = None, said: str = "") -> str:
    """``path`` itself, or, where it is a name, the file of a dataset's ``split``, or a glob for its files."""
    if not is_name(path):
        return path
    wanted = Wanted(path, "dataset", hub, revision, split, said)
    folder = fetch(wanted)
    names = sorted(_files_of_split(wanted, _data_files(folder)))
    paths = [glob.escape(str(folder / name)) for name in names]
    if len(paths) == 1:
        return str(folder / names[0])
    start, end = os.path.commonprefix(paths), os.path.commonprefix([each[::-1] for each in paths])[::-1]
    pattern = f"{start}*{end[max(0, len(start) + len(end) - min(map(len, paths))) :]}"
    folders = sorted({os.path.dirname(name) or "." for name in names})
    if len(folders) > 1 or sorted(glob.glob(pattern)) != [str(folder / name) for name in names]:
        raise wanted.fault(
            f"{path} holds several files of rows: {listed(names, 4, ', ')}; fetch it by lora-ms download {path} --kind "
            "dataset --output_dir DIR, and give one of them"
        )
    return pattern


def fetch_named(config: RunConfig, command: str) -> None:
    """Fetches what ``config`` names and ``command`` reads, and puts the paths in the names' place.

    Raises:
        LoraMsError: as ``local_folder``.
    """
    hub, revision = config.hub, config.revision or None
    if config.load_checkpoint:
        folder = local_folder(config.load_checkpoint, "model", hub, revision, "load_checkpoint: ")
        config.load_checkpoint = str(folder)
    if config.load_adapter:
        config.load_adapter = str(local_folder(config.load_adapter, "adapter", hub, None, "load_adapter: "))
    if command in ("finetune", "fisher", "estimate", "preview", "preprocess"):
        _fetch_rows(config.train_dataset, "train_dataset", hub, "train")
    if command == "eval" or (command == "finetune" and config.evaluates):
        _fetch_rows(config.eval_dataset, "eval_dataset", hub, "test")
    if command == "sequence":
        _fetch_tasks(config)
    elif command in ("finetune", "eval"):
        _fetch_sets(config)


def _fetch_sets(config: RunConfig, needed: bool = True) -> None:
    split = config.eval_dataset.data_loader.split or "test"
    for name, rows in config.evaluation.sets.items():
        rows.dataset_dir = _rows_if(needed, rows.dataset_dir, split, config.hub, f"evaluation.sets.{name}: ")


def _fetch_tasks(config: RunConfig) -> None:
    """The rows of ``sequence.tasks``, and those that are replayed and scored beside them; what is learnt is not read
    again."""
    from lora_ms.recipes.sequence import is_done

    tasks = config.sequence.tasks
    to_learn = [not is_done(config, number) for number in range(len(tasks))]
    learnt = config.train_dataset.data_loader.split or "train"
    scored = config.eval_dataset.data_loader.split or "test"
    for task, needed in zip(tasks, to_learn, strict=True):
        said = f"sequence.tasks, {task.name}: "
        task.dataset_dir = _rows_if(needed, task.dataset_dir, learnt, config.hub, said)
        task.eval_dir = _rows_if(any(to_learn), task.eval_dir, scored, config.hub, said)
    for part in config.train_dataset.mix:
        if part.role == "general":
            part.dataset_dir = _rows_if(any(to_learn), part.dataset_dir, learnt, config.hub, "train_dataset.mix: ")
    _fetch_sets(config, any(to_learn))


def _rows_if(needed: bool, path: str, split: str, hub: str, said: str) -> str:
    """``local_rows``; where they are not ``needed`` and not to be had, ``path``.

    The settings of a sequence have the path of what was fetched, so that also what is not needed is asked for.
    """
    try:
        return local_rows(path, split, hub, said=said)
    except LoraMsError:
        if needed:
            raise
        return path


def _fetch_rows(dataset: Dataset, name: str, hub: str, split: str) -> None:
    """split: where ``data_loader`` names none."""
    loader = dataset.data_loader
    split = loader.split or split
    if dataset.mix:
        for part in dataset.mix:
            part.dataset_dir = local_rows(part.dataset_dir, split, hub, said=f"{name}.mix: ")
        return
    place = loader.dataset_dir or ("" if loader.data_files else loader.path)
    if place and is_name(place):
        loader.dataset_dir = local_rows(place, split, hub, said=f"{name}: ")


# --- what has been fetched before


def _record(wanted: Wanted) -> Path:
    text = "\n".join((wanted.hub, wanted.kind, wanted.name, wanted.revision or "", wanted.split or ""))
    folder = cache_folder("hub") / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(exist_ok=True)
    return folder / "fetched.json"


def _fetched_before(wanted: Wanted, commit: str | None = None) -> Path | None:
    """The folder that holds all files of an earlier download; commit: of this one only."""
    try:
        found = json.loads(_record(wanted).read_text("utf-8"))
        folder = Path(found["folder"])
        whole = all((folder / name).stat().st_size == size for name, size in found["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole and commit in (None, found.get("commit")) else None


def _note(wanted: Wanted, folder: Path, listing: Listing) -> None:
    text = json.dumps(
        {
            "name": wanted.name,
            "commit": listing.commit,
            "folder": str(folder),
            "files": {name: size for name, (size, _) in listing.files.items()},
        }
    )
    with saving.new_file(_record(wanted)) as part:
        part.write_text(text, "utf-8")


# --- the download


def fetch(wanted: Wanted, output_dir: Path | None = None, refresh: bool = False) -> Path:
    """Fetches from the hub, and returns the folder: one of the hub's own cache, or ``output_dir``.

    refresh: ask the hub for newer files, too, where all are here.

    Raises:
        LoraMsError: the hub cannot be reached, has no such thing, or sends something else than it lists.
    """
    if wanted.hub not in HUBS:
        raise wanted.fault(f"hub {wanted.hub!r} is none of {', '.join(HUBS)}")
    if output_dir is not None:
        return _fetch(wanted, output_dir, refresh)
    with saving.locked(_record(wanted).parent, wait=True):  # of several processes, one fetches
        before = None if refresh else _fetched_before(wanted)
        return _fetch(wanted, None, refresh) if before is None else before


def _fetch(wanted: Wanted, output_dir: Path | None, refresh: bool) -> Path:
    look, load = (_look_hf, _load_hf) if wanted.hub == "hf" else (_look_modelscope, _load_modelscope)
    try:
        listing = look(wanted)
    except LoraMsError as error:
        cached = None if refresh or output_dir is not None or wanted.hub != "hf" else _cached_by_others(wanted)
        if cached is None:
            raise
        print(f"{wanted.name}: taken from {cached}, where another program has put it ({error})")
        return cached
    listing = listing._replace(files=_wanted_files(wanted, listing.files))
    before = _fetched_before(wanted, listing.commit)
    if before is not None and output_dir is None:
        return before
    total = sum(size for size, _ in listing.files.values())
    place = output_dir or "its cache"
    print(f"{wanted.name}: {counted(len(listing.files), 'file')}, {size_text(total)}, from {listing.host} to {place}")
    if output_dir is not None and (output_dir.exists() or output_dir.parent.exists()):
        free = shutil.disk_usage(output_dir if output_dir.exists() else output_dir.parent).free
        if free < total:
            raise wanted.fault(f"{size_text(total)} are needed in {output_dir}, {size_text(free)} are free")
    folder = _with_attempts(wanted, lambda: load(wanted, list(listing.files), output_dir))
    _verify(wanted, folder, listing)
    if output_dir is None:
        _note(wanted, folder, listing)
    return folder


def _with_attempts(wanted: Wanted, load: Callable[[], Path]) -> Path:
    """Goes on with a download whose connection was cut."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # the bars move the cursor; where nobody sees them, nothing of them is written
            with redirect_stderr(unescaped(sys.stderr) if sys.stderr.isatty() else io.StringIO()):
                return load()
        except KeyboardInterrupt:
            raise
        except Exception as error:
            if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == 28):
                raise wanted.fault(f"{wanted.name} cannot be written: {error.strerror} ({error.filename})") from None
            if attempt == ATTEMPTS:
                why = " ".join(str(error).split())[:200] or type(error).__name__
                raise wanted.fault(
                    f"{wanted.name}: the download broke off ({why}); the same command goes on where it was"
                ) from error
    raise AssertionError


def _verify(wanted: Wanted, folder: Path, listing: Listing) -> None:
    for name, (size, digest) in listing.files.items():
        file = folder / name
        if not file.is_file():
            raise wanted.fault(f"{wanted.name}: {name} did not arrive; run the same command again")
        found = file.stat().st_size
        kind, _, expected = digest.partition(":")
        if found == size and (not digest or _digest(file, kind) == expected):
            continue
        for path in {file, file.resolve()}:
            saving.delete(path)
        what = f"{found:,} bytes, not {size:,}" if found != size else "its digest is another"
        raise wanted.fault(
            f"{wanted.name}: {name} is not what {listing.host} lists ({what}): it was removed; run the same command "
            "again, and if that does not help, use another mirror"
        )


def _digest(file: Path, kind: str) -> str:
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {file.stat().st_size}\0".encode())
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _wanted_files(wanted: Wanted, files: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Those that are read here.

    Raises:
        LoraMsError: none, or none that could be read.
    """
    strange = [name for name in files if escaped(name) != name or ".." in name.split("/")]
    if strange:
        raise wanted.fault(f"{wanted.name} holds a file of the name {strange[0]!r:.80}, which no file should have")
    names = [name for name in files if any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS[wanted.kind])]
    if wanted.kind == "dataset":
        names = [name for name in names if not DESCRIPTIONS.fullmatch(name) and not name.startswith(".")]
        if not names:
            raise wanted.fault(
                f"{wanted.name} holds no rows that are read here ({', '.join(DATA_SUFFIXES)}): {_shown(files)}"
            )
        return {name: files[name] for name in _files_of_split(wanted, names)}
    if NEEDED[wanted.kind] not in names:
        hint = "; it is an adapter: give it as load_adapter" if NEEDED["adapter"] in files else ""
        raise wanted.fault(f"{wanted.name} holds no {NEEDED[wanted.kind]}: {_shown(files)}{hint}")
    if not any(name.endswith(".safetensors") for name in names):
        others = [name for name in files if name.endswith(OTHER_WEIGHTS)]
        what = f"its weights are {listed(others, 3, ', ')}, which are not read" if others else "no weights are there"
        raise wanted.fault(f"{wanted.name} holds no safetensors: {what}; take a revision or a copy that has them")
    return {name: files[name] for name in names}


def _shown(files: Iterable[str]) -> str:
    return f"its files are {listed(sorted(files), 5, ', ')}" if files else "it is empty"


def _data_files(folder: Path) -> list[str]:
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in DATA_SUFFIXES]
    return [name for name in names if not DESCRIPTIONS.fullmatch(name) and not name.startswith(".")]


def _files_of_split(wanted: Wanted, names: list[str]) -> list[str]:
    """The files of the split: by their names, where these tell; else all."""

    def of(split: str) -> list[str]:
        return [name for name in names if is_of_split(name, split)]

    if wanted.split is None:
        return names
    found = of(wanted.split)
    if found:
        return found
    others = {split for split in SPLITS if of(split)}
    if others:
        raise wanted.fault(
            f"{wanted.name} has no split {wanted.split}; there are {', '.join(sorted(others))}: set data_loader.split"
        )
    return names


# --- Hugging Face


def _look_hf(wanted: Wanted) -> Listing:
    from huggingface_hub import HfApi, constants, errors

    host = constants.ENDPOINT
    try:
        info: Any = HfApi().repo_info(
            wanted.name,
            revision=wanted.revision,
            repo_type=_hf_kind(wanted),
            files_metadata=True,
            timeout=ANSWER_SECONDS,
        )
    except errors.GatedRepoError:
        raise wanted.fault(
            f"{wanted.name} is given to those who accept its terms on {host}/{wanted.name}: do so, and log in with hf "
            "auth login, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise wanted.fault(f"{wanted.name} has no revision {wanted.revision} on {host}") from None
    except errors.RepositoryNotFoundError:
        raise wanted.fault(_nowhere(wanted, host, "HF_TOKEN")) from None
    except errors.HfHubHTTPError as error:
        answer = getattr(error.response, "status_code", None)
        raise wanted.fault(_out_of_reach(wanted, host, f"it answers {answer}" if answer else "no answer")) from None
    except errors.OfflineModeIsEnabled:
        raise wanted.fault(_out_of_reach(wanted, host, "HF_HUB_OFFLINE is set")) from None
    except errors.HFValidationError as error:
        raise wanted.fault(f"{wanted.name} is no folder here, and no name of a hub ({error})") from None
    except Exception as error:  # requests' errors, or httpx's from version 1
        raise wanted.fault(_out_of_reach(wanted, host, _connection_fault(error))) from None
    files = {}
    for each in info.siblings or []:
        digest = f"sha256:{each.lfs.sha256}" if each.lfs else f"git:{each.blob_id}" if each.blob_id else ""
        files[each.rfilename] = (each.size or 0, digest)
    return Listing(info.sha or "", files, host)


def _hf_kind(wanted: Wanted) -> str:
    return "dataset" if wanted.kind == "dataset" else "model"


def _load_hf(wanted: Wanted, names: list[str], output_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        wanted.name,
        repo_type=_hf_kind(wanted),
        revision=wanted.revision,
        local_dir=output_dir,
        allow_patterns=[glob.escape(name) for name in names],
    )
    return Path(str(folder))


def _cached_by_others(wanted: Wanted) -> Path | None:
    """What transformers, say, has left in Hugging Face's cache; None where it is not whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(wanted.name, repo_type=_hf_kind(wanted), revision=wanted.revision, local_files_only=True)
        )
        if wanted.kind == "dataset":
            whole = bool(_files_of_split(wanted, _data_files(folder)))
        elif wanted.kind == "adapter":
            whole = all((folder / name).is_file() for name in PATTERNS["adapter"][:2])
        else:
            whole = (folder / "config.json").is_file() and bool(storage.open_dir(folder))
    except Exception:  # there is none
        return None
    return folder if whole else None


# --- ModelScope


def _look_modelscope(wanted: Wanted) -> Listing:
    os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "1")  # read as the library is imported
    try:
        from modelscope_hub import HubApi, errors, get_default_config
    except ImportError:
        raise wanted.fault(
            "the hub modelscope needs its library: pip install modelscope-hub (or lora_ms[modelscope])"
        ) from None
    api = HubApi()
    host = str(get_default_config().endpoint)
    try:
        found = api.list_repo_files(wanted.name, _hf_kind(wanted), revision=wanted.revision)
    except errors.NotExistError:
        raise wanted.fault(_nowhere(wanted, host, "MODELSCOPE_API_TOKEN")) from None
    except errors.APIError as error:
        raise wanted.fault(_out_of_reach(wanted, host, " ".join(str(error).split())[:120])) from None
    except Exception as error:
        raise wanted.fault(_out_of_reach(wanted, host, _connection_fault(error))) from None
    files = {
        each.path: (each.size, f"sha256:{each.sha256}" if each.sha256 else "") for each in found if not each.is_dir
    }
    commit = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    return Listing(commit, files, host)


def _load_modelscope(wanted: Wanted, names: list[str], output_dir: Path | None) -> Path:
    from modelscope_hub import HubApi

    return HubApi().download_repo(
        wanted.name,
        _hf_kind(wanted),
        revision=wanted.revision,
        local_dir=output_dir,
        allow_patterns=[glob.escape(name) for name in names],
    )


# --- what is said


def _connection_fault(error: BaseException) -> str:
    text = str(error)
    if "timed out" in text.lower() or "timeout" in type(error).__name__.lower():
        return f"no answer within {ANSWER_SECONDS:.0f} seconds"
    for sign, short in (
        ("resol", "its name cannot be resolved"),
        ("refused", "connection refused"),
        ("roxy", "the proxy does not answer"),
        ("SSL", "its certificate is not accepted"),
    ):
        if sign in text:
            return short
    return f"no connection: {type(error).__name__}"


def _out_of_reach(wanted: Wanted, host: str, why: str) -> str:
    kind = "" if wanted.kind == "model" else f" --kind {wanted.kind}"
    other = "" if wanted.hub == "modelscope" else ", with --hub modelscope, or through a mirror (HF_ENDPOINT=URL)"
    return (
        f"{wanted.name} is no path here, and {host}, where it may be a name, cannot be reached ({why}): correct the "
        f"path, or run lora-ms download {wanted.name}{kind} --output_dir DIR where there is a network{other}, and give "
        "DIR"
    )


def _nowhere(wanted: Wanted, host: str, token: str) -> str:
    return (
        f"{wanted.name} is no path here, and {host} has no {_hf_kind(wanted)} of that name: correct one or the other "
        f"(a private one needs {token})"
    )
