"""The Ollama-style parent, against real children and against scripts that misbehave."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import aclosing

import psutil
import pytest

from runner import parent as parent_module
from runner.config import DialectName
from runner.parent import Child, ChildError, Piece, _check, _piece, free_port, spawn
from tests.parity_vision.rows import HERE, PICTURES

ANY_DIALECT = pytest.mark.parametrize("dialect", list(DialectName), ids=lambda dialect: dialect.value)


def test_a_free_port_can_be_bound():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as bound:
        assert bound.getsockname()[1] == port


@pytest.mark.process
@ANY_DIALECT
async def test_a_completion_in_each_dialect_has_text_and_counts(spawn_runner, dialect):
    async with spawn_runner(dialect=dialect) as child:
        if dialect is DialectName.CLASSIC:
            await child.wait_answering()
            answer = await child.load(context=128)
            assert answer["Success"] is True
        await child.wait_ready()
        async with aclosing(child.complete("hello", {"temperature": 0, "num_predict": 4, "seed": 1})) as pieces:
            read = [piece async for piece in pieces]
    assert read[-1].done
    assert read[-1].length
    assert read[-1].eval_tokens == 4
    assert read[-1].prompt_tokens > 0
    assert read[-1].eval_ns > 0
    assert "".join(piece.content for piece in read)
    assert not any(piece.done for piece in read[:-1])


@pytest.mark.process
@ANY_DIALECT
async def test_a_completion_in_each_dialect_may_be_about_pictures(spawn_runner, dialect):
    pictures = [picture.read_bytes() for picture in PICTURES[:2]]
    options = {"temperature": 0, "num_predict": 6, "num_ctx": 512}
    async with spawn_runner(HERE / "gemma3", dialect=dialect) as child:
        if dialect is DialectName.CLASSIC:
            await child.wait_answering()
            await child.load(context=512)
        await child.wait_ready()
        counts = []
        for images in ([], pictures[:1], pictures):
            prompt = "what" + "".join(f"[img-{number}]" for number in range(len(images)))
            async with aclosing(child.complete(prompt, options, images)) as pieces:
                counts.append([piece async for piece in pieces][-1].prompt_tokens)
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.process
async def test_whatever_happens_inside_the_child_is_gone_afterwards(spawn_runner):
    children = []

    async def fail() -> None:
        async with spawn_runner() as child:
            children.append(child)
            await child.said("memory plan")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    child = children[0]
    assert child.process.returncode is not None
    assert not psutil.pid_exists(child.pid)


@pytest.mark.process
async def test_the_child_has_a_process_group_of_its_own(spawn_runner):
    async with spawn_runner() as child:
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)


@pytest.mark.process
async def test_a_refused_request_is_raised_with_the_childs_reason(spawn_runner):
    async with spawn_runner() as child:
        await child.wait_ready()
        async with aclosing(child.complete("")) as pieces:
            with pytest.raises(ChildError, match="empty"):
                await anext(pieces)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
async def test_the_peak_memory_of_the_child_is_at_least_its_present_one(spawn_runner):
    async with spawn_runner() as child:
        await child.wait_ready()
        present = psutil.Process(child.pid).memory_info().rss
        peak = child.peak_memory_bytes()
        assert peak is not None
        assert peak >= present * 0.9
    assert child.peak_memory_bytes() is None


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Children that are a Python script in place of the runner."""
    package = tmp_path / "runner"
    package.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parent_module, "PROBE_S", 0.01)

    def write(script: str):
        (package / "__main__.py").write_text(script)
        return spawn(None, dialect=DialectName.MLX)

    return write


async def test_a_child_that_dies_is_reported_with_its_code_and_last_line(scripted):
    async with scripted("import sys; print('first'); sys.exit('Error: the cause; the remedy')") as child:
        with pytest.raises(ChildError, match=r"^the runner ended with exit code 1: Error: the cause; the remedy$"):
            await child.wait_ready()
        assert sorted(child.lines) == ["Error: the cause; the remedy", "first"]


async def test_a_child_that_says_nothing_is_reported_as_such(scripted):
    async with scripted("") as child:
        with pytest.raises(ChildError, match="exit code 0: it wrote nothing"):
            await child.wait_ready()


async def test_a_child_that_never_answers_is_given_up(scripted):
    async with scripted("import signal; print('thinking', flush=True); signal.pause()") as child:
        await child.said("thinking")
        with pytest.raises(ChildError, match=r"not ready after 0\.05 s: thinking"):
            await child.wait_ready(timeout_s=0.05)


DEAF = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("deaf", flush=True)
signal.pause()
signal.pause()
"""


async def test_a_child_that_does_not_hear_sigint_is_killed(scripted, monkeypatch):
    monkeypatch.setattr(parent_module, "STOP_GRACE_S", 0.1)
    async with scripted(DEAF) as child:
        await child.said("deaf")
        assert await child.stop() == -signal.SIGKILL
        assert await child.stop() == -signal.SIGKILL


async def test_waiting_for_words_that_never_come_ends_with_the_child(scripted):
    async with scripted("print('something else')") as child:
        with pytest.raises(ChildError, match='did not say "listening"; its last line: something else'):
            await child.said("listening")


async def test_waiting_for_words_ends_in_time(scripted):
    async with scripted("import signal; signal.pause()") as child:
        with pytest.raises(ChildError, match="it wrote nothing"):
            await child.said("listening", timeout_s=0.05)


async def test_a_line_without_an_end_does_not_stop_the_reading(scripted):
    async with scripted("print('x' * 3_000_000); print('after')") as child:
        assert await child.said("after") == "after"


@pytest.mark.parametrize(
    ("line", "piece"),
    [
        ({"content": "a", "done": False}, Piece("a", done=False)),
        ({"Content": "a", "Done": False, "DoneReason": 0}, Piece("a", done=False)),
        ({"done": True, "done_reason": 1}, Piece("", done=True, length=True)),
        ({"Done": True, "DoneReason": 0, "EvalCount": 3}, Piece("", done=True, eval_tokens=3)),
        (
            {"done": True, "stop_reason": "length", "prompt_eval_count": 2},
            Piece("", True, length=True, prompt_tokens=2),
        ),
    ],
)
def test_a_line_of_any_dialect_is_read(line, piece):
    assert _piece(line) == piece


@pytest.mark.parametrize(
    "line",
    [
        {"Error": {"StatusCode": 500, "Status": "", "error": "the reason"}},
        {"error": "the reason"},
        {"content": "error: the reason", "done": True},
    ],
)
def test_an_error_inside_a_stream_is_raised(line):
    with pytest.raises(ChildError, match=r"^the reason$"):
        _check(line)


async def answering(*lines: bytes):
    """A server that answers one request with these lines and hangs up; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"".join(lines))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


async def test_a_stream_that_ends_without_a_last_line_is_an_error(scripted):
    server, port = await answering(b'{"Content":"half","Done":false}\n')
    async with server, scripted("import signal; signal.pause()") as child:
        child.port = port
        assert isinstance(child, Child)
        async with aclosing(child.complete("x")) as pieces:
            assert (await anext(pieces)).content == "half"
            with pytest.raises(ChildError, match="without a last line"):
                await anext(pieces)
