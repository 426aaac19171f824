"""What becomes of requests when the engine is full, fails, or is slow: with an engine that is made up."""

import asyncio
import json
import threading
import time
from collections import deque

import pytest

from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import Event, Request
from lora_ms.infer.sampling import Sampling
from lora_ms.serve.app import Application
from lora_ms.serve.catalog import Catalog
from lora_ms.serve.engine_thread import EngineThread
from lora_ms.serve.settings import ServeSettings


class MadeUp:
    """Answers every prompt with its first token, again and again; with a fault or a pause at each step, if asked."""

    rows, length = 2, 64

    def __init__(self):
        self.requests: dict[int, list] = {}
        self.ended = deque()
        self.count = 0
        self.pause = 0.0
        self.fault: BaseException | None = None
        self.cancelled: list[int] = []

    @property
    def idle(self):
        return not self.requests and not self.ended

    running = property(lambda self: min(2, len(self.requests)))
    waiting = property(lambda self: max(0, len(self.requests) - 2))

    def submit(self, request: Request) -> int:
        if len(request.prompt) + request.max_new_tokens > self.length:
            raise LoraMsError("too long")
        self.count += 1
        self.requests[self.count] = [request, 0]
        return self.count

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)
        if self.requests.pop(id, None):
            self.ended.append(Event(id, finish="cancelled"))

    def step(self) -> list[Event]:
        time.sleep(self.pause)
        if self.fault is not None:
            raise self.fault
        events, self.ended = [*self.ended], deque()
        for id, row in [*self.requests.items()][: self.rows]:
            row[1] += 1
            done = row[1] >= row[0].max_new_tokens
            events.append(Event(id, row[0].prompt[0], finish="length" if done else None))
            if done:
                del self.requests[id]
        return events


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained("examples/tiny/model")


def run(tokenizer, engine, work, **settings):
    """``work(ask)`` with an application around ``engine``; ``ask(body, …)`` is a chat: (status, body)."""
    catalog = Catalog(["m"], tokenizer, "m", (), engine.length)
    thread = EngineThread(engine, engine.rows + 2)

    def none(*args):
        raise LoraMsError("no adapters")

    app = Application(thread, catalog, ServeSettings(**settings), Sampling(), none, none).asgi()

    async def ask(body, path="/v1/completions", leave: float | None = None, method="POST"):
        sent, status, data = False, 0, b""

        async def receive():
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            await asyncio.sleep(20 if leave is None else leave)
            return {"type": "http.disconnect"}

        async def send(message):
            nonlocal status, data
            status = message.get("status", status)
            data += message.get("body", b"")

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        await app({**scope, "headers": headers, "http_version": "1.1"}, receive, send)
        return status, data.decode()

    async def main():
        async with app.router.lifespan_context(app):
            return await work(ask)

    return asyncio.run(main())


def test_a_full_queue_is_said_at_once(tokenizer):
    engine = MadeUp()
    engine.pause = 0.02

    async def work(ask):
        body = {"prompt": "a", "max_tokens": 10}
        found = await asyncio.gather(*(ask(body) for _ in range(9)))
        assert (await ask({**body, "n": 5}))[0] == 429
        assert (await ask(body))[0] == 200
        return sorted(status for status, _ in found)

    assert run(tokenizer, engine, work) == [200] * 4 + [429] * 5


def test_all_answers_of_a_request_have_a_place_from_its_beginning(tokenizer):
    """Requests that come while an earlier one hands its answers over find its places taken."""
    engine = MadeUp()
    engine.pause = 0.02

    async def work(ask):
        body = {"prompt": "a", "max_tokens": 3, "n": 3}
        found = await asyncio.gather(*(ask(body) for _ in range(5)))
        assert (await ask({**body, "n": 4}))[0] == 200
        return sorted(status for status, _ in found)

    assert run(tokenizer, engine, work) == [200] + [429] * 4
    assert engine.count == 3 + 4


def test_a_request_that_is_left_as_it_gets_its_number_is_cancelled():
    engine = MadeUp()

    class Calls(set):
        def add(self, future):
            super().add(future)
            future.add_done_callback(lambda _: task.cancel())  # the result is there, and the task has not been woken

    async def work():
        nonlocal task
        thread = EngineThread(engine, 4)
        thread._calls = Calls()
        thread.start()
        thread.reserve(1)
        task = asyncio.ensure_future(thread.submit(Request((1,), 50), asyncio.Queue()))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not thread._told and thread._reserved == 0
        await asyncio.to_thread(thread.stop)

    task: asyncio.Task
    asyncio.run(work())
    assert engine.cancelled == [1]


def test_a_request_counts_once_as_it_gets_its_number():
    """Two results that reach the event loop together: the first one's place is free to be counted before it wakes."""
    engine, found = MadeUp(), []
    both = threading.Event()

    async def work():
        thread, loop = EngineThread(engine, 3), asyncio.get_running_loop()

        def submit(request):
            id = MadeUp.submit(engine, request)
            if id == 2:
                loop.call_soon_threadsafe(lambda: found.append((len(thread._told), thread._reserved)))
                both.set()
            return id

        engine.submit = submit
        thread.start()
        thread.reserve(2)
        asked = [asyncio.ensure_future(thread.submit(Request((1,), 5), asyncio.Queue())) for _ in range(2)]
        await asyncio.sleep(0)
        both.wait(10)  # the loop stands still
        await asyncio.gather(*asked)
        assert thread._reserved == 0
        await asyncio.to_thread(thread.stop)

    asyncio.run(work())
    assert found == [(1, 1)]


def test_equal_prompts_draw_other_numbers(tokenizer):
    engine = MadeUp()
    asked = []
    submit = engine.submit
    engine.submit = lambda request: asked.append(request) or submit(request)

    async def work(ask):
        return await ask({"prompt": ["a", "b", "a"], "n": 1, "max_tokens": 1, "temperature": 1})

    assert run(tokenizer, engine, work)[0] == 200
    assert [request.sample for request in asked] == [0, 0, 1]


def test_a_request_that_takes_too_long_is_stopped(tokenizer):
    engine = MadeUp()
    engine.pause = 0.05

    async def work(ask):
        whole = await ask({"prompt": "a", "max_tokens": 60})
        stream = await ask({"prompt": "a", "max_tokens": 60, "stream": True})
        return whole, stream

    (status, text), (stream_status, stream) = run(tokenizer, engine, work, request_timeout=0.3)
    assert (status, json.loads(text)["error"]["code"]) == (504, 504)
    assert stream_status == 200
    *_, fault, done = stream.strip().split("\n\n")
    assert json.loads(fault.removeprefix("data: "))["error"]["code"] == 504
    assert done == "data: [DONE]"
    assert engine.cancelled == [1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_when_its_client_goes(tokenizer, stream):
    engine = MadeUp()
    engine.pause = 0.02

    async def work(ask):
        began = time.monotonic()
        await ask({"prompt": "a", "max_tokens": 60, "n": 3, "stream": stream}, leave=0.1)
        while not engine.idle:
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    assert run(tokenizer, engine, work) < 0.6
    assert sorted(engine.cancelled) == [1, 2, 3]


def test_a_fault_of_the_engine_ends_its_requests_alone(tokenizer, capsys):
    engine = MadeUp()

    async def work(ask):
        engine.fault = RuntimeError("a secret of the model")
        status, text = await ask({"prompt": "a"})
        sick = await ask(None, "/health", method="GET")
        engine.fault = None
        return (
            status,
            text,
            sick[0],
            await ask({"prompt": "a", "max_tokens": 2}),
            await ask(None, "/health", method="GET"),
        )

    status, text, sick, again, well = run(tokenizer, engine, work)
    assert (status, sick, again[0], well[0]) == (500, 503, 200, 200)
    assert "secret" not in text
    assert "a secret of the model" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_is_gone_is_said(tokenizer, capsys):
    engine = MadeUp()

    async def work(ask):
        engine.fault = SystemExit("gone")
        return [await ask({"prompt": "a"}), await ask({"prompt": "a"})]

    assert [status for status, _ in run(tokenizer, engine, work)] == [500, 503]


def test_a_stop_string_frees_the_row(tokenizer):
    engine = MadeUp()
    engine.pause = 0.02
    token = tokenizer("b").input_ids[0]

    async def work(ask):
        found = json.loads((await ask({"prompt": [token], "max_tokens": 50, "stop": "bbb"}))[1])
        while not engine.idle:
            await asyncio.sleep(0.01)
        return found

    (choice,) = run(tokenizer, engine, work)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert engine.cancelled == [1]


def test_how_long_an_answer_is_where_its_request_says_nothing(tokenizer):
    token = tokenizer("b").input_ids[0]

    async def work(ask):
        chat = {"messages": [{"role": "user", "content": "a"}]}
        bodies = [({"prompt": [token]}, "/v1/completions"), (chat, "/v1/chat/completions")]
        return [json.loads((await ask(body, path))[1])["usage"] for body, path in bodies]

    text, chat = run(tokenizer, MadeUp(), work)
    assert (text["completion_tokens"], chat["total_tokens"]) == (16, MadeUp.length)
    assert [usage["completion_tokens"] for usage in run(tokenizer, MadeUp(), work, default_tokens=5)] == [5, 5]
