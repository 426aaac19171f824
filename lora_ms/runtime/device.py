"""The device: MindSpore's context, the processes of a run, seeds, memory. Only this file imports communication."""

import os
import resource
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import mindspore as ms
from mindspore import ops

from lora_ms.errors import LoraMsError
from lora_ms.nn.parallel import WHOLE, Shard, SumOverRanks
from lora_ms.ops import PORTABLE, Operators, select
from lora_ms.runtime import host, native_build
from lora_ms.runtime.choice import Device, chosen
from lora_ms.runtime.graph_cache import keep_graphs


@dataclass(frozen=True)
class Runtime:
    """Where a process runs: its device and operators, and its rank among the processes of the run.

    ``shard.count`` neighbouring ranks share the model and see the same rows. Ranks that have the same part of the
    model, and see other rows, form ``data_group``.
    """

    device: Device
    rank: int = 0
    world: int = 1
    shard: Shard = WHOLE
    data_group: str = ""
    operators: Operators = PORTABLE  # what cells are to compute with

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """The number of the share of the rows that this process takes."""
        return self.rank // self.shard.count

    @property
    def data_ranks(self) -> int:
        """The number of shares that the rows are divided into."""
        return self.world // self.shard.count

    def data_sum(self) -> SumOverRanks | None:
        """Sums over the ranks that see other rows; None where this one sees all."""
        return SumOverRanks(self.data_group) if self.data_ranks > 1 else None

    @property
    def uses_host_memory(self) -> bool:
        """Whether weights and activations lie in the host's memory, which alone the estimate was measured on."""
        return self.device == "CPU"


def has_native(device: str) -> bool:
    """Whether native operators can be compiled for ``device``."""
    return device == "CPU" and native_build.compiler() is not None


def setup(
    device_target: str = "auto",
    device_id: int | None = None,
    seed: int = 0,
    use_parallel: bool = False,
    max_device_memory: str | None = None,
    graph_kernel: bool = False,
    model_parallel: int = 1,
    cpu_operators: bool = True,
    plain_operators: bool = False,
    graph_cache: bool = True,
    bfloat16: bool = False,
) -> tuple[Runtime, list[str]]:
    """Prepares MindSpore, in static-graph mode; returns the runtime and notices for the user. May be repeated.

    device_id: which Ascend card; None leaves the choice to the environment.
    model_parallel: the number of processes that share one model, with use_parallel.
    cpu_operators: on the CPU, compute with our C++ operators (``ops/csrc``), where they can be compiled.
    plain_operators: on Ascend, compute without its fused operators, which the 310B lacks in training.
    graph_cache: keep compiled graphs for the next start.
    bfloat16: with our C++ operators, multiply with weights in bfloat16, where the processor can.

    Raises:
        LoraMsError: use_parallel without msrun's environment, or communication that does not come up.
    """
    notices = []
    device = chosen(device_target)
    if device_target == "Ascend" and device == "CPU":
        notices.append("context.device_target is Ascend, but there is none here: running on the CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    if device == "Ascend" and device_id is not None and not use_parallel:  # msrun gives each process its card
        ms.set_device(device, device_id)
    elif ms.get_context("device_target") != device:
        ms.set_device(device)
    if max_device_memory and device == "Ascend":
        ms.runtime.set_memory(max_size=max_device_memory)
    if graph_kernel:
        notices += _fuse_kernels(device)
    runtime = _join(device, model_parallel) if use_parallel else Runtime(device)
    library = ""
    if cpu_operators and device == "CPU":
        library, lines = _native_library(runtime.world)
        notices += lines
        if bfloat16 and library and not native_build.rounds_to_bfloat16(library):
            notices.append(
                "compute_dtype bfloat16: this processor cannot multiply in it; only the weights are stored in it"
            )
    notices += keep_graphs(runtime.rank, runtime.world, graph_cache)
    ms.set_seed(seed)
    return replace(runtime, operators=select(device, plain_operators, library, bfloat16)), notices


def _fuse_kernels(device: Device) -> list[str]:
    """Turns on MindSpore's fusion of elementwise operators; returns a line where that is not possible."""
    if device == "CPU":
        # AKG, which builds the fused kernels, imports decorator without depending on it and calls gcc to link
        missing = [name for name, found in (("decorator", find_spec("decorator")), ("gcc", which("gcc"))) if not found]
        if missing:
            return [f"context.enable_graph_kernel needs {' and '.join(missing)} on the CPU: running without"]
        # where AKG may read its own tables (else it warns at every kernel), and where it puts what it builds
        os.environ.setdefault("AKG_WHITE_LIST_PATH", str(Path(ms.__file__).parent))
        os.environ.setdefault("MS_COMPILER_CACHE_PATH", str(host.cache_folder()))
    ms.set_context(enable_graph_kernel=True)
    return []


def _native_library(processes: int) -> tuple[str, list[str]]:
    """The path of the native operators, compiled the first time; or "", and a line with the reason."""
    library, why = native_build.build()
    if library is None:
        return "", [f"native operators for the CPU could not be compiled, so a step takes longer: {why}"]
    native_build.set_threads(library, host.cores() // processes)
    return str(library), []


def _join(device: Device, model_parallel: int) -> Runtime:
    from mindspore.communication import get_group_size, get_rank, init

    if "MS_WORKER_NUM" not in os.environ:
        raise LoraMsError(
            "use_parallel is True, but this process was not started by msrun; "
            'use: bash scripts/msrun_launcher.sh "run_mindformer.py … --use_parallel True" N, or --use_parallel False'
        )
    try:
        init()
        rank, world = get_rank(), get_group_size()
    except RuntimeError as error:
        raise LoraMsError(
            f"the processes of this run could not connect: {str(error).strip().splitlines()[0]}"
        ) from error
    print(f"rank {rank} is process {os.getpid()}", flush=True)  # read by scripts/msrun_launcher.sh
    if world % model_parallel:
        raise LoraMsError(
            f"parallel_config.model_parallel {model_parallel} does not divide the {world} processes of this run: "
            "start a multiple of it"
        )
    first = rank - rank % model_parallel
    shard = Shard(rank - first, model_parallel, _group(range(first, first + model_parallel)))
    return Runtime(device, rank, world, shard, _group(range(shard.index, world, model_parallel)))


@cache  # `setup` may be repeated
def _group(ranks: range) -> str:
    """MindSpore's name for a group of ranks, which is created the first time; a single rank needs none."""
    from mindspore.communication import GlobalComm, create_group, get_group_size

    if len(ranks) == 1:
        return ""
    if len(ranks) == get_group_size():
        return GlobalComm.WORLD_COMM_GROUP
    name = f"ranks_{'_'.join(map(str, ranks))}"
    create_group(name, list(ranks))
    return name


def barrier() -> None:
    """Waits for all ranks."""
    SumOverRanks()(ops.zeros(1, ms.float32)).asnumpy()


def peak_memory_mb(device: Device) -> float:
    """The most memory held so far, in MB: of the card on Ascend, of this process elsewhere."""
    if device == "Ascend":
        return ms.runtime.max_memory_allocated() / 2**20
    try:  # the kernel's own peak of this program; getrusage's includes that of the program that started it
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes there
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_share(device: Device, budget_mb: float | None = None) -> float:
    """Share of memory in use now.

    budget_mb: what this process may use; None for all that the card has or, elsewhere, ``host.share``.
    """
    if device == "Ascend":
        budget = budget_mb or ms.hal.get_device_properties("Ascend").total_memory / 2**20
        return ms.runtime.memory_allocated() / 2**20 / budget
    return host.share(budget_mb)
