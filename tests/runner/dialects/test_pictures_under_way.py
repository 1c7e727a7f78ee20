"""While a picture is made: health, the queue, who goes away, what fails."""

import asyncio
import json
import time

import pytest

from runner.dialects.pictures import PictureAnswer
from tests.fakes_image import FakePipeline, UnitGate
from tests.runner.dialects.serving_pictures import (
    CLASSIC,
    IMAGEGEN,
    ask,
    file_of,
    served,
    speaks_pictures,
)


async def test_health_answers_at_once_and_shows_the_step():
    gate = UnitGate(3)
    async with served(IMAGEGEN, FakePipeline(before_unit=gate)) as server:
        assert await server.get("/health") == (200, b'{"status":"ok"}\n')
        running = asyncio.create_task(ask(server))
        await gate.reached()
        waiting = asyncio.create_task(ask(server))
        while len(server.loop._added) < 1:
            status, body = await server.get("/health")
            assert (status, json.loads(body)) == (200, {"status": "ok", "step": 2, "total": 4})
        slowest = 0.0
        for _ in range(50):
            begun = time.perf_counter()
            await server.get("/health")
            slowest = max(slowest, time.perf_counter() - begun)
        # The step takes as long as the gate is shut: an answer that waited for it would never come.
        assert slowest < UnitGate.PATIENCE_S
        gate.open()
        await asyncio.gather(running, waiting)
        assert await server.get("/health") == (200, b'{"status":"ok"}\n')


async def test_the_classic_health_shows_the_step_too():
    gate = UnitGate(3)
    async with served(CLASSIC, FakePipeline(before_unit=gate)) as server:
        running = asyncio.create_task(ask(server))
        await gate.reached()
        health = json.loads((await server.get("/health"))[1])
        assert health == {"status": 0, "progress": 1.0, "step": 2, "total_steps": 4}
        gate.open()
        await running


@speaks_pictures
async def test_a_queued_request_is_told_its_place(dialect):
    gate = UnitGate(2)
    async with served(dialect, FakePipeline(before_unit=gate)) as server:
        first = asyncio.create_task(ask(server))
        await gate.reached()
        others = [asyncio.create_task(ask(server)) for _ in range(2)]
        while len(server.loop._added) < 2:
            await server.get("/health")
        gate.open()
        answers = [lines for _, lines in await asyncio.gather(first, *others)]
        places = sorted([line["queue"] for line in lines if "queue" in line] for lines in answers)
        assert places == [[], [1], [2, 1]]
        assert all(lines[-1]["done"] for lines in answers)
        assert answers[1][0]["done"] is False


@speaks_pictures
@pytest.mark.parametrize("unit", [0, 2, 5], ids=["encode", "denoise", "decode"])
async def test_a_connection_that_closes_ends_its_picture_and_the_next_is_as_alone(dialect, unit):
    async with served(dialect, FakePipeline()) as server:
        alone = await file_of(server, seed=9)
    gate = UnitGate(unit)
    pipeline = FakePipeline(before_unit=gate)
    async with served(dialect, pipeline) as server:
        leaving = asyncio.create_task(ask(server, steps=4))
        await gate.reached()
        following = asyncio.create_task(file_of(server, seed=9))
        while not server.loop._added:
            await server.get("/health")
        leaving.cancel()
        await asyncio.wait([leaving])
        while not server.loop._cancelled:
            await server.get("/health")
        gate.open()
        assert await following == alone
        # The unit in flight was the last of the first picture; the second has seven.
        assert pipeline.units == unit + 1 + 7
        assert pipeline.living_latents() == 0


@speaks_pictures
async def test_a_queued_request_whose_connection_closes_never_runs(dialect):
    gate = UnitGate(2)
    pipeline = FakePipeline(before_unit=gate)
    async with served(dialect, pipeline) as server:
        first = asyncio.create_task(ask(server))
        await gate.reached()
        leaving = asyncio.create_task(ask(server, prompt="leaves"))
        while len(server.loop._readers) < 2:
            await server.get("/health")
        leaving.cancel()
        await asyncio.wait([leaving])
        while len(server.loop._readers) > 1:
            await server.get("/health")
        gate.open()
        assert (await first)[0] == 200
        assert (await ask(server))[0] == 200
        assert [picture.prompt for picture in pipeline.begun] == ["a hen", "a hen"]


@speaks_pictures
@pytest.mark.parametrize("unit", [0, 1], ids=["encode", "first step"])
async def test_what_fails_before_anything_was_said_is_a_status(dialect, unit):
    def fail(number, phase, picture):
        if number == unit:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    async with served(dialect, FakePipeline(before_unit=fail)) as server:
        status, reason = await ask(server)
        assert status == 500
        assert reason.startswith("insufficient memory")
        assert (await ask(server))[0] == 200


@speaks_pictures
async def test_what_fails_later_is_the_dialects_last_line(dialect):
    def fail(number, phase, picture):
        if number == 3:
            raise ValueError("the step broke")

    async with served(dialect, FakePipeline(before_unit=fail)) as server:
        status, lines = await ask(server)
        assert status == 200
        assert [line["step"] for line in lines[:-1]] == [1, 2]
        if dialect is IMAGEGEN:
            assert lines[-1] == {"content": "error: ValueError: the step broke", "done": True}
        else:
            assert lines[-1] == {"error": "ValueError: the step broke", "done": "error"}
        assert (await ask(server))[0] == 200


async def test_encoding_a_picture_holds_up_neither_the_loop_nor_the_next_picture(monkeypatch):
    entered, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    real = PictureAnswer._picture
    held = []

    def slow(self, picture, *, last):
        if not held:
            held.append(picture)
            loop.call_soon_threadsafe(entered.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(30)
        return real(self, picture, last=last)

    monkeypatch.setattr(PictureAnswer, "_picture", slow)
    async with served(IMAGEGEN, FakePipeline()) as server:
        first = asyncio.create_task(ask(server))
        await entered.wait()
        assert (await server.get("/health"))[0] == 200
        assert (await ask(server))[0] == 200
        assert not first.done()
        release.set()
        assert (await first)[0] == 200
