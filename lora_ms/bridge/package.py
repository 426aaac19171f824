"""MindFormers and MindPet as packages: whether they are installed, in which version, and where their output goes."""

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
from typing import Protocol

from lora_ms.errors import LoraMsError

SCRATCH = TemporaryDirectory(prefix="lora_ms_mindformers_")  # removed when the process ends
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
    """Where their output goes."""

    def keep(self, text: str) -> None: ...


class Sink:
    """A stream for MindFormers' log handlers, which keep the one of their import: the run's log, while there is one."""

    def __init__(self) -> None:
        self.target: Log | None = None

    def write(self, text: str) -> int:
        if self.target is not None:
            self.target.keep(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


SINK = Sink()


@contextmanager
def silenced(log: Log) -> Iterator[None]:
    """Inside the block, what is printed goes to ``log`` alone."""
    before = SINK.target
    streams = (sys.stdout, sys.stderr)
    SINK.target = log
    sys.stdout = sys.stderr = SINK  # type: ignore[assignment]
    try:
        yield
    finally:
        SINK.target = before
        sys.stdout, sys.stderr = streams


def installed_version() -> str:
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
    """What is used of MindFormers (NAMES), and lines for the user about its version.

    To be called while output is ``silenced``. Its own log files, and what it writes before its trainer knows the
    run's folder, go to a temporary folder.

    Raises:
        LoraMsError: it is not installed, or lacks one of NAMES.
    """
    version = installed_version()
    os.environ.setdefault("LOG_MF_PATH", SCRATCH.name)
    os.environ["LOCAL_DEFAULT_PATH"] = SCRATCH.name
    shown = warnings.showwarning
    found = {}
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
    warnings.showwarning = shown  # which MindFormers replaces by its logger
    notices = []
    if version not in TESTED:
        notices.append(f"warning: MindFormers {version} is not among the versions tested ({', '.join(TESTED)})")
    return SimpleNamespace(**found), notices
