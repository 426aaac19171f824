"""What the server allows."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeSettings:
    """Settings of one server; see ``lora-ms serve --help``."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""  # "": every key is taken, and none
    allowed_origins: tuple[str, ...] = ()  # of web pages elsewhere whose scripts may ask; "*": all
    allowed_hosts: tuple[str, ...] = ()  # names besides loopback's under which a server on loopback may be asked
    adapter_folders: tuple[Path, ...] = ()  # below which adapters may be loaded while it runs
    default_tokens: int | None = None  # of an answer whose request says nothing; None: a chat's what fits, else 16
    max_waiting: int = 64  # requests that wait for a row
    max_body: int = 1 << 20  # bytes
    request_timeout: float = 600.0  # seconds from a request to its answer's end
    read_timeout: float = 20.0  # seconds in which a request must have come
    shutdown_timeout: float = 60.0  # seconds for running answers once SIGTERM has come


MOST_CHOICES = 16  # n
MOST_ANSWERS = 64  # prompts times n of one request
MOST_MESSAGES = 512
MOST_PARTS = 64  # of one message's content
MOST_STOPS = 16  # stop strings
MOST_STOP = 256  # characters of one
MOST_BIASES = 1024  # entries of logit_bias
MOST_LOGPROBS = 20
DEEPEST = 32  # levels of JSON
MOST_VALUES = 200_000  # numbers, texts and the like in one body
MOST_CONNECTIONS = 512
MOST_HEAD = 32 << 10  # bytes of a request's line and headers
