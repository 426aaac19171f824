"""What differs in a notebook: whether there is one, and a picture in it."""

import sys
import warnings
from pathlib import Path
from typing import Any


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel, which shows a bar and pictures."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def progress_bar(**options: Any) -> Any:
    """tqdm's bar for where this runs; without ipywidgets, one of characters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ipywidgets would look nicer
        from tqdm.auto import tqdm

    return tqdm(**options)


def show_picture(path: Path) -> None:
    """Shows a PNG below the cell."""
    if in_notebook() and path.is_file():
        from IPython.display import Image, display

        display(Image(filename=str(path)))
