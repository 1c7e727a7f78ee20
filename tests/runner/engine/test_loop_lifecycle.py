import asyncio
import threading

import pytest

from runner.engine import loop as loop_module
from runner.engine.executor_thread import ExecutorThread
from runner.engine.loop import EngineLoop, LoadAbandoned
from runner.engine.types import EngineState, TextRequest
from runner.errors import AlreadyLoaded, NotReady
from tests.fakes import FakeExecutor, Gate, scripted
from tests.runner.engine.conftest import Serve
from tests.runner.engine.serving import ENDLESS, LONG, ask, make_engine, started

# --- load and unload


async def test_progress_is_seen_while_loading(thread: ExecutorThread):
    loop = EngineLoop(thread)
    seen, go_on = threading.Event(), threading.Event()

    def build(progress):
        progress(0.25)
        seen.set()
        assert go_on.wait(60)
        return make_engine(FakeExecutor("yes"))

    assert loop.status.state is EngineState.LAUNCHED
    with pytest.raises(NotReady, match="no model"):
        await ask(loop, TextRequest("x"))
    loading = asyncio.create_task(loop.load(build))
    await asyncio.to_thread(seen.wait, 60)
    assert (loop.status.state, loop.status.progress) == (EngineState.LOADING, 0.25)
    with pytest.raises(NotReady, match="loading"):
        await ask(loop, TextRequest("x"))
    with pytest.raises(AlreadyLoaded):
        await loop.load(build)
    go_on.set()
    await loading
    assert loop.status.state is EngineState.READY
    with pytest.raises(AlreadyLoaded):
        await loop.load(build)
    await loop.close(0)


async def test_a_load_that_fails_is_an_error_that_another_load_mends(thread: ExecutorThread):
    loop = EngineLoop(thread)

    def broken(progress):
        raise ValueError("tensor x is missing")

    with pytest.raises(ValueError, match="tensor x"):
        await loop.load(broken)
    assert (loop.status.state, loop.status.error) == (EngineState.ERROR, "tensor x is missing")
    with pytest.raises(NotReady, match="tensor x"):
        await ask(loop, TextRequest("x"))
    await loop.load(lambda progress: make_engine(FakeExecutor("yes")))
    assert (await ask(loop, TextRequest(scripted(0)))).text == "yes"
    await loop.close(0)


def endless_load(begun: threading.Event, reports: list[float]):
    def build(progress):
        for step in range(1_000_000):
            progress(step / 1_000_000)
            reports.append(step)
            begun.set()
        raise AssertionError("the load was not abandoned")

    return build


async def test_closing_abandons_a_load(thread: ExecutorThread):
    loop = EngineLoop(thread)
    begun = threading.Event()
    loading = asyncio.create_task(loop.load(endless_load(begun, [])))
    await asyncio.to_thread(begun.wait, 60)
    await loop.close(0)
    with pytest.raises(LoadAbandoned):
        await loading
    assert loop.status.state is EngineState.LAUNCHED
    with pytest.raises(NotReady):
        await loop.load(endless_load(begun, []))


async def test_cancelling_the_caller_of_load_abandons_it(thread: ExecutorThread):
    loop = EngineLoop(thread)
    begun = threading.Event()
    loading = asyncio.create_task(loop.load(endless_load(begun, [])))
    await asyncio.to_thread(begun.wait, 60)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    # The thread is free again only because the load gave up.
    await asyncio.wait_for(thread.call(int), 60)
    await asyncio.wait([loop._loading])
    assert loop.status.state is EngineState.LAUNCHED
    await loop.load(lambda progress: make_engine(FakeExecutor("yes")))
    await loop.close(0)


async def test_an_engine_whose_load_was_abandoned_too_late_is_freed(thread: ExecutorThread):
    loop = EngineLoop(thread)
    built, go_on = threading.Event(), threading.Event()
    engines = []

    def build(progress):
        engines.append(make_engine(FakeExecutor("yes")))
        built.set()
        assert go_on.wait(60)
        return engines[0]

    loading = asyncio.create_task(loop.load(build))
    await asyncio.to_thread(built.wait, 60)
    closing = asyncio.create_task(loop.close(0))
    await asyncio.sleep(0)
    go_on.set()
    await closing
    with pytest.raises(LoadAbandoned):
        await loading
    assert engines[0]._executor.closed


async def test_unloading_ends_all_requests_and_another_model_may_follow(serve: Serve, depth: int):
    gate = Gate(3)
    loop = await serve(FakeExecutor(ENDLESS, before_step=gate, depth=depth), parallel=1)
    tasks = [await started(loop, TextRequest(scripted(0))) for _ in range(3)]
    await gate.reached()
    unloading = asyncio.create_task(loop.unload())
    for task in tasks:
        assert isinstance((await task).error, NotReady)
    gate.open()
    await unloading
    assert loop.status.state is EngineState.LAUNCHED
    await loop.load(lambda progress: make_engine(FakeExecutor("second")))
    assert (await ask(loop, TextRequest(scripted(0)))).text == "second"


# --- close


@pytest.mark.parametrize(("prompt", "step"), [(LONG, 2), (scripted(0), 5)], ids=["prefill", "decode"])
async def test_closing_cuts_off_what_does_not_end_in_time(serve: Serve, prompt: str, step: int, depth: int):
    gate = Gate(step)
    executor = FakeExecutor(ENDLESS, before_step=gate, depth=depth)
    loop = await serve(executor, context_length=4096)
    task = await started(loop, TextRequest(prompt))
    await gate.reached()
    closing = asyncio.create_task(loop.close(0))
    assert isinstance((await task).error, NotReady)
    gate.open()
    await closing
    assert executor.steps <= step + 2
    assert loop.status.state is EngineState.LAUNCHED
    assert executor.living_slots() == 0


async def test_closing_lets_a_request_end_that_is_in_time_and_admits_no_other(serve: Serve):
    gate = Gate(2)
    loop = await serve(FakeExecutor("to the end", before_step=gate))
    task = await started(loop, TextRequest(scripted(0)))
    await gate.reached()
    closing = asyncio.create_task(loop.close(30))
    await asyncio.sleep(0)
    with pytest.raises(NotReady, match="shutting down"):
        await ask(loop, TextRequest(scripted(0)))
    gate.open()
    await closing
    assert (await task).text == "to the end"


async def test_closing_returns_even_if_a_step_never_ends(thread: ExecutorThread, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop_module, "UNLOAD_BOUND_S", 0.05)
    gate = Gate(1)
    loop = EngineLoop(thread)
    await loop.load(lambda progress: make_engine(FakeExecutor("yes", before_step=gate)))
    task = await started(loop, TextRequest(scripted(0)))
    await gate.reached()
    await loop.close(0)
    assert isinstance((await task).error, NotReady)
    gate.open()


async def test_closing_twice_is_closing_once(serve: Serve):
    loop = await serve(FakeExecutor("yes"))
    await asyncio.gather(loop.close(0), loop.close(0))
    await loop.close(0)
    assert loop.status.state is EngineState.LAUNCHED
