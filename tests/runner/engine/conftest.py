"""Engines on the fake model, with and without the loop around them."""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import mlx.core as mx
import pytest

from models import host
from runner.engine import sampler
from runner.engine.loop import EngineLoop
from runner.engine.mlx_thread import MLXThread
from tests.fakes import FakeModel
from tests.runner.engine.serving import make_engine

Serve = Callable[..., Awaitable[EngineLoop]]


@pytest.fixture
async def thread() -> AsyncIterator[MLXThread]:
    thread = MLXThread()
    yield thread
    await thread.close()


@pytest.fixture
async def serve(thread: MLXThread, only_in_mlx_thread: None) -> AsyncIterator[Serve]:
    """A running loop on a fake model: `loop = await serve(FakeModel(...), parallel=2)`."""
    loops = []

    async def start(model: FakeModel, **options) -> EngineLoop:
        loops.append(loop := EngineLoop(thread))
        await loop.load(lambda progress: make_engine(model, **options))
        return loop

    yield start
    for loop in loops:
        await loop.close(0)


@pytest.fixture
def only_in_mlx_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluating and reading are watched: a call from any other thread fails the test."""
    strangers = []

    def watched(function):
        def call(*args, **kwargs):
            if not threading.current_thread().name.startswith("mlx"):
                strangers.append(f"{function.__name__} in {threading.current_thread().name}")
            return function(*args, **kwargs)

        return call

    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, watched(getattr(mx, name)))
    for name in ("to_ints", "to_floats"):
        monkeypatch.setattr(sampler, name, watched(getattr(sampler, name)))
    monkeypatch.setattr(host, "wait", watched(host.wait))
    yield
    assert strangers == []
