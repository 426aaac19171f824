"""The HTTP application: its routes, and how a request becomes the engine's and its answer JSON or a stream."""

import asyncio
import json
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import Request as EngineRequest
from lora_ms.infer.sampling import Sampling
from lora_ms.infer.text_stream import TextStream
from lora_ms.serve.bodies import (
    Asking,
    B,
    ChatBody,
    CompletionBody,
    LoadBody,
    TokenizeBody,
    UnloadBody,
    parse,
    parse_json,
    unknown_keys,
)
from lora_ms.serve.catalog import Catalog, Served, check_name
from lora_ms.serve.engine_thread import EngineThread
from lora_ms.serve.faults import ApiError
from lora_ms.serve.gate import IGNORED, SERVED, Gate
from lora_ms.serve.generation import Generation, Piece
from lora_ms.serve.metrics import ServerNumbers
from lora_ms.serve.replies import ChatReply, CompletionReply, Prompted, Reply, usage_of
from lora_ms.serve.settings import MOST_ANSWERS, ServeSettings

T = TypeVar("T")
COMPLETION_TOKENS = 16  # of a completion whose request says nothing: OpenAI's default, and vLLM's
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/page.svg": "page.svg"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Put the adapter of a folder into the model under a name, and take it out, in the engine's thread; ``load`` returns the
# chat template of the folder, if it has one. They raise LoraMsError.
Load = Callable[[str, Path], str | None]
Unload = Callable[[str], None]


class EventStream(Response):
    """Chunks as server-sent events; a fault in their middle is an event with ``error``. It ends with ``[DONE]``.

    Args:
        close: called at the end, however it comes.
        seconds: after which the client is given up.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], close: Callable[[], None], seconds: float):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self.chunks = chunks
        self.close = close
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def event(text: str, last: bool = False) -> None:
            await send(
                {
                    "type": "http.response.body",
                    "body": f"data: {text}\n\n".encode("utf-8", "backslashreplace"),
                    "more_body": not last,
                }
            )

        async def write() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self.chunks) as chunks:
                try:
                    async for chunk in chunks:
                        await event(_dumped(chunk))
                except ApiError as error:
                    await event(_dumped(error.body()))
            await event("[DONE]", last=True)

        try:
            with anyio.move_on_after(self.seconds):  # a client that reads nothing would keep it for ever
                await while_client_waits(receive, write())
        finally:
            self.close()


async def while_client_waits(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns; None where the client went before it ended, which ends it."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, with Chinese as it is."""
    data = _dumped(value).encode("utf-8", "backslashreplace")
    return Response(data, status, headers, "application/json")


def fault_response(error: ApiError) -> Response:
    """A request's fault."""
    return json_response(error.body(), error.status, error.headers)


class Application:
    """The routes of one server.

    Args:
        engine: not started yet; it is by the application's own start.
        sampling: of requests that say nothing of it.
        load, unload: see above.
    """

    def __init__(
        self,
        engine: EngineThread,
        catalog: Catalog,
        settings: ServeSettings,
        sampling: Sampling,
        load: Load,
        unload: Unload,
    ):
        self.engine = engine
        self.catalog = catalog
        self.settings = settings
        self.sampling = sampling
        self.load = load
        self.unload = unload
        self.metrics = ServerNumbers(engine)
        self.changing = anyio.Lock()  # adapters are loaded and unloaded one at a time

    def asgi(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.numbers, methods=["GET"]),
            *(Route(path, self.page, methods=["GET"]) for path in PAGE_FILES),
        ]

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            yield
            await anyio.to_thread.run_sync(self.engine.stop)

        cors = Middleware(
            CORSMiddleware,
            allow_origins=self.settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[IGNORED],
        )
        gate = Middleware(Gate, settings=self.settings, metrics=self.metrics, served=self.catalog.served)
        return Starlette(
            routes=routes,
            lifespan=lifespan,
            middleware=[*([cors] if self.settings.allowed_origins else []), gate],
            exception_handlers={HTTPException: _http_fault, ApiError: _api_fault, Exception: _own_fault},
        )

    # --- routes

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        body, named = await self.read(request, ChatBody)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs expects logprobs: true", "top_logprobs")
        asked, key = body.max_completion_tokens, "max_completion_tokens"
        if asked is None:
            asked, key = body.max_tokens, "max_tokens"
        elif body.max_tokens not in (None, asked):
            raise ApiError(400, f"max_tokens {body.max_tokens} and {key} {asked}: give one of them", key)
        if asked == 0:
            raise ApiError(400, f"{key} 0: a chat's answer has at least one token", key)
        prompt = self.catalog.chat_tokens(named, body.messages)
        most = self.catalog.new_tokens(prompt, asked, ("messages", key))
        if asked is None:
            most = min(most, self.settings.default_tokens or most)
        common = self.engine_request(body, named, body.top_logprobs if body.logprobs else None)
        requests = [EngineRequest(prompt=tuple(prompt), max_new_tokens=most, sample=i, **common) for i in range(body.n)]
        streams = [self.text_stream(body, named) for _ in requests]
        reply = ChatReply(named, [Prompted(prompt)], body.n, body.logprobs, body.return_token_ids)
        return await self.answer(request, body, reply, requests, streams)

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        body, named = await self.read(request, CompletionBody)
        if len(body.prompts) * body.n > MOST_ANSWERS:
            raise ApiError(400, f"{len(body.prompts)} prompts with n {body.n}: at most {MOST_ANSWERS} answers", "n")
        common = self.engine_request(body, named, body.logprobs)
        prompts, requests, streams = [], [], []
        before: Counter[tuple[int, ...]] = Counter()  # answers to each prompt, as equal ones draw other numbers
        for each in body.prompts:
            tokens = self.catalog.text_tokens(named, each, special=True) if isinstance(each, str) else each
            most = self.catalog.new_tokens(tokens, body.max_tokens, ("prompt", "max_tokens"))
            if body.max_tokens is None:
                most = min(most, self.settings.default_tokens or COMPLETION_TOKENS)
            if most == 0 and not body.echo:
                raise ApiError(400, "max_tokens 0 expects echo: true", "max_tokens")
            echo = (each if isinstance(each, str) else named.tokenizer.decode(tokens)) if body.echo else ""
            prompts.append(Prompted(tokens, echo))
            scores = body.logprobs if body.echo else None
            ids = tuple(tokens)
            for _ in range(body.n):
                requests.append(
                    EngineRequest(prompt=ids, max_new_tokens=most, sample=before[ids], prompt_logprobs=scores, **common)
                )
                before[ids] += 1
                streams.append(self.text_stream(body, named, tokens))
        reply = CompletionReply(named, prompts, body.n, body.logprobs is not None, body.return_token_ids)
        return await self.answer(request, body, reply, requests, streams)

    async def models(self, request: Request) -> Response:
        """``/v1/models``: below ``/api/NAME``, that one alone."""
        name = request.scope.get(SERVED)
        cards = self.catalog.cards() if name is None else [self.catalog.card(self.catalog.find(name))]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """``/v1/models/NAME``."""
        name = request.path_params["name"]
        if request.scope.get(SERVED) not in (None, name):
            raise ApiError(404, "this path serves one adapter alone", "model")
        return json_response(self.catalog.card(self.catalog.find(name)))

    async def tokenize(self, request: Request) -> Response:
        """``/tokenize``."""
        body, named = await self.read(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages", "prompt")
        if body.messages is not None:
            tokens = self.catalog.chat_tokens(named, body.messages)
        else:
            tokens = self.catalog.text_tokens(named, body.prompt or "", body.add_special_tokens)
        texts = named.tokenizer.convert_ids_to_tokens(tokens)
        return json_response(
            {"count": len(tokens), "max_model_len": self.catalog.length, "tokens": tokens, "token_strs": texts}
        )

    async def health(self, request: Request) -> Response:
        """``/health``: 200 while the model can be run."""
        return Response(status_code=200 if self.engine.healthy else 503)

    async def numbers(self, request: Request) -> Response:
        """``/metrics``."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        """The page and its files."""
        file = PAGE / PAGE_FILES[request.url.path]
        return Response(file.read_bytes(), media_type=TYPES[file.suffix], headers={"cache-control": "no-cache"})

    async def load_adapter(self, request: Request) -> Response:
        """``/v1/load_lora_adapter``."""
        folders = self.check_loading()
        body = await self.read_body(request, LoadBody)
        folder = _inside(body.lora_path, folders)
        async with self.changing:
            if body.lora_name in self.catalog.served:
                raise ApiError(400, f"The lora adapter '{body.lora_name}' has already been loaded.", "lora_name")
            try:
                check_name(body.lora_name)
                template = await self.engine.call(lambda: self.load(body.lora_name, folder))
                try:
                    self.catalog.add(body.lora_name, str(folder), template)
                except BaseException:  # its chat template cannot be used
                    await self.engine.call(lambda: self.unload(body.lora_name))
                    raise
            except LoraMsError as error:
                raise ApiError(400, str(error), "lora_path") from None
        print(f"loaded adapter {body.lora_name}: {folder}", flush=True)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        """``/v1/unload_lora_adapter``."""
        self.check_loading()
        body = await self.read_body(request, UnloadBody)
        async with self.changing:
            found = self.catalog.served.get(body.lora_name)
            if found is None or found.adapter is None:
                raise ApiError(404, f"The lora adapter '{body.lora_name}' cannot be found.", "lora_name")
            self.catalog.remove(body.lora_name)
            try:
                await self.engine.call(lambda: self.unload(body.lora_name))
            except LoraMsError as error:
                self.catalog.served[body.lora_name] = found
                raise ApiError(400, str(error), "lora_name") from None
            self.metrics.forget(body.lora_name)
        print(f"unloaded adapter {body.lora_name}", flush=True)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def check_loading(self) -> Sequence[Path]:
        """The folders below which adapters may be loaded. Raises ApiError where there are none."""
        if not self.settings.adapter_folders:
            text = "loading adapters is off: start the server with --adapter-folders DIR to allow those below DIR"
            raise ApiError(403, text)
        return self.settings.adapter_folders

    # --- from a request to its answer

    async def read_body(self, request: Request, kind: type[B]) -> B:
        """The body of a request."""
        data = await _bytes_of(request, self.settings)
        value = parse_json(data)
        plain = request.scope.get(SERVED)
        if plain is not None and isinstance(value, dict):
            value = _for_plain_path(value, plain, kind)
        body = parse(kind, value)
        unknown = unknown_keys(body)
        if unknown:
            request.scope[IGNORED] = ", ".join(unknown)
        return body

    async def read(self, request: Request, kind: type[B]) -> tuple[B, Served]:
        """The body of a request that names a model, and what that is."""
        body = await self.read_body(request, kind)
        return body, self.catalog.find(getattr(body, "model", None))

    def engine_request(self, body: Asking, named: Served, logprobs: int | None) -> dict[str, Any]:
        """What all requests to the engine of one request here have in common."""
        given = {
            key: value
            for key in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
            if (value := getattr(body, key)) is not None
        }
        if given.get("top_k") == -1:  # vLLM's word for all
            given["top_k"] = 0
        drawn = self.sampling.do_sample or {"temperature", "top_p", "top_k", "min_p"} & given.keys()
        if body.seed is None:
            given["seed"] = secrets.randbits(63)
        else:
            given["seed"] = body.seed % 2**64
        sampling = {**vars(self.sampling), **given, "do_sample": bool(drawn), "logit_bias": body.biases()}
        ends = () if body.ignore_eos else named.ends
        return {
            "sampling": Sampling(**sampling),
            "eos_token_ids": (*ends, *body.stop_token_ids),
            "adapter": named.adapter,
            "logprobs": logprobs,
        }

    def text_stream(self, body: Asking, named: Served, prompt: Sequence[int] = ()) -> TextStream:
        """What makes text of one answer's tokens."""
        return TextStream(named.tokenizer, body.stops, prompt, body.skip_special_tokens)

    async def answer(
        self,
        request: Request,
        body: Asking,
        reply: Reply,
        requests: Sequence[EngineRequest],
        streams: Sequence[TextStream],
    ) -> Response:
        """Runs ``requests``; the answer is a stream where ``body`` asks for one."""
        generation = Generation(self.engine, requests, streams)
        if body.stream:
            await generation.__aenter__()  # faults of the request are an answer with their status
            seconds = self.settings.request_timeout + self.settings.read_timeout
            return EventStream(self.chunks(body, reply, generation), generation.close, seconds)

        async def whole() -> Response:
            pieces = []
            async with generation:
                async with aclosing(self.counted(reply, generation)) as found:
                    async for piece in found:
                        pieces.append(piece)
            return json_response(reply.whole(pieces, self.usage(reply, generation)))

        response = await while_client_waits(request.receive, whole())
        if response is None:
            raise ClientDisconnect
        return response

    async def chunks(self, body: Asking, reply: Reply, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream."""
        for chunk in reply.opening():
            yield chunk
        async with aclosing(self.counted(reply, generation)) as pieces:
            async for piece in pieces:
                found = reply.chunk(piece)
                if found is not None:
                    yield found
        if body.include_usage:
            yield reply.usage_chunk(self.usage(reply, generation))

    def too_long(self) -> ApiError:
        return ApiError(504, f"the answer took longer than {self.settings.request_timeout:g} s and was stopped")

    async def counted(self, reply: Reply, generation: Generation) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers, counted for the metrics."""
        began, name, first = time.monotonic(), reply.served.name, True
        deadline = began + self.settings.request_timeout
        metrics = self.metrics
        metrics.prompt_tokens.labels(name).inc(sum(len(prompt.tokens) for prompt in reply.prompts))
        finishes: dict[int, str] = {}
        pieces = generation.pieces()
        try:
            while True:
                try:
                    with anyio.fail_after(deadline - time.monotonic()):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    raise self.too_long() from None
                if first and piece.tokens:
                    metrics.first_token.labels(name).observe(time.monotonic() - began)
                    first = False
                if piece.finish is not None:
                    finishes[piece.index] = piece.finish
                yield piece
        finally:
            for index in range(len(generation.requests)):
                metrics.answers.labels(name, finishes.get(index, "cancelled")).inc()
            metrics.generated_tokens.labels(name).inc(sum(generation.tokens))
            metrics.cached_tokens.labels(name).inc(sum(generation.cached))
            metrics.seconds.labels(name).observe(time.monotonic() - began)

    def usage(self, reply: Reply, generation: Generation) -> dict[str, Any]:
        return usage_of(reply.prompts, generation.tokens, generation.cached)


def _for_plain_path(value: dict[str, Any], name: str, kind: type) -> dict[str, Any]:
    """A body below ``/api/NAME``: its model is that one, and a chat may be asked by ``prompt``."""
    if value.get("model") not in (None, name):
        raise ApiError(400, f"this path serves {name}: leave model out, or ask /v1/chat/completions", "model")
    value = {**value, "model": name}
    if kind is ChatBody and isinstance(value.get("prompt"), str) and value.get("messages") is None:
        value["messages"] = [{"role": "user", "content": value.pop("prompt")}]
    return value


async def _bytes_of(request: Request, settings: ServeSettings) -> bytes:
    """The body of a request, within the limits of size and time."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "a compressed body is not read: send it as it is")
    close = {"connection": "close"}
    too_large = ApiError(413, f"the body is larger than {settings.max_body} bytes", headers=close)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > settings.max_body:
        raise too_large
    data = bytearray()
    try:
        with anyio.fail_after(settings.read_timeout):
            async for chunk in request.stream():
                data += chunk
                if len(data) > settings.max_body:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {settings.read_timeout:g} s", headers=close) from None
    return bytes(data)


def _inside(path: str, folders: Sequence[Path]) -> Path:
    """The folder that ``path`` names, links followed. One answer for all that is not allowed, whether there or not."""
    try:
        found = Path(path).resolve(strict=True) if Path(path).is_absolute() else _below(path, folders)
        if found is not None and found.is_dir() and any(found.is_relative_to(folder) for folder in folders):
            return found
    except (OSError, RuntimeError, ValueError):
        pass
    raise ApiError(400, "lora_path is not a folder below one of --adapter-folders", "lora_path")


def _below(path: str, folders: Sequence[Path]) -> Path | None:
    return next((place.resolve() for folder in folders if (place := folder / path).is_dir()), None)


# --- faults


async def _http_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: "there is nothing at this path", 405: "this path does not take this method"}
    return fault_response(
        ApiError(error.status_code, text.get(error.status_code, error.detail), headers=dict(error.headers or {}))
    )


async def _api_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return fault_response(error)


async def _own_fault(request: Request, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return fault_response(ApiError(500, "the server failed; its log says why"))
