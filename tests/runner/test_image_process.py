"""The real process with real pipelines in miniature: pictures, cancellation, the queue, hostile input, signals."""

import asyncio
import base64
import io
import json
import signal
import time
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.config import DialectName
from runner.parent import ChildError
from tests.runner.child import assert_quiet_end, busy, ready, stopped
from tests.runner.engine.test_pictures import HOSTILE, png

pytestmark = pytest.mark.process

IMAGEGEN, CLASSIC = DialectName.IMAGEGEN, DialectName.CLASSIC
SMALL = {"prompt": "a hen", "width": 64, "height": 64, "steps": 2, "seed": 7}
LONG = {**SMALL, "width": 256, "height": 256, "steps": 1000}
BOTH = pytest.mark.parametrize("family", ["flux2_klein", "z_image"])


@pytest.fixture
def pipelines(parity: Path) -> Path:
    return parity.parent / "parity_image"


async def lines_of(child, body):
    async with aclosing(child.exchange("/completion", body)) as lines:
        return [line async for line in lines]


async def file_of(child, body):
    return base64.b64decode(str((await lines_of(child, body))[-1]["image"]))


async def refusal(child, body):
    data = io.BytesIO(json.dumps(body).encode())
    async with child.session.post(child.url + "/completion", data=data) as response:
        return response.status, (await response.text()).strip()


@BOTH
async def test_the_same_seed_is_the_same_bytes_in_every_process_and_dialect(spawn_runner, pipelines, family):
    files = []
    for dialect in (IMAGEGEN, IMAGEGEN, CLASSIC):
        async with spawn_runner(pipelines / family, dialect=dialect) as child:
            await ready(child)
            files += [await file_of(child, SMALL), await file_of(child, SMALL)]
            other = await file_of(child, {**SMALL, "seed": 8})
    assert len(set(files)) == 1
    assert other != files[0]
    image = Image.open(io.BytesIO(files[0]))
    assert (image.size, image.text["seed"], image.text["steps"]) == ((64, 64), "7", "2")


@BOTH
async def test_the_bytes_do_not_depend_on_how_many_threads_the_machine_had_left(spawn_runner, pipelines, family):
    files = []
    for threads in (1, 2):
        async with spawn_runner(pipelines / family, dialect=IMAGEGEN, flags=[f"--threads={threads}"]) as child:
            await child.wait_ready()
            files.append([await file_of(child, {**SMALL, "width": side, "height": side}) for side in (64, 256)])
    assert files[0] == files[1]


@BOTH
async def test_a_size_is_rounded_and_the_log_says_so(spawn_runner, pipelines, family):
    async with spawn_runner(pipelines / family, dialect=IMAGEGEN) as child:
        await child.wait_ready()
        for asked in ((70, 100), (128, 48), (48, 128)):
            line = (await lines_of(child, {**SMALL, "width": asked[0], "height": asked[1]}))[-1]
            image = Image.open(io.BytesIO(base64.b64decode(str(line["image"]))))
            assert image.size == (line["width"], line["height"])
            assert all(side % 16 == 0 for side in image.size)
            assert max(abs(made - wanted) for made, wanted in zip(image.size, asked, strict=True)) <= 8
        assert await child.said("asked=70x100 size=64x96 multiple=16")


async def test_input_pictures_change_the_picture_and_set_its_size(spawn_runner, pipelines):
    one, other = (base64.b64encode(data).decode() for data in (png(80, 64), png(64, 80)))
    for family, most in (("flux2_klein", 2), ("z_image", 1)):
        async with spawn_runner(pipelines / family, dialect=IMAGEGEN) as child:
            await child.wait_ready()
            body = {"prompt": "a hen", "steps": 2, "seed": 7}
            made = [
                await lines_of(child, {**body, "images": images}) for images in ([one], [other], [one, other][:most])
            ]
            sizes = [(lines[-1]["width"], lines[-1]["height"]) for lines in made]
            # No larger than the pipeline's own size, which is 64x64 for the tiny Z-Image.
            expected = [(80, 64), (64, 80)] if family == "flux2_klein" else [(64, 48), (48, 64)]
            assert sizes == [*expected, expected[0]]
            if family == "flux2_klein":
                assert made[0][-1]["image"] != made[2][-1]["image"]


async def test_a_closed_connection_ends_its_picture_and_the_next_is_as_alone(spawn_runner, pipelines):
    async with spawn_runner(pipelines / "flux2_klein", dialect=IMAGEGEN) as child:
        await child.wait_ready()
        alone = await file_of(child, SMALL)
    async with spawn_runner(pipelines / "flux2_klein", dialect=IMAGEGEN) as child:
        await child.wait_ready()
        async with aclosing(child.exchange("/completion", LONG)) as lines:
            assert await anext(lines) == {"step": 1, "total": 1000, "done": False}
            following = asyncio.create_task(file_of(child, SMALL))
            while not (await child.health() or {}).get("queue"):
                assert await anext(lines)
            step = (await anext(lines))["step"]
        cancelled = await child.said("image cancelled")
        assert await following == alone
        # At most the steps that were written already, the one in flight and the one at its heels.
        assert int(cancelled.split("step=")[1].split("/")[0]) <= step + 20


async def test_two_wait_in_a_queue_and_one_that_leaves_never_runs(spawn_runner, pipelines):
    async with spawn_runner(pipelines / "flux2_klein", dialect=IMAGEGEN) as child:
        await child.wait_ready()
        async with aclosing(child.exchange("/completion", LONG)) as running:
            await anext(running)
            async with aclosing(child.exchange("/completion", {**SMALL, "prompt": "leaves"})) as leaving:
                assert await anext(leaving) == {"queue": 1, "done": False}
                last = asyncio.create_task(lines_of(child, SMALL))
                while (await child.health() or {}).get("queue") != 2:
                    assert await anext(running)
            # Its place is free: the one behind it hears of that.
            while (await child.health() or {}).get("queue") != 1:
                assert await anext(running)
            step = (await anext(running))["step"]
            while (await anext(running))["step"] < step + 2:
                pass
        lines = await last
        assert [line["queue"] for line in lines if "queue" in line] == [2, 1]
        assert lines[-1]["done"] is True
        assert len([line for line in child.lines if "image begun" in line]) == 2


async def test_health_is_answered_in_milliseconds_while_a_step_runs(spawn_runner, pipelines):
    async with spawn_runner(pipelines / "flux2_klein", dialect=IMAGEGEN) as child:
        await child.wait_ready()
        large = {**SMALL, "width": 1024, "height": 1024, "steps": 50}
        asking = asyncio.create_task(refusal(child, large))
        await busy(child)
        times = []
        for _ in range(50):
            begin = time.perf_counter()
            health = await child.health()
            times.append(time.perf_counter() - begin)
            assert health is not None
            assert health["status"] == "ok"
        assert not asking.done()
        asking.cancel()
    # Where much else runs, many answers wait for a core; none of the quick ones waited for a step.
    assert sorted(times)[5] < 0.05


async def test_no_hostile_input_harms_the_process(spawn_runner, pipelines):
    bodies = {
        **{name: {"images": [base64.b64encode(data).decode()]} for name, (data, _) in HOSTILE.items()},
        "many": {"images": [base64.b64encode(png()).decode()] * 11},
        "tiny": {"images": [base64.b64encode(png(1, 1)).decode()]},
        "thin": {"images": [base64.b64encode(png(1000, 64)).decode()]},
        "huge": {"width": 4096, "height": 4096},
        "negative": {"width": -64},
        "steps": {"steps": 10**6},
        "steps beyond numbers": {"steps": 2**70},
        "long": {"prompt": "x" * 10**6},
        "n": {"n": 10**9},
        "guidance": {"guidance": 1e300},
        "list": {"prompt": ["x"]},
        "format": {"format": {"type": "object"}},
    }
    async with spawn_runner(pipelines / "flux2_klein", dialect=IMAGEGEN) as child:
        await child.wait_ready()
        expected = await file_of(child, SMALL)
        for name, body in bodies.items():
            status, reason = await refusal(child, {**SMALL, **body})
            assert (name, status) == (name, 400)
            assert reason
        odd = await lines_of(child, {**SMALL, "prompt": "\0\ud800\U0001f600" + "word " * 2000})
        assert odd[-1]["done"] is True
        assert await file_of(child, SMALL) == expected
        assert not any("Traceback" in line for line in child.lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
async def test_a_signal_during_a_step_ends_the_stream_and_the_process(spawn_runner, pipelines, number):
    async with spawn_runner(pipelines / "z_image", dialect=IMAGEGEN) as child:
        await child.wait_ready()
        async with aclosing(child.exchange("/completion", LONG)) as lines:
            await anext(lines)
            ending = asyncio.create_task(stopped(child, number))
            with pytest.raises(ChildError, match="shutting down"):
                async for _ in lines:
                    pass
        assert_quiet_end(child, *await ending)


async def test_previews_and_several_pictures_come_from_a_real_pipeline(spawn_runner, pipelines):
    async with spawn_runner(pipelines / "z_image", dialect=IMAGEGEN) as child:
        await child.wait_ready()
        lines = await lines_of(child, {**SMALL, "steps": 4, "preview": 2, "n": 2, "format": "jpeg"})
        pictures = [line for line in lines if "image" in line]
        assert [(line.get("index", 0), line["seed"], line["format"]) for line in pictures] == [
            (0, 7, "jpeg"),
            (1, 8, "jpeg"),
        ]
        previews = [base64.b64decode(str(line["preview"])) for line in lines if "preview" in line]
        assert len(previews) == 4
        assert all(max(Image.open(io.BytesIO(data)).size) <= 128 for data in previews)
        alone = await file_of(child, {**SMALL, "steps": 4, "seed": 8, "format": "jpeg"})
        assert base64.b64decode(str(pictures[1]["image"])) == alone


async def test_the_largest_line_stays_below_what_the_parent_reads(spawn_runner, pipelines):
    """The tiny pipeline's pictures are noise, which no PNG makes smaller."""
    async with spawn_runner(pipelines / "flux2_klein", dialect=CLASSIC) as child:
        await ready(child)
        line = (await lines_of(child, {**SMALL, "width": 512, "height": 512, "steps": 1}))[-1]
        data = base64.b64decode(str(line["image"]))
        assert len(json.dumps(line)) < 500_000
        assert Image.open(io.BytesIO(data)).format.lower() == line["format"]
        assert np.asarray(Image.open(io.BytesIO(data))).shape == (512, 512, 3)
