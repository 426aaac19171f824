"""``lora-ms estimate``: how much memory a run takes, whether it fits, and what to change where it does not."""

from lora_ms.config import RunConfig
from lora_ms.recipes import session
from lora_ms.recipes.estimate import fits, job_of, needs, size, table
from lora_ms.recipes.model import read_sizes
from lora_ms.runtime import host, memory_estimate
from lora_ms.runtime.choice import chosen
from lora_ms.runtime.device import Runtime


def run(config: RunConfig) -> None:
    """Prints two tables: the parts of a run's memory, and what fits on which device.

    Raises:
        LoraMsError: the model's sizes are not known, or it cannot be shared by so many processes.
    """
    sizes = read_sizes(config)
    session.check_sharing(config, sizes)
    processes = session.sharing(config)
    runtime = Runtime(chosen(config.context.device_target))
    job = job_of(config, sizes, runtime.device)
    room = host.available() / processes
    if processes > 1:
        print(f"each of {processes} processes that share the model:")
    this_machine = {"this machine": (runtime.device, room, True)} if runtime.uses_host_memory else {}
    print("\n".join([*table(job, room), "", *fits(config, sizes, this_machine)]))
    if this_machine and needs(job) > room:
        changes = memory_estimate.remedies(job, room) or ["the model"]
        line = f"it will not fit this machine ({size(room)} free); change, until it does:"
        print("", line, *(f"  {key}" for key in changes), sep="\n")
