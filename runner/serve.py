"""A runner's working life: load, listen, serve, end.

Knows no route and no array. Invariants: an mlx or imagegen parent is refused the connection until the model is loaded;
whatever happens, the engine, the server and the executor's thread are ended in this order.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING

from aiohttp import web

from runner.app import SERVER_OPTIONS, make_app
from runner.config import DialectName, RunnerConfig
from runner.engine.executor_thread import ExecutorThread
from runner.engine.load import LoadOptions, ModelLoader
from runner.engine.loop import EngineLoop
from runner.errors import LoadError, RankLost, StartupError
from runner.stopping import StopRequest

if TYPE_CHECKING:
    from runner.ranks.first import Ranks

BACKLOG = 128
PROGRESS_LOG_S = 2.0
THREAD_END_S = 0.5
LOST_S = 1.0
"""What error lines get to be read once a rank is lost."""

logger = logging.getLogger(__name__)


async def serve(config: RunnerConfig, listener: socket.socket, parent: int, ranks: "Ranks | None" = None) -> None:
    """Run until somebody asks to stop.

    Args:
        config: what the process was told.
        listener: bound, not listening.
        parent: the parent's pid when the process started.
        ranks: who shares the model with this process.

    Raises:
        ModelError: the model cannot be used.
        RunnerError: it cannot be loaded, or the port was taken meanwhile.
        RankLost: one of the ranks is. The executor's thread may never end then.
    """
    stop = StopRequest()
    stop.listen_to_signals()
    thread = ExecutorThread()
    engine = EngineLoop(thread)
    loader = ModelLoader(config, ranks)
    lost = _when_lost(ranks)
    server = web.AppRunner(make_app(config, engine, loader), **SERVER_OPTIONS)
    watch = asyncio.create_task(stop.watch_parent(parent))
    try:
        await server.setup()
        if config.dialect is not DialectName.CLASSIC:
            await _unless_lost(_load_or_stop(config, engine, loader, stop), lost)
        if not stop.asked:
            await _listen(server, listener)
            await _unless_lost(_stop_or_failure(engine, stop), lost)
    finally:
        watch.cancel()
        is_lost = lost.done() and not stop.asked
        if is_lost:
            engine.lose(lost.result())
        await engine.close(LOST_S if is_lost else stop.grace_s)
        await server.cleanup()
        if ranks is not None:
            await asyncio.to_thread(ranks.stop)
        if is_lost:
            # The last word about it, whatever else went wrong: nobody waits for the executor's thread.
            raise RankLost(lost.result())
        await _end(thread, stop)
        listener.close()
        stop.release_signals()


def _when_lost(ranks: "Ranks | None") -> "asyncio.Future[str]":
    """Done when a rank is lost, and says why."""
    loop = asyncio.get_running_loop()
    lost: asyncio.Future[str] = loop.create_future()

    def tell(reason: str) -> None:
        if not lost.done():
            lost.set_result(reason)

    if ranks is not None:

        def tell_loop(reason: str) -> None:
            loop.call_soon_threadsafe(tell, reason)

        ranks.on_fault(tell_loop)
    return lost


async def _unless_lost(work: Coroutine[None, None, None], lost: "asyncio.Future[str]") -> None:
    """Do it, until a rank is lost. Raises RankLost, and what the work raises."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task, lost), return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        task.cancel()
        raise RankLost(lost.result())
    await task


async def _end(thread: ExecutorThread, stop: StopRequest) -> None:
    """End the executor's thread; in a long operation it does not see that it should: then the process ends."""
    try:
        async with asyncio.timeout(THREAD_END_S):
            await thread.close()
    except TimeoutError:
        if stop.asked:
            stop.leave()
        await thread.close()


async def _listen(server: web.AppRunner, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    try:
        await web.SockSite(server, listener, backlog=BACKLOG).start()
    except OSError as error:
        message = f"port {port} on {host} was taken while the model was loading; choose another --port"
        raise StartupError(message) from error
    logger.info("listening", extra={"fields": {"host": host, "port": port}})


async def _load_or_stop(config: RunnerConfig, engine: EngineLoop, loader: ModelLoader, stop: StopRequest) -> None:
    """Load the model named at launch; a stop meanwhile abandons it."""
    load = asyncio.create_task(_load(config, engine, loader))
    asked = asyncio.create_task(stop.wait())
    report = asyncio.create_task(_report_progress(engine))
    await asyncio.wait((load, asked), return_when=asyncio.FIRST_COMPLETED)
    report.cancel()
    asked.cancel()
    if not stop.asked:
        await load
        return
    await engine.close(0)
    await asyncio.wait([load], timeout=THREAD_END_S)
    if not load.done():
        stop.leave()
    # Its failure is our doing.
    load.exception()


async def _stop_or_failure(engine: EngineLoop, stop: StopRequest) -> None:
    """Wait until somebody asks to stop.

    Raises:
        LoadError: a classic parent's load failed, or the engine was lost. Ollama's runner dies of that, and its parent
            reads the reason from the last line; one that lives on is asked for its health until the parent gives up.
    """
    asked, failed = asyncio.create_task(stop.wait()), asyncio.create_task(engine.failure())
    await asyncio.wait((asked, failed), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    failed.cancel()
    if not stop.asked:
        raise LoadError(await failed)


async def _load(config: RunnerConfig, engine: EngineLoop, loader: ModelLoader) -> None:
    assert config.model is not None  # from_args refuses it for these dialects
    begin = time.perf_counter()
    options = LoadOptions(parallel=config.parallel, context_per_row=config.context, batch_tokens=None)
    build = await asyncio.to_thread(loader.builder, config.model, options)
    await engine.load(build)
    status = engine.status
    logger.info(
        "model loaded",
        extra={
            "fields": {
                "model": config.model,
                "seconds": round(time.perf_counter() - begin, 3),
                "context": status.context_length,
                "memory_mib": status.memory_bytes >> 20,
            }
        },
    )


async def _report_progress(engine: EngineLoop) -> None:
    while True:
        await asyncio.sleep(PROGRESS_LOG_S)
        logger.info("loading", extra={"fields": {"progress": round(engine.status.progress, 2)}})
