import asyncio
import sys
import threading

import mlx.core as mx
import pytest

from runner.engine.executor_thread import ExecutorThread


async def test_all_calls_run_in_one_thread_that_is_not_the_callers(thread: ExecutorThread):
    names = {await thread.call(lambda: threading.current_thread().name) for _ in range(3)}
    assert len(names) == 1
    assert names.pop().startswith("executor")


async def test_an_exception_is_raised_to_the_caller(thread: ExecutorThread):
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 / 0)
    assert await thread.call(int, "7") == 7


async def test_a_cancelled_caller_takes_nothing_back(thread: ExecutorThread):
    gate, ran = threading.Event(), []
    blocked = asyncio.create_task(thread.call(gate.wait, 60))
    queued = asyncio.create_task(thread.call(ran.append, "queued"))
    await asyncio.sleep(0)
    for task in (blocked, queued):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.set()
    await thread.call(ran.append, "after")
    assert ran == ["queued", "after"]


async def test_a_lazy_array_can_be_evaluated_by_a_later_call(thread: ExecutorThread):
    array = await thread.call(lambda: mx.arange(4) + 1)
    assert await thread.call(array.tolist) == [1, 2, 3, 4]


async def test_closing_twice_is_closing_once():
    thread = ExecutorThread()
    await thread.call(lambda: mx.eval(mx.ones(3) + 1))
    await thread.close()
    await thread.close()
    with pytest.raises(RuntimeError, match="closed"):
        await thread.call(int)


async def test_closing_gives_up_the_streams_of_mlx_where_it_was_used(monkeypatch: pytest.MonkeyPatch):
    cleared = []
    monkeypatch.setattr(mx, "clear_streams", lambda: cleared.append(threading.current_thread().name))
    await ExecutorThread().close()
    assert cleared == ["executor_0"]
    monkeypatch.delitem(sys.modules, "mlx.core")
    await ExecutorThread().close()
    assert len(cleared) == 1


async def test_closing_waits_for_what_was_handed_in_before():
    thread, ran = ExecutorThread(), []
    work = [asyncio.create_task(thread.call(ran.append, n)) for n in range(3)]
    await asyncio.sleep(0)
    await thread.close()
    await asyncio.gather(*work)
    assert ran == [0, 1, 2]
