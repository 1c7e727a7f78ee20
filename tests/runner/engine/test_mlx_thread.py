import asyncio
import threading

import mlx.core as mx
import pytest

from runner.engine.mlx_thread import MLXThread


async def test_all_calls_run_in_one_thread_that_is_not_the_callers(thread: MLXThread):
    names = {await thread.call(lambda: threading.current_thread().name) for _ in range(3)}
    assert len(names) == 1
    assert names.pop().startswith("mlx")


async def test_an_exception_is_raised_to_the_caller(thread: MLXThread):
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 / 0)
    assert await thread.call(int, "7") == 7


async def test_a_cancelled_caller_takes_nothing_back(thread: MLXThread):
    gate, ran = threading.Event(), []
    blocked = asyncio.create_task(thread.call(gate.wait, 10))
    queued = asyncio.create_task(thread.call(ran.append, "queued"))
    await asyncio.sleep(0)
    for task in (blocked, queued):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.set()
    await thread.call(ran.append, "after")
    assert ran == ["queued", "after"]


async def test_a_lazy_array_can_be_evaluated_by_a_later_call(thread: MLXThread):
    array = await thread.call(lambda: mx.arange(4) + 1)
    assert await thread.call(array.tolist) == [1, 2, 3, 4]


async def test_closing_twice_is_closing_once():
    thread = MLXThread()
    await thread.call(lambda: mx.eval(mx.ones(3) + 1))
    await thread.close()
    await thread.close()
    with pytest.raises(RuntimeError, match="closed"):
        await thread.call(int)


async def test_closing_waits_for_what_was_handed_in_before():
    thread, ran = MLXThread(), []
    work = [asyncio.create_task(thread.call(ran.append, n)) for n in range(3)]
    await asyncio.sleep(0)
    await thread.close()
    await asyncio.gather(*work)
    assert ran == [0, 1, 2]
