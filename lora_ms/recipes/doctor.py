"""What ``lora-ms doctor`` looks at: Python, packages, devices, memory, MindSpore itself and two processes.

Loads without MindSpore, which is tried in processes of its own.
"""

import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from lora_ms.errors import LoraMsError
from lora_ms.recipes import doctor_ascend
from lora_ms.runtime import graph_store, host, native_build
from lora_ms.text import counted

OK, WARNING, FAULT = "ok", "warning", "fault"
REQUIRED = ("mindspore", "numpy", "transformers", "safetensors", "pydantic", "PyYAML", "datasets", "matplotlib", "tqdm")
OPTIONAL = ("mindformers", "mindpet", "tensorboardX")
LEAST_MEMORY = 1024  # MB that a small run takes
TIME_LIMIT = 120  # seconds for each process that is started

SUM = """
import mindspore as ms
print("version", ms.__version__, ms.get_context("device_target"))
ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
print("sum", float((ms.Tensor([1.0, 2.0]) + 1.0).sum().asnumpy()))
"""
ALL_REDUCE = """
import mindspore as ms
from mindspore import ops
from mindspore.communication import get_rank, init
ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
init()
class Sum(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.all_reduce = ops.AllReduce()
    def construct(self, x):
        return self.all_reduce(x)
print("sum of ranks", float(Sum()(ms.Tensor([get_rank() + 1.0])).asnumpy()[0]), flush=True)
"""


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    status: str
    text: str


def findings(msrun: bool = True) -> Iterator[Finding]:
    """All lines of the report, in its order, each as soon as it is known.

    msrun: also start two processes.
    """
    versions = {name: installed(name) for name in (*REQUIRED, *OPTIONAL)}
    yield python_finding()
    yield from package_findings(versions)
    yield device_finding()
    yield from ascend_findings()
    yield operators_finding()
    yield graphs_finding()
    yield from memory_findings(host.available(), host.cgroup_limit())
    if versions["mindspore"]:
        yield mindspore_finding()
        if msrun:
            yield msrun_finding()


def numbers(text: str) -> tuple[int, ...]:
    """``2.7.2rc1`` as (2, 7, 2)."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def installed(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def python_finding(running: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Whether MindSpore is built for this Python."""
    text = f"{'.'.join(map(str, running))} on {platform.system()} {platform.machine()}, {host.cores()} cores"
    if not (3, 10) <= running <= (3, 12):
        return Finding("python", FAULT, f"{text}; MindSpore needs 3.10 to 3.12: make an environment with one of these")
    return Finding("python", OK, text)


def package_findings(found: dict[str, str | None]) -> list[Finding]:
    """Versions by package, and the combinations that are known to fail."""
    lines = []
    for name, here in found.items():
        if here is not None:
            lines.append(Finding(name, OK, here))
        elif name in REQUIRED:
            lines.append(Finding(name, FAULT, f"is missing: pip install {name}"))
    numpy, mindspore = found.get("numpy"), found.get("mindspore")
    if numpy is not None and numbers(numpy)[0] >= 2:
        text = f"MindSpore fails in conversions with numpy {numpy}: pip install 'numpy<2' 'pyarrow<20'"
        lines.append(Finding("numpy", FAULT, text))
    if mindspore is not None and not (2, 7, 2) <= numbers(mindspore) < (2, 11):
        text = f"{mindspore} is not tested; 2.7.2, 2.9 and 2.10 are: pip install mindspore==2.9.0"
        lines.append(Finding("mindspore", FAULT if numbers(mindspore) < (2, 7, 2) else WARNING, text))
    mindformers = found.get("mindformers")
    if mindformers is not None and found.get("transformers") is not None:
        pin = next((line for line in _requirements("mindformers") if line.startswith("transformers==")), None)
        if pin is not None and pin.partition("==")[2] != found["transformers"]:
            text = f"mindformers {mindformers} needs {pin}, here is {found['transformers']}: pip install '{pin}'"
            lines.append(Finding("mindformers", WARNING, text))
    return lines


def _requirements(name: str) -> list[str]:
    return [line.replace(" ", "") for line in requires(name) or []]


def device_finding(dev: Path = Path("/dev"), environment: dict[str, str] | None = None) -> Finding:
    """Ascend cards, and whether CANN's environment is set."""
    environment = dict(os.environ) if environment is None else environment
    cards = sorted(path.name for path in dev.glob("davinci[0-9]*"))
    if not cards and not (dev / "davinci_manager").exists():
        tools = doctor_ascend.missing_tools()
        return Finding("devices", OK, f"no Ascend card: runs go to the CPU{f' ({tools})' if tools else ''}")
    names = ", ".join(cards) or "davinci_manager"
    if not environment.get("ASCEND_HOME_PATH"):
        text = f"{names}, but CANN's environment is not set: source /usr/local/Ascend/ascend-toolkit/set_env.sh"
        return Finding("devices", FAULT, text)
    return Finding("devices", OK, f"Ascend: {names}; CANN in {environment['ASCEND_HOME_PATH']}")


def ascend_findings(dev: Path = Path("/dev"), installed: Path = doctor_ascend.INSTALLED) -> Iterator[Finding]:
    """Driver, health and network of the cards; nothing on a machine without one."""
    cards = doctor_ascend.card_numbers(dev)
    if cards:
        for name, well, text in doctor_ascend.ascend_lines(cards, os.environ, installed):
            yield Finding(name, OK if well else WARNING, text)


def operators_finding() -> Finding:
    """Compiles the native operators for the CPU, where the cache does not have them yet."""
    library, why = native_build.build()
    if library is None:
        return Finding("operators", WARNING, f"runs on the CPU take longer: {why}; on Debian: apt install g++")
    return Finding("operators", OK, "native operators for the CPU are compiled")


def graphs_finding() -> Finding:
    """The compiled graphs that are kept."""
    folder = graph_store.graphs_folder()
    if folder is None:
        return Finding("graphs", OK, f"compiled graphs are not kept: {graph_store.VARIABLE} is False")
    try:
        entries = graph_store.Store(folder).entries()
    except OSError as error:
        text = f"compiled graphs are not kept, so that every start compiles them: {error}"
        return Finding("graphs", WARNING, f"{text}; {graph_store.VARIABLE} names another folder")
    size = sum(entry.size for entry in entries) / 1e9
    most = graph_store.LIMIT / 1e9
    text = f"{counted(len(entries), 'compiled graph')}, {size:.2f} of at most {most:.0f} GB, in {folder}"
    return Finding("graphs", OK, f"{text}; --clear-cache removes them")


def clear_graphs() -> str:
    """Removes the compiled graphs that are kept; returns a line about them.

    Raises:
        LoraMsError: they cannot be removed.
    """
    folder = graph_store.graphs_folder()
    if folder is None:
        return f"compiled graphs are not kept: {graph_store.VARIABLE} is False"
    try:
        store = graph_store.Store(folder)
    except OSError as error:
        raise LoraMsError(f"the compiled graphs cannot be removed: {error}") from None
    before = store.entries()
    store.clear()
    if store.entries():
        raise LoraMsError(f"some compiled graphs cannot be removed: look into {folder}")
    size = sum(entry.size for entry in before) / 1e9
    return f"removed {counted(len(before), 'compiled graph')}, {size:.2f} GB, from {folder}"


def memory_findings(room: float, group: tuple[float, float] | None) -> list[Finding]:
    """Memory that a run can have.

    room: MB. group: limit and use of a control group, MB.
    """
    status = WARNING if room < LEAST_MEMORY else OK
    more = ": close other programs, or add swap (scripts/orangepi_env.sh)" if status == WARNING else ""
    text = f"{room / 1024:.1f} GB available{more}; lora-ms estimate says what a run takes"
    lines = [Finding("memory", status, text)]
    if group is not None:
        text = f"a control group limits memory to {group[0] / 1024:.1f} GB, {group[1] / 1024:.1f} GB of it in use"
        lines.append(Finding("cgroup", OK, text))
    return lines


def process(command: list[str], folder: str, limit: int) -> tuple[int | None, str]:
    """Status and output of a command.

    Status None: it did not end in ``limit`` seconds, and was killed together with all that it had started.
    """
    running = subprocess.Popen(
        command,
        cwd=folder,
        env={"GLOG_v": "3", **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out = running.communicate(timeout=limit)[0]
        return running.returncode, out
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        return None, running.communicate()[0]


def last_line(text: str) -> str:
    """The line of an output that names the error."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    return (lines or text.strip().splitlines() or ["no output"])[-1][:200]


def mindspore_finding(limit: int = TIME_LIMIT) -> Finding:
    """Imports MindSpore and adds two numbers."""
    with tempfile.TemporaryDirectory() as folder:
        status, out = process([sys.executable, "-c", SUM], folder, limit)
    if status is None:
        return Finding("import", FAULT, f"MindSpore did not start in {limit} seconds: is the machine out of memory?")
    if status or "sum 5.0" not in out:
        return Finding("import", FAULT, f"MindSpore does not run: {last_line(out)}")
    return Finding("import", OK, "MindSpore computes; its default device is " + out.split("version", 1)[1].split()[1])


def msrun_finding(limit: int = TIME_LIMIT) -> Finding:
    """Starts two processes by msrun, which sum their ranks over the CPU's communication."""
    program = Path(sys.executable).parent / "msrun"
    found = str(program) if program.exists() else shutil.which("msrun")
    if found is None:
        return Finding(
            "msrun", FAULT, "not found: it is installed with MindSpore, beside its Python; runs of one process work"
        )
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        Path(folder, "ranks.py").write_text(ALL_REDUCE)
        options = f"--worker_num=2 --local_worker_num=2 --master_port={port} --join=True --cluster_time_out={limit}"
        status, out = process([found, *options.split(), f"--log_dir={folder}/log", "ranks.py"], folder, limit)
        logs = "\n".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob("log/worker_*.log")))
    if status is None:
        text = f"two processes did not connect in {limit} seconds: does a proxy or firewall block 127.0.0.1?"
        return Finding("msrun", FAULT, text)
    if status or logs.count("sum of ranks 3.0") != 2:
        return Finding("msrun", FAULT, f"two processes failed together: {last_line(logs or out)}")
    return Finding("msrun", OK, "two processes connected and summed their numbers")
