"""The thread that owns the engine. Handlers of requests, in the event loop, hand it work and get its events."""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import Event, Request
from lora_ms.serve.faults import ApiError

T = TypeVar("T")
FAILED = "the model could not be run; the server's log says why"


class StepEngine(Protocol):
    """What is used of ``infer.engine.Engine``."""

    length: int
    rows: int

    @property
    def idle(self) -> bool: ...

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    def submit(self, request: Request) -> int: ...

    def cancel(self, id: int) -> None: ...

    def step(self) -> list[Event]: ...


class EngineThread:
    """Runs ``engine`` until ``stop``.

    Args:
        most: requests that run and wait at once; further ones are refused.
        on_death: called in the event loop where the thread ends by itself, which should not happen.
    """

    def __init__(self, engine: StepEngine, most: int, on_death: Callable[[], None] = lambda: None):
        self.engine = engine
        self.most = most
        self.on_death = on_death
        self.healthy = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._told: dict[int, asyncio.Queue[Event]] = {}  # who is told of a request; the event loop's
        self._calls: set[asyncio.Future] = set()
        self._reserved = 0  # for requests that have no number yet
        self._dead = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to work for the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step, if it runs."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    def reserve(self, requests: int) -> None:
        """Keeps places for so many more, which ``submit`` takes, or ``release`` gives back.

        Raises:
            ApiError: so many more cannot wait.
        """
        if len(self._told) + self._reserved + requests > self.most:
            raise ApiError(429, "too many requests wait: try again in a moment", headers={"retry-after": "1"})
        self._reserved += requests

    def release(self, requests: int) -> None:
        """Gives back places that were reserved."""
        self._reserved -= requests

    async def submit(self, request: Request, events: "asyncio.Queue[Event]") -> int:
        """Hands over a request that has a place, whose events go into ``events``; returns its number.

        Raises:
            ApiError: the engine refuses it.
        """

        reserved = True

        def told(id: int) -> None:  # its number holds the place from here on: until we are woken both would count
            nonlocal reserved
            reserved = False
            self.release(1)
            self._told[id] = events

        try:
            return await self.call(lambda: self.engine.submit(request), told, self.cancel)
        except LoraMsError as error:
            raise ApiError(400, str(error)) from None
        finally:
            if reserved:
                self.release(1)

    def cancel(self, id: int) -> None:
        """Ends a request; nobody is told of it any more. One that has ended stays so."""
        self._told.pop(id, None)
        self._inbox.put(lambda: self.engine.cancel(id))

    async def call(
        self,
        act: Callable[[], T],
        then: Callable[[T], None] = lambda result: None,
        abandoned: Callable[[T], None] = lambda result: None,
    ) -> T:
        """What ``act`` returns, or raises, in the engine's thread, between two steps.

        then: called with the result in the event loop, before anything else that the thread reports.
        abandoned: called in its place where the caller does not wait any more.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def resolve(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                if error is None:
                    abandoned(result)
            elif error is not None:
                future.set_exception(error)
            else:
                then(result)
                future.set_result(result)

        def run() -> None:
            try:
                self._report(resolve, act(), None)
            except Exception as error:
                self._report(resolve, None, error)

        if self._dead:
            raise ApiError(503, FAILED)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        self._inbox.put(run)
        try:
            return await future
        except asyncio.CancelledError:
            # the caller left after `resolve` and before it was woken
            if future.done() and not future.cancelled() and future.exception() is None:
                abandoned(future.result())
            raise

    def _main(self) -> None:
        try:
            while self._take():
                if self.engine.idle:
                    continue
                try:
                    events = self.engine.step()
                except Exception as error:
                    self._failed(error)
                    continue
                self.healthy = True
                if events:
                    self._report(self._tell, events)
        except BaseException:  # a fault of ours or of a library's: nothing can be answered any more
            traceback.print_exc()
            self._report(self._died)

    def _take(self) -> bool:
        """Does what was handed over; waits for it while the engine is idle. False: ``stop`` was called."""
        while True:
            try:
                act = self._inbox.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if act is None:
                return False
            act()

    def _failed(self, error: Exception) -> None:
        """A step failed: what ran or waited ends, and the next request may do better."""
        self.healthy = False
        print(f"error: a step of the engine failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        traceback.print_exception(error)
        self._report(self._all_failed)

    def _all_failed(self) -> None:
        for id in list(self._told):
            self._told[id].put_nowait(Event(id, finish="error", error=FAILED))
            self.cancel(id)

    def _died(self) -> None:
        self._dead, self.healthy = True, False
        self._all_failed()
        for future in [*self._calls]:
            if not future.done():
                future.set_exception(ApiError(503, FAILED))
        self.on_death()

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            told = self._told.get(event.id)
            if told is None:
                continue
            if event.finish is not None:
                del self._told[event.id]
            told.put_nowait(event)

    def _report(self, act: Callable[..., None], *args: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(act, *args)
