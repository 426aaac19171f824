"""``lora-ms sequence``: tasks one after another, each from the end of the one before, scored on all after each."""

from pathlib import Path

from lora_ms import storage
from lora_ms.commands import finetune, merge
from lora_ms.config import RunConfig
from lora_ms.recipes import sequence, session
from lora_ms.recipes.sequence import MERGED, PLOT, RESULT


def run(config: RunConfig) -> None:
    """Learns ``sequence.tasks`` in order. Called again, it goes on where it was stopped.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    sequence.check(config)
    session.check_alone(config, "sequence")
    session.check_output(Path(config.output_dir))
    sequence.check_same(config)
    is_main = not config.use_parallel or session.start(config).is_main
    tasks = config.sequence.tasks
    for number, task in enumerate(tasks):
        if sequence.is_done(config, number):
            print(f"task {number + 1} of {len(tasks)}: {task.name}: learnt before")
            continue
        print(f"task {number + 1} of {len(tasks)}: {task.name}")
        finetune.run(sequence.config_of(config, number))  # ends the program where it is stopped
        folder = sequence.folder_of(config, number)
        if is_main:
            if sequence.is_orthogonal(config) and number + 1 < len(tasks):
                base = sequence.config_of(config, number).load_checkpoint
                merge.run(str(folder / "adapter"), str(folder / MERGED), base, dtype="float32", overwrite=True)
            sequence.mark_done(config, number)
            report(config)
        if config.use_parallel:
            session.wait_for_all()
    if is_main:
        print(*sequence.matrix_of(config).lines(), sep="\n")
        print(f"scores: {Path(config.output_dir) / RESULT}   plot: {Path(config.output_dir) / PLOT}")


def report(config: RunConfig) -> None:
    """Writes the scores so far."""
    matrix = sequence.matrix_of(config)
    storage.write_json(Path(config.output_dir) / RESULT, matrix.as_json())
    matrix.plot(Path(config.output_dir) / PLOT)
