"""The image engine: order, cancellation, failures, reproducibility, what it tells."""

import asyncio
import logging

import numpy as np
import pytest

from runner.engine.image import ImageEngine
from runner.engine.image_memory import ImageMemory
from runner.engine.loop import EngineLoop
from runner.engine.step_times import PATIENCE_S
from runner.engine.types import (
    Failed,
    ImageDone,
    ImageMade,
    ImageProgress,
    ImageQueued,
    ImageRequest,
    TextRequest,
)
from runner.errors import BadRequest, GenerationError, InsufficientMemory, NotImplementedHere, NotReady
from tests.fakes_image import FakePipeline, UnitGate

ENCODE, FIRST_STEP, SECOND_STEP = 0, 1, 2
UNITS = 7
"""Of a picture: the prompt, four steps, two tiles."""


@pytest.fixture
async def serve(thread):
    """A running loop on a fake pipeline: `loop = await serve(FakePipeline(...))`."""
    loops = []

    async def start(pipeline, **options) -> EngineLoop:
        loops.append(loop := EngineLoop(thread))
        await loop.load(lambda progress: ImageEngine(pipeline, name="fake", **options))
        return loop

    yield start
    for loop in loops:
        await loop.close(0)


async def ask(loop, request):
    async with loop.submit(request) as outputs:
        return [output async for output in outputs]


async def admitted(loop, count):
    """Wait until so many requests are about to be handed over."""
    async with asyncio.timeout(60):
        while len(loop._added) < count:  # noqa: ASYNC110 - whoever prepares them tells nobody
            await asyncio.sleep(0)


async def picture(loop, **fields):
    """The only picture of a request."""
    last = (await ask(loop, ImageRequest("a hen", **{"seed": 1, **fields})))[-1]
    assert isinstance(last, ImageDone), last
    return last.picture


async def test_each_step_is_told_and_then_the_picture(serve):
    loop = await serve(FakePipeline())
    *steps, last = await ask(loop, ImageRequest("a hen", width=48, height=32, steps=3, seed=5))
    assert steps == [ImageProgress(1, number, 3) for number in (1, 2, 3)]
    assert isinstance(last, ImageDone)
    made = last.picture
    assert made.pixels.shape == (32, 48, 3)
    assert made.pixels.dtype == np.uint8
    assert (made.request.seed, made.request.prompt, made.model, made.steps_computed) == (5, "a hen", "fake", 3)
    assert min(made.encode_ns, made.denoise_ns, made.decode_ns) > 0


async def test_the_same_request_gives_the_same_pixels_and_another_seed_does_not(serve):
    loop = await serve(FakePipeline())
    first, again, other = [await picture(loop, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)


async def test_a_seed_that_nobody_gave_is_drawn_and_reproduces(serve):
    loop = await serve(FakePipeline())
    drawn = await picture(loop, seed=None)
    assert 0 < drawn.request.seed < 2**32
    assert drawn.request.seed != (await picture(loop, seed=None)).request.seed
    assert np.array_equal(drawn.pixels, (await picture(loop, seed=drawn.request.seed)).pixels)


async def test_each_of_several_pictures_is_the_one_it_would_be_alone(serve):
    pipeline = FakePipeline()
    loop = await serve(pipeline)
    outputs = await ask(loop, ImageRequest("a hen", seed=7, count=3, steps=2))
    made = [output.picture for output in outputs if isinstance(output, ImageMade | ImageDone)]
    assert [type(output) for output in outputs if not isinstance(output, ImageProgress)] == [
        ImageMade,
        ImageMade,
        ImageDone,
    ]
    assert [(each.index, each.request.seed) for each in made] == [(0, 7), (1, 8), (2, 9)]
    assert [(each.index, each.step) for each in outputs if isinstance(each, ImageProgress)] == [
        (index, step) for index in range(3) for step in (1, 2)
    ]
    for each in made:
        assert np.array_equal(each.pixels, (await picture(loop, seed=each.request.seed, steps=2)).pixels)


async def test_every_so_many_steps_carry_a_preview(serve):
    loop = await serve(FakePipeline())
    steps = await ask(loop, ImageRequest("a hen", seed=1, steps=5, preview=2))
    assert [step.preview is not None for step in steps[:-1]] == [False, True, False, True, False]
    assert steps[1].preview.shape == (8, 8, 3)


async def test_a_second_request_is_told_its_place_and_runs_behind_the_first(serve):
    gate = UnitGate(SECOND_STEP)
    pipeline = FakePipeline(before_unit=gate)
    loop = await serve(pipeline)
    heard = []

    async def listen(prompt):
        async with loop.submit(ImageRequest(prompt, seed=1)) as outputs:
            async for output in outputs:
                heard.append((prompt, output))  # noqa: PERF401 - in the order of all that is heard

    first = asyncio.create_task(listen("first"))
    await gate.reached()
    second, third = asyncio.create_task(listen("second")), asyncio.create_task(listen("third"))
    await admitted(loop, 2)
    gate.open()
    await asyncio.gather(first, second, third)
    places = [(prompt, output.place) for prompt, output in heard if isinstance(output, ImageQueued)]
    assert places == [("second", 1), ("third", 2), ("third", 1)]
    # They are told before the first has done another step.
    told = next(index for index, (_, output) in enumerate(heard) if isinstance(output, ImageQueued))
    steps = [output.step for _, output in heard[:told] if isinstance(output, ImageProgress)]
    assert steps == [1, 2]
    assert [picture.prompt for picture in pipeline.begun] == ["first", "second", "third"]
    assert all(isinstance(output, ImageProgress | ImageQueued | ImageDone) for _, output in heard)


async def test_a_place_is_told_without_waiting_for_another_step(serve):
    second_step, third_step = UnitGate(SECOND_STEP), UnitGate(SECOND_STEP + 1)

    def gates(*unit):
        second_step(*unit)
        third_step(*unit)

    loop = await serve(FakePipeline(before_unit=gates))
    first = asyncio.create_task(picture(loop))
    await second_step.reached()
    async with loop.submit(ImageRequest("waits")) as outputs:
        second_step.open()
        async with asyncio.timeout(60):
            assert await anext(outputs) == ImageQueued(2, 1)
        third_step.open()
    await first


async def test_those_who_come_and_go_do_not_hold_up_a_picture(thread):
    engine = ImageEngine(FakePipeline(), name="fake")

    def run():
        prepared = engine.prepare(ImageRequest("a hen"))
        engine.add(0, prepared)
        for visitor in range(1, 2 * UNITS + 1):
            engine.add(visitor, prepared)
            outputs = engine.step()
            engine.cancel(visitor)
            if any(isinstance(output, ImageDone) for output in outputs):
                return visitor
        return None

    assert await thread.call(run)


async def test_a_pipelines_iterator_is_closed_even_if_somebody_holds_it(serve, monkeypatch):
    gate = UnitGate(SECOND_STEP)
    pipeline = FakePipeline(before_unit=gate)
    held = []
    generate = pipeline.generate
    monkeypatch.setattr(pipeline, "generate", lambda request: held.append(generate(request)) or held[-1])
    loop = await serve(pipeline)
    leaving = asyncio.create_task(picture(loop))
    await gate.reached()
    leaving.cancel()
    await asyncio.wait([leaving])
    gate.open()
    await picture(loop)
    assert held[0].gi_frame is None
    assert pipeline.living_latents() == 0


async def test_a_cancelled_picture_stops_within_a_step_and_the_next_is_as_if_alone(serve):
    gate = UnitGate(SECOND_STEP)
    pipeline = FakePipeline(before_unit=gate)
    loop = await serve(pipeline)
    alone = await picture(await serve(FakePipeline()), seed=3)
    leaving = asyncio.create_task(picture(loop, steps=500))
    await gate.reached()
    following = asyncio.create_task(picture(loop, seed=3))
    await admitted(loop, 1)
    leaving.cancel()
    await asyncio.wait([leaving])
    gate.open()
    assert np.array_equal((await following).pixels, alone.pixels)
    # The prompt and the two steps that had begun.
    assert pipeline.units == 3 + UNITS
    assert pipeline.living_latents() == 0


async def test_a_queued_request_that_goes_away_never_runs(serve):
    gate = UnitGate(FIRST_STEP)
    pipeline = FakePipeline(before_unit=gate)
    loop = await serve(pipeline)
    first = asyncio.create_task(picture(loop))
    await gate.reached()
    async with loop.submit(ImageRequest("leaves")) as outputs:
        gate.open()
        queued = await anext(outputs)
        assert queued == ImageQueued(2, 1)
    await first
    assert (await picture(loop)).request.seed == 1
    assert [picture.prompt for picture in pipeline.begun] == ["a hen", "a hen"]


@pytest.mark.parametrize("unit", [ENCODE, SECOND_STEP, UNITS - 1], ids=["encode", "denoise", "decode"])
async def test_an_error_ends_its_request_alone_and_leaves_nothing_behind(serve, unit):
    def fail(number, phase, wanted):
        if number == unit:
            raise ValueError(f"{phase} broke")

    pipeline = FakePipeline(before_unit=fail)
    loop = await serve(pipeline)
    failed, done = await asyncio.gather(ask(loop, ImageRequest("a hen", seed=1)), ask(loop, ImageRequest("b", seed=1)))
    assert isinstance(failed[-1], Failed)
    assert isinstance(failed[-1].error, GenerationError)
    assert "broke" in str(failed[-1].error)
    assert isinstance(done[-1], ImageDone)
    assert pipeline.living_latents() == 0
    assert loop.status.running == loop.status.waiting == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[malloc] Unable to allocate 1 bytes.")], ids=["python", "mlx"]
)
async def test_running_out_of_memory_is_said_in_the_words_that_parents_look_for(serve, error):
    def fail(number, phase, wanted):
        if number == SECOND_STEP:
            raise error

    loop = await serve(FakePipeline(before_unit=fail))
    last = (await ask(loop, ImageRequest("a hen")))[-1]
    assert isinstance(last.error, InsufficientMemory)
    assert "insufficient memory while making a picture of 64x64" in str(last.error)
    assert isinstance((await ask(loop, ImageRequest("a hen")))[-1], ImageDone)


async def test_a_pipeline_that_ends_without_a_picture_fails_the_request(serve, monkeypatch):
    pipeline = FakePipeline()
    monkeypatch.setattr(pipeline, "generate", lambda request: iter(()))
    last = (await ask(await serve(pipeline), ImageRequest("a hen")))[-1]
    assert "without a picture" in str(last.error)


async def test_a_picture_that_does_not_fit_is_refused_before_it_begins(serve):
    pipeline = FakePipeline()
    memory = ImageMemory(lambda: 100 << 20)
    loop = await serve(pipeline, memory=memory)
    with pytest.raises(InsufficientMemory, match="the largest size that fits is 1024x1024"):
        await ask(loop, ImageRequest("a hen", width=2048, height=2048))
    assert pipeline.begun == []
    assert isinstance((await ask(loop, ImageRequest("a hen", seed=1)))[-1], ImageDone)


async def test_a_picture_for_which_memory_went_away_while_it_waited_fails_alone(serve):
    gate = UnitGate(FIRST_STEP)
    pipeline = FakePipeline(before_unit=gate)
    free = [1 << 30]
    loop = await serve(pipeline, memory=ImageMemory(lambda: free[0]))
    first = asyncio.create_task(picture(loop))
    await gate.reached()
    second = asyncio.create_task(ask(loop, ImageRequest("a hen", width=1024, height=1024)))
    await admitted(loop, 1)
    free[0] = 0
    gate.open()
    await first
    assert isinstance((await second)[-1].error, InsufficientMemory)
    assert len(pipeline.begun) == 1


async def test_a_running_pictures_memory_counts_as_free_for_one_that_waits(serve):
    gate = UnitGate(FIRST_STEP)
    free = [100 << 20]
    pipeline = FakePipeline(before_unit=gate)
    loop = await serve(pipeline, memory=ImageMemory(lambda: free[0]))
    first = asyncio.create_task(picture(loop, width=1024, height=1024))
    await gate.reached()
    free[0] = 0
    second = asyncio.create_task(picture(loop, width=1024, height=1024))
    await admitted(loop, 1)
    free[0] = 100 << 20
    gate.open()
    await asyncio.gather(first, second)
    assert len(pipeline.begun) == 2


async def test_the_status_shows_the_step_and_who_waits(serve):
    gate = UnitGate(FIRST_STEP + 2)
    loop = await serve(FakePipeline(before_unit=gate))
    status = loop.status
    assert (status.makes_pictures, status.running, status.step, status.total_steps) == (True, 0, 0, 0)
    first = asyncio.create_task(picture(loop))
    await gate.reached()
    status = loop.status
    assert (status.running, status.step, status.total_steps, status.waiting) == (1, 2, 4, 0)
    gate.open()
    await first


async def test_text_is_refused_and_so_is_tokenising(serve):
    loop = await serve(FakePipeline())
    with pytest.raises(NotImplementedHere, match="generates images, not text"):
        await ask(loop, TextRequest("a hen"))
    with pytest.raises(NotImplementedHere, match="tokenization"):
        await loop.tokenize("a hen", add_bos=False)


async def test_what_the_pipeline_says_of_an_input_picture_is_the_requests_fault(serve):
    from tests.runner.engine.test_pictures import png

    loop = await serve(FakePipeline())
    with pytest.raises(BadRequest, match=r"images\[0\] is smaller than 8 pixels"):
        await ask(loop, ImageRequest("a hen", images=(png(4, 4),), width=64, height=64))


async def test_closing_in_the_middle_gives_everything_back(serve):
    gate = UnitGate(SECOND_STEP)
    pipeline = FakePipeline(before_unit=gate)
    loop = await serve(pipeline)
    asked = asyncio.create_task(ask(loop, ImageRequest("a hen")))
    await gate.reached()
    closing = asyncio.create_task(loop.close(0))
    last = (await asked)[-1]
    gate.open()
    await closing
    assert isinstance(last.error, NotReady)
    assert pipeline.living_latents() == 0


class Clock:
    """Counts what it is told to."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def unit(self, number, phase, wanted):
        self.now += {"encode": 2, "denoise": 100, "decode": 5}[phase] * 10**9


def warnings_of(caplog):
    return [record for record in caplog.records if "longer than its parent waits" in record.message]


async def test_a_run_that_will_outlast_the_parent_is_announced_at_its_start_with_an_estimate(serve, caplog):
    caplog.set_level(logging.INFO, "runner.engine")
    clock = Clock()
    loop = await serve(FakePipeline(before_unit=clock.unit), clock=clock)
    await picture(loop, steps=5)
    assert warnings_of(caplog) == []
    caplog.clear()
    await picture(loop, steps=7)
    (warning,) = warnings_of(caplog)
    assert warning.levelno == logging.WARNING
    # 7 steps of 100 s, 2 s for the prompt and twice 5 s of decoding, all known from the run before.
    assert warning.fields["estimate_s"] == 712 > PATIENCE_S
    assert [record.message for record in caplog.records].index("image begun") + 1 == caplog.records.index(warning)


async def test_the_first_run_of_all_is_announced_once_a_step_is_measured(serve, caplog):
    clock = Clock()
    loop = await serve(FakePipeline(before_unit=clock.unit), clock=clock)
    await picture(loop, steps=8, width=128, height=64)
    (warning,) = warnings_of(caplog)
    assert warning.fields["estimate_s"] == 802


async def test_the_estimate_grows_with_the_pixels_and_the_pictures(serve, caplog):
    clock = Clock()
    loop = await serve(FakePipeline(before_unit=clock.unit), clock=clock)
    await picture(loop, steps=1)
    await ask(loop, ImageRequest("a hen", steps=1, count=2, width=256, height=64))
    assert warnings_of(caplog)[0].fields["estimate_s"] == pytest.approx(848, abs=60)
