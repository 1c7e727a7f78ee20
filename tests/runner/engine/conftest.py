"""Engines on the fake executor, with and without the loop around them."""

import inspect
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from models.executors.base import Executor
from runner.engine.disk_cache import DiskCache
from runner.engine.executor_thread import THREAD_NAME, ExecutorThread
from runner.engine.loop import EngineLoop
from tests.fakes import FakeExecutor
from tests.runner.engine.disk import LIMIT, MODEL, Open
from tests.runner.engine.serving import make_engine

Serve = Callable[..., Awaitable[EngineLoop]]


@pytest.fixture(params=[0, 1], ids=["depth 0", "depth 1"])
def depth(request: pytest.FixtureRequest) -> int:
    """Of executors that compute when they are called, and of those that begin to."""
    return request.param


@pytest.fixture
def drafts_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes as long as any other, so that drafting always pays."""
    ticks = iter(range(0, 10**18, 1000))
    now = [0]

    def clock() -> int:
        now[0] = next(ticks)
        return now[0]

    monkeypatch.setattr(time, "perf_counter_ns", clock)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Disk caches in one folder, closed in the end."""
    caches = []

    def start(limit_bytes: int = LIMIT, model: str = MODEL) -> DiskCache:
        caches.append(DiskCache(tmp_path, model, limit_bytes=limit_bytes))
        return caches[-1]

    yield start
    for cache in caches:
        cache.close()


@pytest.fixture
async def thread() -> AsyncIterator[ExecutorThread]:
    thread = ExecutorThread()
    yield thread
    await thread.close()


@pytest.fixture
async def serve(thread: ExecutorThread, only_in_executors_thread: None) -> AsyncIterator[Serve]:
    """A running loop on a fake executor: `loop = await serve(FakeExecutor(...), parallel=2)`."""
    loops = []

    async def start(executor: FakeExecutor, **options) -> EngineLoop:
        loops.append(loop := EngineLoop(thread))
        await loop.load(lambda progress: make_engine(executor, **options))
        return loop

    yield start
    for loop in loops:
        await loop.close(0)


def confined() -> list[str]:
    """The executor's methods that belong to its thread, as their contract says."""
    methods = [each for name, each in vars(Executor).items() if inspect.isfunction(each) and not name.startswith("_")]
    return [each.__name__ for each in methods if "Thread: any" not in (each.__doc__ or "")]


@pytest.fixture
def only_in_executors_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The executor is watched: a call from any other thread than its own fails the test."""
    strangers = []

    def watched(function):
        def call(*args, **kwargs):
            if not threading.current_thread().name.startswith(THREAD_NAME):
                strangers.append(f"{function.__name__} in {threading.current_thread().name}")
            return function(*args, **kwargs)

        return call

    watching = confined()
    assert {"forward", "sample", "segment", "restore", "release", "close"} <= set(watching)
    for name in watching:
        monkeypatch.setattr(FakeExecutor, name, watched(getattr(FakeExecutor, name)))
    yield
    assert strangers == []
