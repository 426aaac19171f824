"""``lora-ms serve``: a model and its adapters behind HTTP."""

import os
from importlib.util import find_spec
from pathlib import Path

from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.recipes import session

KEY = "LORA_MS_API_KEY"
NEEDED = ("starlette", "uvicorn", "prometheus_client")


def run(
    config: RunConfig,
    host: str,
    port: int,
    served_model_name: list[str],
    lora_modules: list[str],
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_loras: int | None,
    max_lora_rank: int | None,
    max_waiting: int,
    max_body_bytes: int,
    request_timeout: float,
    read_timeout: float,
    shutdown_timeout: float,
    allowed_origins: list[str],
    allowed_hosts: list[str],
    adapter_folders: list[str],
) -> None:
    """Serves until Ctrl-C or SIGTERM; see ``lora-ms serve --help``."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise LoraMsError(f"lora-ms serve needs {', '.join(missing)}: pip install 'lora_ms[serve]'")
    session.check_alone(config, "serve")
    from lora_ms.recipes.serve import ServeSizes, adapters_named, serve
    from lora_ms.serve.settings import ServeSettings

    bounds = {
        "--port": (port, 0, 65535),
        "--max-num-seqs": (max_num_seqs, 1, 1024),
        "--max-model-len": (max_model_len, 4, 2**30),
        "--max-loras": (max_loras, 1, 4096),
        "--max-lora-rank": (max_lora_rank, 1, 4096),
        "--max-waiting": (max_waiting, 0, 10**6),
        "--max-body-bytes": (max_body_bytes, 1, 2**30),
        "--request-timeout": (request_timeout, 0.01, 10**7),
        "--read-timeout": (read_timeout, 0.01, 10**7),
        "--shutdown-timeout": (shutdown_timeout, 0, 10**7),
    }
    for flag, (value, least, most) in bounds.items():
        if value is not None and not least <= value <= most:
            raise LoraMsError(f"{flag} {value} is out of range: give {least} to {most}")
    given = "max_new_tokens" in config.model.sizes.model_fields_set
    settings = ServeSettings(
        host=host,
        port=port,
        api_key=_key(),
        allowed_origins=tuple(allowed_origins),
        allowed_hosts=tuple(name.lower() for name in allowed_hosts),
        adapter_folders=tuple(map(_folder, adapter_folders)),
        default_tokens=config.model.sizes.max_new_tokens if given else None,
        max_waiting=max_waiting,
        max_body=max_body_bytes,
        request_timeout=request_timeout,
        read_timeout=read_timeout,
        shutdown_timeout=shutdown_timeout,
    )
    adapters = adapters_named(lora_modules)
    if config.load_adapter:
        name = Path(config.load_adapter).resolve().name
        if adapters.setdefault(name, config.load_adapter) != config.load_adapter:
            raise LoraMsError(f"--load_adapter and --lora-modules both name {name!r}: leave one out")
    config = config.model_copy(update={"load_adapter": ""})
    serve(
        config, settings, adapters, served_model_name, ServeSizes(max_num_seqs, max_model_len, max_loras, max_lora_rank)
    )


def _key() -> str:
    """The key that requests must have; out of the environment, which children would get."""
    key = os.environ.pop(KEY, "").strip()
    if not key.isascii() or any(not 32 < ord(letter) < 127 for letter in key):
        raise LoraMsError(f"{KEY}: a key is of ASCII letters, digits and signs, without spaces")
    return key


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise LoraMsError(f"--adapter-folders: {text} is not a folder")
    return path.resolve()
