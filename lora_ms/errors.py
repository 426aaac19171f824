"""Errors that a user's input or machine can cause."""


class LoraMsError(Exception):
    """An error that the user can correct: one line says what is wrong, where, and what to do about it.

    The command line prints the text after ``error:`` and exits with status 2; ``--debug`` shows the traceback.
    """


class WriteError(LoraMsError):
    """A file or folder cannot be written: a full disk, or no permission. What stood there before is as it was."""


def out_of_memory(fault: BaseException) -> str | None:
    """The message for an error of MindSpore, NumPy or Python that means so, on the CPU or on Ascend; else None."""
    words = (
        "allocate memory failed",
        "memory not enough",
        "memory isn't enough",
        "memory is not enough",
        "out of memory",
        "bad_alloc",
    )
    if not isinstance(fault, MemoryError) and not any(word in str(fault).lower() for word in words):
        return None
    return (
        "out of memory: lower runner_config.batch_size (and raise gradient_accumulation_steps as much) or "
        "model.model_config.seq_length, set recompute_config.recompute: True or compute_dtype: float16, or give "
        "--low_memory True; lora-ms estimate says what fits"
    )


def lost_connection(fault: BaseException) -> str | None:
    """The message for MindSpore's errors where another process of the run, or msrun's scheduler, is gone; else None."""
    words = ("connection between the scheduler and the worker", "Launch kernel failed: Default/AllReduce")
    if not any(word in str(fault) for word in words):
        return None
    return (
        "the connection to the other processes of this run is lost: one of them, or msrun's scheduler, has ended (see "
        "their logs); start all of them again, with --resume_training True to go on from the last checkpoint"
    )
