"""What every request passes before its route: its path made plain, host and key checked, and a line of the log."""

import hmac
import json
import time
from collections.abc import Container
from contextlib import suppress
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_ms.serve.faults import ApiError
from lora_ms.serve.metrics import ServerNumbers
from lora_ms.serve.settings import MOST_HEAD, ServeSettings

IGNORED = "x-ignored-keys"  # header of an answer: keys of the body that have no meaning here
SERVED = "served_name"  # in a request's scope: the name that its path serves
PLAIN = "/api/"  # before such a name
OPEN = ("/", "/page.css", "/page.js", "/page.svg", "/health")  # without a key
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """The checks described above. ``served``: the names that are served."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: ServerNumbers, served: Container[str]):
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, asked, status = time.monotonic(), scope["path"], 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in SECURITY.items():
                    headers[name] = value
                if self.settings.allowed_origins:
                    headers["cross-origin-resource-policy"] = "cross-origin"
                if scope.get(IGNORED):
                    headers[IGNORED] = scope[IGNORED]
            await send(message)

        try:
            try:
                self._admit(scope)
            except ApiError as error:
                await _refuse(error, scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        except ClientDisconnect:
            status = status or 499
        except Exception:
            status = status or 500
            raise
        finally:
            self.metrics.responses.labels(str(status)).inc()
            ignored = f" (without effect: {scope[IGNORED]})" if scope.get(IGNORED) else ""
            if status >= 400 or asked not in OPEN:
                path = quote(asked, safe="/:@!$&'()*+,;=~")[:200]
                with suppress(OSError):  # nobody reads the log any more
                    print(
                        f"{scope['method'][:16]} {path} {status} {time.monotonic() - began:.2f} s{ignored}", flush=True
                    )

    def _admit(self, scope: Scope) -> None:
        path, version = scope["path"], scope["http_version"]
        if version not in ("1.0", "1.1"):
            raise ApiError(505, f"HTTP {version} is not spoken here")
        head = sum(len(name) + len(value) for name, value in scope["headers"])
        if head + len(path) + len(scope["query_string"]) > MOST_HEAD:
            raise ApiError(431, f"the request's path and headers have more than {MOST_HEAD} bytes")
        while "//" in path:  # a base URL with a slash at its end
            path = path.replace("//", "/")
        self._check_host(scope)
        if path not in OPEN:
            self._check_key(scope)
        if path.startswith(PLAIN):
            path = self._plain(path, scope)
        scope["path"] = path if path == "/" else path.rstrip("/")
        scope["raw_path"] = quote(scope["path"]).encode()

    def _plain(self, path: str, scope: Scope) -> str:
        """``/api/NAME`` is the name's chat, or its card; ``/api/NAME/v1/…`` the route with that name alone."""
        words = path.removeprefix(PLAIN).rstrip("/").split("/")
        for count in range(len(words), 0, -1):  # names may have slashes
            name, rest = "/".join(words[:count]), "/".join(words[count:])
            if name in self.served and (not rest or rest.startswith(("v1/", "tokenize"))):
                scope[SERVED] = name
                if rest:
                    return f"/{rest}"
                return f"/v1/models/{name}" if scope["method"] in ("GET", "HEAD") else "/v1/chat/completions"
        raise ApiError(404, "no adapter is served at this path; GET /v1/models lists their names", "model")

    def _check_host(self, scope: Scope) -> None:
        """A page elsewhere whose name was turned to this machine has that name as its host."""
        if self.settings.host not in LOOPBACK and not self.settings.host.startswith("127."):
            return
        host = HTTPConnection(scope).headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in (*LOOPBACK, *self.settings.allowed_hosts):
            raise ApiError(421, "this server answers to localhost alone: give --allowed-hosts NAME to allow a name")

    def _check_key(self, scope: Scope) -> None:
        if not self.settings.api_key or scope["method"] == "OPTIONS":
            return
        kind, _, key = HTTPConnection(scope).headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode(), self.settings.api_key.encode())
        if kind.lower() != "bearer" or not right:
            text = "no API key, or a wrong one: send Authorization: Bearer KEY"
            raise ApiError(401, text, headers={"www-authenticate": "Bearer"})


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {**error.headers, "connection": "close"}  # the body is not read
    response = Response(json.dumps(error.body()), error.status, headers, "application/json")
    await response(scope, receive, send)
