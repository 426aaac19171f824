"""What a user's input or machine can cause."""


class LoraMsError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    The command line prints the text after ``error:`` and exits with status 2; ``--debug`` shows the traceback.
    """


class WriteError(LoraMsError):
    """A file or folder cannot be written: a full disk, or no permission. What stood there before is as it was."""
