"""``lora-ms fisher``: the mean squared gradient of general rows, for the loss term ``ewc``."""

from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.recipes.fisher import measure


def run(config: RunConfig, output: str | None = None, params: str | None = None) -> None:
    """Writes a safetensors file, see ``recipes.fisher.measure``.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    if config.backend != "native":
        raise LoraMsError("fisher needs backend native")
    measure(config, output, params)
