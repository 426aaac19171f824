"""MindFormers and MindPet as packages: whether they are here, of which version, and where their noise goes."""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Protocol, TextIO

from lora_ms.errors import LoraMsError

SCRATCH = TemporaryDirectory(prefix="lora_ms_mindformers_")  # goes with the process
TESTED = ("1.9.0",)
INSTALL = "pip install '.[mindformers]' in lora_ms's own folder (mindformers 1.9.0 and mindpet 1.0.4)"
NAMES = {
    "AdamW": "mindformers.core.optim",
    "build_context": "mindformers.core.context.build_context",
    "build_parallel_config": "mindformers.core.parallel_config",
    "ClipGradNorm": "mindformers.core.clip_grad",
    "get_pet_model": "mindformers.pet",
    "Linear": "mindformers.modules.layers",
    "LlamaConfig": "mindformers.models.llama",
    "LlamaForCausalLM": "mindformers.models.llama",
    "MindFormerConfig": "mindformers.tools.register",
    "MindFormerModuleType": "mindformers.tools.register",
    "MindFormerRegister": "mindformers.tools.register",
    "Trainer": "mindformers.trainer",
}


class Log(Protocol):
    """Where noise goes: a stream that may be another one later."""

    copy: TextIO


class Sink:
    """What MindFormers' log handlers, which keep the stream of their import, write to: the run's log, while there is
    one."""

    def __init__(self) -> None:
        self.target: Log | None = None

    def write(self, text: str) -> int:
        if self.target is not None:
            self.target.copy.write(text)
        return len(text)

    def flush(self) -> None:
        if self.target is not None:
            self.target.copy.flush()

    def isatty(self) -> bool:
        return False


SINK = Sink()


@contextmanager
def silenced(log: Log) -> Iterator[None]:
    """What is printed goes to ``log.copy`` alone."""
    before, streams = SINK.target, (sys.stdout, sys.stderr)
    SINK.target = log
    sys.stdout = sys.stderr = SINK  # type: ignore[assignment]
    try:
        yield
    finally:
        SINK.target = before
        sys.stdout, sys.stderr = streams


def found_version() -> str:
    """The installed MindFormers' version.

    Raises:
        LoraMsError: MindFormers or MindPet is not installed.
    """
    missing = [name for name in ("mindformers", "mindpet") if importlib.util.find_spec(name) is None]
    if missing:
        raise LoraMsError(f"backend mindformers needs {' and '.join(missing)}: {INSTALL}")
    try:
        return metadata.version("mindformers")
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def load() -> tuple[SimpleNamespace, list[str]]:
    """What is used of MindFormers, by name, and what the user should know of its version.

    To be called while output is ``silenced``. What it logs goes to a temporary folder, too, as does what it writes
    before its trainer knows the run's folder.

    Raises:
        LoraMsError: it is not installed, or what is used is not in its place.
    """
    version = found_version()
    os.environ.setdefault("LOG_MF_PATH", SCRATCH.name)
    os.environ["LOCAL_DEFAULT_PATH"] = SCRATCH.name
    shown, found = warnings.showwarning, {}
    for name, module in NAMES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise LoraMsError(
                f"MindFormers {version} has no {module}.{name} that works here "
                f"({str(error).splitlines()[0]}): {INSTALL}"
            ) from error
    warnings.showwarning = shown  # MindFormers puts its logger there
    notices = []
    if version not in TESTED:
        notices.append(f"warning: MindFormers {version} is not among the versions tested ({', '.join(TESTED)})")
    return SimpleNamespace(**found), notices
