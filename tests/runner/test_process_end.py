"""How the real process ends: by a signal in every phase, and when its parent is gone."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from contextlib import aclosing, suppress

import pytest

from runner.config import DialectName
from runner.parent import ChildError, free_port
from tests.runner.child import ANY_DIALECT, ENDLESS, LONG_PROMPT, assert_quiet_end, busy, consume, ready, stopped

pytestmark = pytest.mark.process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANY_SIGNAL = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
CUT_OFF = "requests cut off by shutdown"
"""Told when running requests have had all of their grace."""


@ANY_DIALECT
async def test_a_signal_while_idle_ends_it(spawn_runner, dialect):
    async with spawn_runner(dialect=dialect) as child:
        await ready(child)
        code, seconds = await stopped(child, signal.SIGINT)
        assert_quiet_end(child, code, seconds)
        assert not any(CUT_OFF in line for line in child.lines), "there was nobody to wait for"


@pytest.mark.parametrize(
    ("model", "line", "number"),
    [
        ("tiny_pipeline", "BLAS prepared", SIGNALS[0]),
        ("tiny_llama", "memory plan", SIGNALS[0]),
        ("tiny_llama", "memory plan", SIGNALS[1]),
        ("tiny_llama", "prefix cache", SIGNALS[0]),
    ],
)
async def test_a_signal_at_any_moment_of_the_start_ends_it(spawn_runner, request, model, line, number):
    async with spawn_runner(request.getfixturevalue(model)) as child:
        await child.said(line)
        assert_quiet_end(child, *await stopped(child, number))


@ANY_SIGNAL
async def test_a_signal_in_a_long_load_ends_it(spawn_runner, default_model, number):
    async with spawn_runner(default_model) as child:
        await child.said("memory plan")
        assert_quiet_end(child, *await stopped(child, number))
        assert not any("model loaded" in line for line in child.lines)


@pytest.mark.parametrize(("dialect", "number"), list(zip(DialectName, [*SIGNALS, SIGNALS[0]], strict=True)), ids=str)
async def test_a_signal_in_prefill_ends_it(spawn_runner, roomy_llama, dialect, number):
    async with spawn_runner(roomy_llama, dialect=dialect, flags=["--context=200000"]) as child:
        if dialect is DialectName.CLASSIC:
            await child.wait_answering()
            await child.load(context=200000)
        await child.wait_ready()
        reading = asyncio.create_task(consume(child, LONG_PROMPT, ENDLESS))
        await busy(child)
        assert_quiet_end(child, *await stopped(child, number))
        await reading


async def test_a_signal_in_decode_ends_it_and_the_stream(spawn_runner, roomy_llama):
    async with spawn_runner(roomy_llama) as child:
        await child.wait_ready()
        async with aclosing(child.complete("hello", ENDLESS)) as pieces:
            await anext(pieces)
            ending = asyncio.create_task(stopped(child, signal.SIGTERM))
            with pytest.raises(ChildError, match="shutting down"):
                async for _ in pieces:
                    pass
        assert_quiet_end(child, *await ending)


async def test_a_second_signal_ends_it_at_once(spawn_runner, roomy_llama):
    async with spawn_runner(roomy_llama) as child:
        await child.wait_ready()
        reading = asyncio.create_task(consume(child, "hello", ENDLESS))
        await busy(child)
        child.process.send_signal(signal.SIGINT)
        await child.said("msg=stopping")
        code, _ = await stopped(child, signal.SIGINT)
        assert code == 0
        assert not any(CUT_OFF in line for line in child.lines), "the grace was waited for"
        await reading


ORPHAN_PARENT = """
import subprocess, sys
command = [sys.executable, "-m", "runner", *sys.argv[2:]]
quiet = subprocess.DEVNULL
child = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE)
while sys.argv[1].encode() not in (line := child.stderr.readline()):
    if not line:
        sys.exit("it died")
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def adopt_orphans():
    """Become the parent of orphaned grandchildren, so that their end can be awaited."""
    set_child_subreaper = 36
    libc = ctypes.CDLL(None)
    libc.prctl(set_child_subreaper, 1)
    yield
    libc.prctl(set_child_subreaper, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl, to become the parent of orphans")
@pytest.mark.parametrize("phase", ["memory plan", "listening"])
async def test_a_killed_parent_takes_the_runner_with_it(tiny_llama, adopt_orphans, phase):
    flags = ["--mlx-engine", "--model", str(tiny_llama), "--port", str(free_port())]
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ORPHAN_PARENT, phase, *flags), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    end = asyncio.create_task(asyncio.to_thread(os.waitpid, pid, 0))
    done, _ = await asyncio.wait([end], timeout=60)
    if not done:
        os.kill(pid, signal.SIGKILL)
    _, status = await end
    assert os.waitstatus_to_exitcode(status) == 0


async def test_a_parent_that_died_before_it_could_be_noticed_is_known_by_its_pipe(tiny_llama):
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", "--mlx-engine", "--model", str(tiny_llama)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=write_end,
    )
    os.close(read_end)
    os.close(write_end)
    try:
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_parent_that_closes_stdin_is_taken_for_dead(tiny_llama):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", "--mlx-engine", "--model", str(tiny_llama)),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    assert process.stdin is not None
    while b"msg=listening" not in (line := await process.stderr.readline()):
        assert line
    process.stdin.write(b"what is said there is ignored\n")
    await process.stdin.drain()
    process.stdin.close()
    async with asyncio.timeout(60):
        _, rest = await process.communicate()
    assert process.returncode == 0
    assert b"closed stdin" in rest


async def test_a_runner_without_any_stdin_serves_all_the_same(tiny_llama):
    port = free_port()
    command = f'exec "$0" -m runner --mlx-engine --model "$1" --port {port} <&-'
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", command, sys.executable, str(tiny_llama)), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    while b"msg=listening" not in (line := await process.stderr.readline()):
        assert line
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()
    process.send_signal(signal.SIGTERM)
    _, rest = await process.communicate()
    assert process.returncode == 0
    assert b"ERROR" not in rest
