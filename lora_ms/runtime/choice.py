"""Which device a run computes on, found without MindSpore."""

from pathlib import Path
from typing import Literal

Device = Literal["CPU", "Ascend"]


def chosen(device_target: str) -> Device:
    """The device of a run with this ``context.device_target``: Ascend where there is one, unless it is CPU."""
    return "Ascend" if device_target != "CPU" and ascend_is_present() else "CPU"


def default_dtype(device: str) -> str:
    """The type of weights and activations on ``device`` where none is asked for."""
    return "float32" if device == "CPU" else "float16"


def ascend_is_present() -> bool:
    """Whether the kernel driver shows an Ascend card or, as on an Orange Pi, its control device."""
    dev = Path("/dev")
    return any(dev.glob("davinci[0-9]*")) or (dev / "davinci_manager").exists()
