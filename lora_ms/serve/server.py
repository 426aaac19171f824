"""uvicorn, with what it leaves open: deadlines for slow senders, and an end that is no failure."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_ms.errors import LoraMsError
from lora_ms.serve.settings import MOST_CONNECTIONS, MOST_HEAD, ServeSettings

LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class DeadlineProtocol(H11Protocol):
    """Closes a connection whose request line and headers do not come in time."""

    read_timeout = 20.0  # seconds
    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._expect_head()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(self.read_timeout, self._late)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _late(self) -> None:
        if not self.transport.is_closing() and self.conn.our_state is h11.IDLE:
            self.transport.write(LATE)
        self.transport.close()


class Server(uvicorn.Server):
    """Ends at SIGTERM or Ctrl-C once running answers have been given; at the second, at once."""

    failed = False  # the engine's thread ended by itself
    on_ready: Callable[[], None] = staticmethod(lambda: None)  # called once it listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen.

        Raises:
            LoraMsError: another server has begun to listen at the same place since ``bound``.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            raise cannot_listen(self.config.host, self.config.port, error) from None
        self.on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        # SIGINT may be answered by MindSpore's own handler, which sends SIGTERM
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handles a signal: see ``Server``."""
        if self.should_exit:
            self.force_exit = True
        else:
            os.write(2, b"ending: running answers are given first; once more to end at once\n")
        self.should_exit = True

    def fail(self) -> None:
        """Ends the server as a failure."""
        self.failed = self.should_exit = self.force_exit = True


def server_for(app: ASGIApp, settings: ServeSettings) -> Server:
    """A server, not yet running."""
    protocol = type("Protocol", (DeadlineProtocol,), {"read_timeout": settings.read_timeout})
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        h11_max_incomplete_event_size=MOST_HEAD,
    )
    return Server(config)


def bound(settings: ServeSettings) -> socket.socket:
    """The server's socket, which does not listen yet: whoever connects before the model is ready is refused.

    Raises:
        LoraMsError: the port is taken, or no such host.
    """
    found = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        if found is not None:
            found.close()
        raise cannot_listen(settings.host, settings.port, error) from None
    return found


def cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> LoraMsError:
    """What is told where no socket can be had."""
    said = getattr(error, "strerror", None) or error
    return LoraMsError(f"--host {host} --port {port}: {said}: give another")
