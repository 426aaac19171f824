"""The one exception that a user's input can cause."""


class LoraMsError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    The command line prints the text after ``error:`` and exits with status 2; ``--debug`` shows the traceback.
    """
