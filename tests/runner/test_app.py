"""Bad input and bad peers: each gets a clear answer or a closed connection, and the next request works."""

import asyncio
import io
import json
import socket

import aiohttp
import pytest

from runner.app import MAX_BODY_BYTES
from runner.config import DialectName
from runner.dialects.base import Timeouts
from runner.engine.types import Failed
from runner.errors import Busy, NotReady
from tests.fakes_wire import DONE, ScriptedLoop, chunk, serve

ALL = list(DialectName)
COMPLETION = {
    DialectName.IMAGEGEN: "/completion",
    DialectName.MLX: "/v1/completions",
    DialectName.CLASSIC: "/completion",
}

every_dialect = pytest.mark.parametrize("dialect", ALL, ids=lambda dialect: dialect.value)


async def assert_serves(served, dialect):
    """The next request works."""
    status, body = await served.post(COMPLETION[dialect], json={"prompt": "next"})
    assert status == 200
    assert json.loads(body.splitlines()[-1])


@every_dialect
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b'"x"',
        b"{",
        b"\xff\xfe",
        b"\x00" * 100,
        b'{"prompt":1}',
        b'{"prompt":["a"]}',
        b'{"prompt":{}}',
        b'{"prompt":"p","options":[]}',
        b'{"prompt":"p","options":{"temperature":NaN}}',
        b'{"prompt":"p","options":{"temperature":-Infinity}}',
        b'{"prompt":"p","options":{"temperature":1e999}}',
        b'{"prompt":"p","options":{"temperature":"hot"}}',
        b'{"prompt":"p","options":{"num_predict":1.5}}',
        b'{"prompt":"p","options":{"num_predict":99999999999999999999}}',
        b'{"prompt":"p","options":{"num_ctx":-1}}',
        b'{"prompt":"p","options":{"stop":"x"}}',
        b'{"prompt":"p","options":{"stop":[1]}}',
        b'{"prompt":"p","more":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"prompt":"p","more":' + b"[" * 200_000,
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_a_wrong_body_is_400_in_plain_text(dialect, body):
    async with serve(dialect) as served:
        async with served.client.post(COMPLETION[dialect], data=body) as response:
            assert response.status == 400
            assert response.content_type == "text/plain"
            reason = await response.text()
            assert reason.endswith("\n")
            assert 5 < len(reason) < 500
            assert "Traceback" not in reason
        assert served.loop.requests == []
        await assert_serves(served, dialect)


@every_dialect
async def test_odd_but_legal_bodies_are_served(dialect):
    stops = [f"stop {number}" for number in range(20_000)]
    async with serve(dialect) as served:
        bodies = [
            b'{"prompt":"p","unknown":{"deep":[1,2]},"another":null} trailing',
            b'{"PROMPT":"a\\u0000b\\ud800c"}',
            json.dumps({"prompt": "p", "options": {"stop": stops, "unknown": 1}}).encode(),
            b'{"prompt":null,"options":null}',
        ]
        for body in bodies:
            assert (await served.post(COMPLETION[dialect], data=body))[0] == 200
        assert [request.prompt for request in served.loop.requests] == ["p", "a\0b\ufffdc", "p", ""]
        assert served.loop.requests[2].stop == tuple(stops)


@every_dialect
async def test_a_body_of_100_mb_is_413_and_nothing_is_kept(dialect):
    async with serve(dialect) as served:
        status, body = await served.post(COMPLETION[dialect], data=io.BytesIO(b" " * 100_000_000))
        assert status == 413
        assert str(MAX_BODY_BYTES).encode() in body
        await assert_serves(served, dialect)


async def test_a_chunked_body_that_grows_too_large_is_413():
    async def endless():
        for _ in range(2 + MAX_BODY_BYTES // 1_000_000):
            yield b" " * 1_000_000

    async with serve(DialectName.MLX) as served:
        assert (await served.post("/v1/completions", data=endless()))[0] == 413
        await assert_serves(served, DialectName.MLX)


async def test_a_body_just_below_the_limit_is_read():
    async with serve(DialectName.MLX) as served:
        body = json.dumps({"Prompt": "x" * (MAX_BODY_BYTES - 100)}).encode()
        assert (await served.post("/v1/completions", data=io.BytesIO(body)))[0] == 200


@every_dialect
async def test_a_wrong_method_is_405_and_says_which_is_right(dialect):
    async with serve(dialect) as served, served.client.get(COMPLETION[dialect]) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert response.content_type == "text/plain"


@every_dialect
async def test_an_unknown_path_is_404(dialect):
    async with serve(dialect) as served:
        assert (await served.get("/nothing"))[0] == 404


@pytest.mark.parametrize(("refusal", "status"), [(Busy("the queue is full"), 503), (NotReady("shutting down"), 503)])
async def test_a_refusal_of_the_loop_is_its_status_and_reason(refusal, status):
    loop = ScriptedLoop()
    loop.refusal = refusal
    async with serve(DialectName.MLX, loop) as served:
        assert await served.post("/v1/completions", json={"Prompt": "p"}) == (status, f"{refusal}\n".encode())


async def test_a_bug_is_500_and_logged_and_the_server_goes_on(caplog):
    loop = ScriptedLoop()
    loop.refusal = ZeroDivisionError("a bug")
    async with serve(DialectName.MLX, loop) as served:
        status, body = await served.post("/v1/completions", json={"Prompt": "p"})
        assert status == 500
        assert b"Traceback" not in body
        assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)
        loop.refusal = None
        await assert_serves(served, DialectName.MLX)


async def raw(port, data):
    """Send bytes, read to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer


@every_dialect
async def test_a_body_announced_too_large_is_413_before_any_of_it_is_read(dialect):
    head = f"POST {COMPLETION[dialect]} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n".encode()
    async with serve(dialect, lingering_time=0.1) as served:
        assert (await raw(served.port, head)).startswith(b"HTTP/1.1 413 ")


@every_dialect
async def test_half_a_body_then_silence_is_408_and_a_close(dialect):
    head = f"POST {COMPLETION[dialect]} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n".encode()
    async with serve(dialect, timeouts=Timeouts(read_s=0.1), lingering_time=0.1) as served:
        answer = await raw(served.port, head + b'{"prompt":')
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        await assert_serves(served, dialect)


async def test_half_a_header_then_silence_is_a_close():
    async with serve(DialectName.MLX, keepalive_timeout=0.2) as served:
        assert await raw(served.port, b"POST /v1/completions HTTP/1.1\r\nHos") == b""
        await assert_serves(served, DialectName.MLX)


async def test_what_is_no_http_is_400():
    async with serve(DialectName.MLX) as served:
        assert (await raw(served.port, b"\x16\x03\x01 what\r\n\r\n")).startswith(b"HTTP/1.0 400 ")


@every_dialect
async def test_a_client_that_goes_away_cancels_its_request(dialect):
    started = asyncio.Event()

    async def script(request):
        yield chunk("a")
        started.set()
        await asyncio.Event().wait()

    loop = ScriptedLoop(script)
    async with serve(dialect, loop) as served:
        async with served.client.post(COMPLETION[dialect], json={"prompt": "p"}) as response:
            await response.content.readline()
            await started.wait()
            response.close()
        async with asyncio.timeout(60):
            assert await loop.cancelled.wait()


async def test_the_headers_come_before_the_first_output():
    may_speak = asyncio.Event()

    async def script(request):
        await may_speak.wait()
        yield DONE

    async with (
        serve(DialectName.MLX, ScriptedLoop(script)) as served,
        served.client.post("/v1/completions", json={"Prompt": "p"}) as response,
    ):
        assert response.status == 200
        may_speak.set()
        assert await response.read()


async def test_every_piece_is_sent_when_it_is_made():
    may_go_on = asyncio.Event()

    async def script(request):
        yield chunk("a")
        await may_go_on.wait()
        yield DONE

    async with (
        serve(DialectName.MLX, ScriptedLoop(script)) as served,
        served.client.post("/v1/completions", json={"Prompt": "p"}) as response,
    ):
        assert json.loads(await response.content.readline())["Content"] == "a"
        may_go_on.set()
        assert json.loads(await response.content.readline())["Done"] is True


async def test_a_reader_that_never_reads_stops_its_request_and_no_other():
    spoken = 0

    async def script(request):
        nonlocal spoken
        if request.prompt == "next":
            yield DONE
            return
        while True:
            spoken += 1
            yield chunk("x" * 50_000)

    body = b'{"Prompt":"endless"}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with serve(DialectName.MLX, ScriptedLoop(script), timeouts=Timeouts(write_s=0.3)) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.sendall(head + body)
            await assert_serves(served, DialectName.MLX)
            async with asyncio.timeout(60):
                assert await served.loop.left.get() == "next"
                assert await served.loop.left.get() == "endless"
        # What was made is what the sockets' buffers took: megabytes, not what half a second can make.
        assert spoken < 2000
        await assert_serves(served, DialectName.MLX)


async def test_an_http_1_0_client_gets_the_stream_without_chunks():
    body = b'{"Prompt":"p"}'
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with serve(DialectName.MLX) as served:
        answer = await raw(served.port, head + body)
        lines = answer.partition(b"\r\n\r\n")[2].splitlines()
        assert [json.loads(line)["Done"] for line in lines] == [False, False, True]


async def test_an_error_without_words_is_told_by_its_name():
    async def script(request):
        yield Failed(1, ZeroDivisionError())

    async with serve(DialectName.MLX, ScriptedLoop(script)) as served:
        _, body = await served.post("/v1/completions", json={"Prompt": "p"})
        assert json.loads(body)["Error"]["error"] == "ZeroDivisionError"


async def test_many_requests_on_one_connection():
    async with serve(DialectName.MLX) as served:
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}", connector=connector) as client:
            for _ in range(20):
                async with client.post("/v1/completions", json={"Prompt": "p"}) as response:
                    assert len((await response.read()).splitlines()) == 3
