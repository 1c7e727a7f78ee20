"""A runner as a child process: how it is waited for, kept busy, and stopped."""

import time
from contextlib import suppress

import psutil
import pytest

from runner.config import DialectName
from runner.parent import ChildError

ANY_DIALECT = pytest.mark.parametrize("dialect", list(DialectName), ids=lambda dialect: dialect.value)
ENDLESS = {"temperature": 0, "num_predict": -1, "num_ctx": 10_000_000, "seed": 1}
LONG_PROMPT = "the quick brown fox " * 4000
GONE_S = 15.0
"""The process leaves after 3.7 s; a machine that has much else to do may be late to notice."""


async def ready(child):
    """Wait until it is, loading in the classic dialect."""
    if child.dialect is DialectName.CLASSIC:
        await child.wait_answering()
        await child.load(context=4096)
    return await child.wait_ready()


async def consume(child, prompt, options):
    """Read a completion to its end, whatever that is."""
    with suppress(ChildError):
        async for _ in child.complete(prompt, options):
            pass


async def busy(child):
    """Wait until the child computes: it has used processor time that no idling explains."""
    process = psutil.Process(child.pid)
    begin = sum(process.cpu_times()[:2])
    while sum(process.cpu_times()[:2]) < begin + 0.3:
        assert await child.health() is not None


async def stopped(child, number):
    """Send the signal; the exit code and the seconds it took."""
    begin = time.perf_counter()
    child.process.send_signal(number)
    code = await child.wait()
    return code, time.perf_counter() - begin


def assert_quiet_end(child, code, seconds):
    assert code == 0
    assert seconds < GONE_S
    assert [line for line in child.lines if "Traceback" in line or "Error" in line] == []
