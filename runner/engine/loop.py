"""EngineLoop: the event loop's side of the one crossing between two threads.

Owns the requests in flight and their output queues; refuses to know what an array, a socket or a dialect is. Only
`run(added, cancelled, emit)` runs in the executor's thread, a tick for each step; a tick emits its outputs before the
next step is begun, so that they are encoded and sent while the device works. It comes back when there is something new
to take along: to come back after every step cost 1 % of a small model's.

A request that was admitted ends with exactly one output that is its last, unless its reader leaves first. A reader that
lags more than `MAX_PENDING` outputs behind is failed: to pause its row instead would let a reader that never reads hold
a place in the batch for ever.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

from runner.engine.executor_thread import ExecutorThread
from runner.engine.reader import Reader
from runner.engine.types import (
    EmbeddingRequest,
    Engine,
    EngineState,
    EngineStatus,
    Failed,
    Output,
    Request,
    RequestId,
)
from runner.errors import AlreadyLoaded, Busy, GenerationError, NotReady

logger = logging.getLogger("runner.engine")

Progress: TypeAlias = Callable[[float], None]
BuildEngine: TypeAlias = Callable[[Progress], Engine]
"""Builds the engine in the executor's thread; calls its argument with 0 to 1, which may raise to abandon the load."""

Emit: TypeAlias = Callable[[list[Output], EngineStatus], None]
"""Hands a tick's outputs to the event loop. Thread: the executor's."""

MAX_PENDING = 1024
COMPLETIONS = 4
"""Requests that are completed at once. In threads of their own, so that preparing others waits for none of them."""
LOOKERS = 2
"""Requests with pictures that are prepared at once: each may take some hundred megabytes meanwhile."""
UNLOAD_BOUND_S = 1.0


class LoadAbandoned(NotReady):
    """The load was given up because the process or the engine is being closed."""

    def __init__(self) -> None:
        super().__init__("the load was abandoned")


@dataclass(slots=True)
class _Load:
    """A load under way. The event loop's thread sets `abandoned`, the executor's thread sets `progress`."""

    progress: float = 0.0
    abandoned: bool = False

    def report(self, progress: float) -> None:
        """Thread: the executor's. Raises LoadAbandoned."""
        if self.abandoned:
            raise LoadAbandoned
        self.progress = progress


class EngineLoop:
    """Drives one engine. All methods belong to the event loop's thread."""

    def __init__(self, thread: ExecutorThread) -> None:
        self._thread = thread
        self._status = EngineStatus()
        self._engine: Engine | None = None
        self._load: _Load | None = None
        self._loading: asyncio.Task[None] | None = None
        self._failed = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._closing = False
        self._ids = itertools.count(1)
        self._readers: dict[RequestId, Reader] = {}
        self._preparing = 0
        self._added: dict[RequestId, object] = {}
        self._cancelled: list[RequestId] = []
        self._completed = False
        self._completing = ThreadPoolExecutor(COMPLETIONS, "completion")
        self._looking = ThreadPoolExecutor(LOOKERS, "pictures")

    @property
    def status(self) -> EngineStatus:
        """The last snapshot; never waits."""
        if self._load is not None:
            return EngineStatus(state=EngineState.LOADING, progress=self._load.progress)
        return self._status

    async def failure(self) -> str:
        """Wait until a load fails or the engine is lost; why."""
        await self._failed.wait()
        return self._status.error or "the engine failed"

    def lose(self, reason: str) -> None:
        """End all requests with an error: what the engine computes with is gone. Its thread may never come back."""
        self._closing = True
        self._status = EngineStatus(state=EngineState.ERROR, error=reason)
        self._fail_all(GenerationError(reason))

    async def load(self, build: BuildEngine) -> None:
        """Build the engine in the executor's thread and start serving.

        A caller that is cancelled abandons the load: it stops at its next report of progress.

        Raises:
            AlreadyLoaded: there is an engine, or a load under way.
            NotReady: closing, or closed while loading.
            Exception: whatever `build` raised; the status is then ERROR and another load may follow.
        """
        if self._closing:
            raise NotReady("the runner is shutting down")
        if self._engine is not None or self._load is not None:
            raise AlreadyLoaded
        load = self._load = _Load()
        self._loading = asyncio.create_task(self._run_load(build, load), name="engine load")
        self._loading.add_done_callback(_retrieved)
        try:
            await asyncio.shield(self._loading)
        except asyncio.CancelledError:
            load.abandoned = True
            raise

    async def unload(self) -> None:
        """End all requests with NotReady, abandon a load, free the engine, go back to LAUNCHED."""
        await self._abandon_load()
        self._fail_all(NotReady("the model is being unloaded"))
        engine, self._engine = self._engine, None
        driver, self._driver = self._driver, None
        self._status = EngineStatus()
        if driver is not None:
            # The tick in flight runs on; what is called below comes after it.
            driver.cancel()
            await asyncio.wait([driver])
        if engine is not None:
            await self._thread.call(engine.close)

    @asynccontextmanager
    async def submit(self, request: Request) -> AsyncIterator[AsyncIterator[Output]]:
        """Admit a request: `async with loop.submit(request) as outputs: async for output in outputs`.

        Entering prepares it (off the event loop, unless that is quick), queues it and waits until its preparation is
        complete, which may be after its computing has begun; leaving early, by whatever way, cancels it.

        Raises:
            BadRequest: on entering; nothing is queued.
            NotReady: on entering; no engine.
            Busy: on entering; the queue is full.
        """
        engine = self._ready_engine()
        if len(self._readers) + self._preparing >= engine.max_requests:
            raise Busy("the queue is full, try again later")
        self._preparing += 1
        try:
            prepared = await self._prepare(engine, request)
        finally:
            self._preparing -= 1
        if self._ready_engine() is not engine:
            raise NotReady("the model was replaced")
        request_id = next(self._ids)
        reader = self._readers[request_id] = Reader()
        self._added[request_id] = prepared
        self._quiet.clear()
        self._wake.set()
        try:
            await self._complete(engine.completion(prepared), reader)
            yield reader
        finally:
            self._cancel(request_id)

    async def _prepare(self, engine: Engine, request: Request) -> object:
        """What `engine.prepare` makes of a request, in a thread unless that is quick."""
        if engine.is_quick(request):
            return engine.prepare(request)
        has_pictures = not isinstance(request, EmbeddingRequest) and bool(request.images)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._looking if has_pictures else None, engine.prepare, request)

    async def _complete(self, completion: Callable[[], None] | None, reader: Reader) -> None:
        """Have a queued request completed, or see it fail meanwhile. Raises what `completion` raises.

        One that has begun runs to its end, even if nobody wants it any more.
        """
        if completion is None:
            return
        loop = asyncio.get_running_loop()
        reader.waiter = loop.create_future()
        running = loop.run_in_executor(self._completing, completion)
        try:
            await asyncio.wait((running, reader.waiter), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
                self._completed = True
                self._wake.set()
        finally:
            running.cancel()

    async def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of `text`. Raises NotReady, BadRequest."""
        return await asyncio.to_thread(self._ready_engine().tokenize, text, add_bos=add_bos)

    async def close(self, grace_s: float) -> None:
        """Stop admitting, give running requests `grace_s`, cancel the rest, unload. Idempotent.

        Returns after `grace_s + UNLOAD_BOUND_S` at the latest, even if the executor's thread is stuck in a step.
        """
        self._closing = True
        if self._load is not None:
            self._load.abandoned = True
        try:
            async with asyncio.timeout(grace_s):
                await self._quiet.wait()
        except TimeoutError:
            logger.warning("requests cut off by shutdown", extra={"fields": {"requests": len(self._readers)}})
        self._fail_all(NotReady("the runner is shutting down"))
        try:
            async with asyncio.timeout(UNLOAD_BOUND_S):
                await self.unload()
        except TimeoutError:
            logger.warning("the step in flight did not end in time")
        self._completing.shutdown(wait=False)
        self._looking.shutdown(wait=False, cancel_futures=True)

    def _ready_engine(self) -> Engine:
        if self._closing:
            raise NotReady("the runner is shutting down")
        if self._engine is None:
            state = self.status
            reason = "the model is loading" if state.state is EngineState.LOADING else "no model is loaded"
            raise NotReady(f"{reason}: {state.error}" if state.error else reason)
        return self._engine

    async def _run_load(self, build: BuildEngine, load: _Load) -> None:
        try:
            engine = await self._thread.call(build, load.report)
        except LoadAbandoned:
            self._status = EngineStatus()
            raise
        except Exception as error:
            self._status = EngineStatus(state=EngineState.ERROR, error=str(error) or type(error).__name__)
            self._failed.set()
            raise
        finally:
            self._load = None
        if load.abandoned:
            await self._thread.call(engine.close)
            raise LoadAbandoned
        self._engine = engine
        self._status = engine.status()
        self._driver = asyncio.create_task(self._drive(engine), name="engine loop")
        self._driver.add_done_callback(self._driver_ended)

    async def _abandon_load(self) -> None:
        if self._load is not None and self._loading is not None:
            self._load.abandoned = True
            await asyncio.wait([self._loading])

    async def _drive(self, engine: Engine) -> None:
        loop = asyncio.get_running_loop()

        def emit(outputs: list[Output], status: EngineStatus) -> None:
            loop.call_soon_threadsafe(self._receive, engine, outputs, status)

        idle = True
        while True:
            if idle and not self._has_news():
                self._wake.clear()
                await self._wake.wait()
            added, self._added = self._added, {}
            cancelled, self._cancelled = self._cancelled, []
            self._completed = False
            idle = await self._thread.call(run, engine, added, cancelled, emit, self._has_news)

    def _has_news(self) -> bool:
        """Whether the executor's thread had better come back for what it does not know yet. Thread: any."""
        return bool(self._added or self._cancelled or self._completed)

    def _receive(self, engine: Engine, outputs: list[Output], status: EngineStatus) -> None:
        """Take over what a tick emitted, before the tick ends: whoever is in `_added` is not in `status` yet."""
        if engine is not self._engine:
            return
        self._status = status
        self._deliver(outputs)
        if not (status.running or status.waiting):
            self._fail_lost()

    def _fail_lost(self) -> None:
        """The engine has nothing to do: whoever waits all the same was lost on the way, and must hear of it."""
        for request_id, reader in list(self._readers.items()):
            if request_id not in self._added:
                reader.put(Failed(request_id, GenerationError("the request could not be started")))
                self._forget(request_id)

    def _driver_ended(self, driver: asyncio.Task[None]) -> None:
        """The driver ends only when it is cancelled; if a mistake of ours ends it, nobody may wait for ever."""
        if driver.cancelled() or (error := driver.exception()) is None:
            return
        logger.critical("the engine loop failed", exc_info=error)
        self._engine = None
        self._status = EngineStatus(state=EngineState.ERROR, error=str(error))
        self._failed.set()
        self._fail_all(GenerationError(f"the engine loop failed: {error}"))

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            reader = self._readers.get(output.id)
            if reader is None:
                continue
            reader.put(output)
            if reader.ended:
                self._forget(output.id)
            elif len(reader.pending) > MAX_PENDING:
                reader.put(Failed(output.id, GenerationError("the answer was not read fast enough")))
                self._cancel(output.id)

    def _cancel(self, request_id: RequestId) -> None:
        """Let go of a request; the next tick drops its row. One that has ended is left alone."""
        if request_id not in self._readers:
            return
        self._forget(request_id)
        if self._added.pop(request_id, None) is None:
            self._cancelled.append(request_id)
            self._wake.set()

    def _fail_all(self, error: Exception) -> None:
        for request_id, reader in list(self._readers.items()):
            reader.put(Failed(request_id, error))
            self._cancel(request_id)

    def _forget(self, request_id: RequestId) -> None:
        del self._readers[request_id]
        if not self._readers:
            self._quiet.set()


def _retrieved(task: asyncio.Task[None]) -> None:
    """Whoever waited for the load has its exception; a caller that was cancelled meanwhile does not want it."""
    if not task.cancelled():
        task.exception()


def run(
    engine: Engine,
    added: dict[RequestId, object],
    cancelled: list[RequestId],
    emit: Emit,
    has_news: Callable[[], bool],
) -> bool:
    """One step of the engine after the other, until it is idle or there is news for it. Thread: the executor's.

    Returns whether it is idle: there may be no news any more.
    """
    tick(engine, added, cancelled, emit)
    while not (idle := engine.idle) and not has_news():
        tick(engine, {}, [], emit)
    return idle


def tick(engine: Engine, added: dict[RequestId, object], cancelled: list[RequestId], emit: Emit) -> None:
    """One step of the engine. Thread: the executor's."""
    try:
        for request_id, prepared in added.items():
            engine.add(request_id, prepared)
        for request_id in cancelled:
            engine.cancel(request_id)
        emit(engine.step(), engine.status())
        engine.proceed()
    except Exception as error:
        # Whatever a step raises ends its rows and nothing else.
        logger.warning("a step failed", exc_info=error)
        emit(engine.abandon(error), engine.status())
