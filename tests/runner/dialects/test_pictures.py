"""Pictures through the dialects: the real loop and the real engine over real sockets, with a pipeline in miniature."""

import asyncio
import base64
import io
import json
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image

from models.image.base import ImagePipeline
from protocol.imagegen import CompletionRequest
from protocol.options import Options
from runner.app import MAX_BODY_BYTES
from runner.config import DialectName
from runner.dialects import imagegen, ollamarunner_pictures
from runner.dialects.imagegen import ImagegenPictureEncoder
from runner.dialects.pictures import UNASKED, PictureAnswer, image_request, software
from runner.engine.image import ImageEngine
from runner.engine.loop import EngineLoop
from runner.engine.mlx_thread import MLXThread
from runner.engine.types import ImageRequest
from runner.errors import BadRequest
from tests.fakes_image import DISTILLED, FakePipeline, UnitGate
from tests.fakes_wire import ScriptedLoop, serve
from tests.runner.engine.test_pictures import HOSTILE, png

IMAGEGEN, CLASSIC, MLX = DialectName.IMAGEGEN, DialectName.CLASSIC, DialectName.MLX
TOTAL = {IMAGEGEN: "total", CLASSIC: "total_steps"}
speaks_pictures = pytest.mark.parametrize("dialect", [IMAGEGEN, CLASSIC], ids=lambda dialect: dialect.value)


@asynccontextmanager
async def served(dialect: DialectName, pipeline: ImagePipeline, **options):
    """A dialect with `pipeline` loaded."""
    thread = MLXThread()
    loop = EngineLoop(thread)
    try:
        await loop.load(lambda progress: ImageEngine(pipeline, name="fake", **options))
        async with serve(dialect, loop) as server:
            yield server
    finally:
        await loop.close(0)
        await thread.close()


async def ask(server, **body):
    """Status and lines; of a refusal, the reason."""
    status, answer = await server.post("/completion", json={"prompt": "a hen", **body})
    return status, [json.loads(line) for line in answer.splitlines()] if status == 200 else answer.decode()


async def file_of(server, **body):
    """The picture's file."""
    status, lines = await ask(server, **{"seed": 1, **body})
    assert status == 200, lines
    return base64.b64decode(lines[-1]["image"], validate=True)


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@speaks_pictures
async def test_steps_are_streamed_and_the_picture_comes_last(dialect):
    async with served(dialect, FakePipeline()) as server:
        status, (*steps, last) = await ask(server, width=48, height=32, steps=3, seed=7)
        assert status == 200
        assert [(line["step"], line[TOTAL[dialect]], line["done"]) for line in steps] == [
            (1, 3, False), (2, 3, False), (3, 3, False),
        ]  # fmt: skip
        assert (last["done"], last["done_reason"], last["seed"], last["format"]) == (True, 0, 7, "png")
        assert (last["width"], last["height"], last["eval_count"]) == (48, 32, 3)
        assert min(last["prompt_eval_duration"], last["eval_duration"], last["decode_duration"]) > 0
        image = Image.open(io.BytesIO(base64.b64decode(last["image"])))
        assert (image.format, image.size) == ("PNG", (48, 32))
        assert image.text["seed"] == "7"
        assert image.text["model"] == "fake"
        assert image.text["Software"] == software()


async def test_the_imagegen_lines_are_as_ollamas_child_writes_them():
    async with served(IMAGEGEN, FakePipeline()) as server:
        _, (first, *_, last) = await ask(server, steps=1, seed=7)
        assert first == {"step": 1, "total": 1, "done": False}
        assert last["stop_reason"] == "stop"


@speaks_pictures
async def test_the_same_request_is_the_same_bytes(dialect):
    async with served(dialect, FakePipeline()) as server:
        first = await file_of(server, seed=3)
        assert await file_of(server, seed=3) == first
        assert await file_of(server, seed=4) != first
        assert await file_of(server, seed=3, width=48) != first


@speaks_pictures
@pytest.mark.parametrize("seed", [0, -1, None])
async def test_a_seed_that_is_picked_is_told_and_reproduces(dialect, seed):
    async with served(dialect, FakePipeline()) as server:
        _, lines = await ask(server, **({} if seed is None else {"seed": seed}))
        picked = lines[-1]["seed"]
        assert picked > 0
        assert base64.b64decode(lines[-1]["image"]) == await file_of(server, seed=picked)


@speaks_pictures
async def test_fields_beyond_ollama_stand_in_the_options_or_beside_them_where_they_win(dialect):
    pipeline = FakePipeline()
    async with served(dialect, pipeline) as server:
        within = {
            "negative_prompt": "blur",
            "guidance": 2.5,
            "step_cache": 0.25,
            "preview": 2,
            "n": 2,
            "format": "jpeg",
        }
        beside = {"negative_prompt": "fog", "guidance": 1.5, "step_cache": 0.0, "preview": 0, "n": 1, "format": "webp"}
        await ask(server, options={**within, "seed": 5})
        picture = pipeline.begun[-1]
        assert (picture.negative_prompt, picture.guidance, picture.step_cache) == ("blur", 2.5, 0.25)
        assert (picture.preview_every, picture.seed, len(pipeline.begun)) == (2, 6, 2)
        _, lines = await ask(server, options=within, **beside)
        picture = pipeline.begun[-1]
        assert (picture.negative_prompt, picture.guidance, picture.step_cache) == ("fog", 1.5, 0.0)
        assert (picture.preview_every, len(pipeline.begun), lines[-1]["format"]) == (0, 3, "webp")


async def test_input_pictures_arrive_in_both_dialects():
    data = base64.b64encode(png(40, 24)).decode()
    for dialect, images in ((IMAGEGEN, [data]), (CLASSIC, [{"data": data, "id": 0}])):
        pipeline = FakePipeline()
        async with served(dialect, pipeline) as server:
            status, lines = await ask(server, images=images, strength=0.5)
            assert status == 200
            assert (lines[-1]["width"], lines[-1]["height"]) == (48, 32)
            assert pipeline.begun[0].images[0].shape == (24, 40, 3)
            assert pipeline.begun[0].strength == 0.5
            file = base64.b64decode(lines[-1]["image"])
            assert "Denoising strength: 0.5" in Image.open(io.BytesIO(file)).text["parameters"]


@speaks_pictures
@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
async def test_every_format_can_be_asked_for(dialect, format_):
    async with served(dialect, FakePipeline()) as server:
        _, lines = await ask(server, format=format_, seed=1)
        assert lines[-1]["format"] == format_
        image = Image.open(io.BytesIO(base64.b64decode(lines[-1]["image"])))
        assert image.format == format_.upper()
        plain = pixels_of(await file_of(server))
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - plain).mean() < (1 if format_ == "png" else 20)


@speaks_pictures
async def test_previews_are_small_pictures_beside_the_step(dialect):
    async with served(dialect, FakePipeline()) as server:
        _, lines = await ask(server, steps=4, preview=2)
        assert ["preview" in line for line in lines] == [False, True, False, True, False]
        preview = Image.open(io.BytesIO(base64.b64decode(lines[1]["preview"])))
        assert (preview.format, preview.size) == ("JPEG", (8, 8))


@speaks_pictures
async def test_several_pictures_come_one_after_another_each_as_alone(dialect):
    async with served(dialect, FakePipeline()) as server:
        _, lines = await ask(server, n=3, steps=2, seed=5)
        pictures = [line for line in lines if "image" in line]
        assert [line["done"] for line in pictures] == [False, False, True]
        assert [(line.get("index", 0), line["seed"]) for line in pictures] == [(0, 5), (1, 6), (2, 7)]
        assert [line.get("index", 0) for line in lines if "step" in line] == [0, 0, 1, 1, 2, 2]
        for line in pictures:
            assert base64.b64decode(line["image"]) == await file_of(server, steps=2, seed=line["seed"])


REFUSED = {
    "width": {"width": 5000},
    "height": {"height": -1},
    "steps": {"steps": -3},
    "n": {"n": 11},
    "guidance": {"guidance": -1},
    "strength": {"strength": 0.5},
    "preview": {"preview": -2},
    "format": {"format": "tiff"},
    "step_cache": {"step_cache": 7},
    "images": {"images": [base64.b64encode(png()).decode()] * 3},
    "images[0]": {"images": [base64.b64encode(b"no picture").decode()]},
    "temperature": {"options": {"temperature": 0.2}},
    "num_predict": {"options": {"num_predict": 7}},
    "top_k": {"options": {"top_k": 3}},
    "stop": {"options": {"stop": ["x"]}},
    "the prompt is empty": {"prompt": ""},
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_honoured_is_400_and_named_and_the_next_works(name):
    async with served(IMAGEGEN, FakePipeline()) as server:
        status, reason = await ask(server, **REFUSED[name])
        assert status == 400
        assert reason.startswith(name)
        assert (await ask(server))[0] == 200


@pytest.mark.parametrize(
    "field", [{"guidance": 2.0}, {"negative_prompt": "blur"}, {"strength": 0.5}, {"images": ["aGk="]}], ids=str
)
async def test_what_a_distilled_pipeline_cannot_honour_is_400_and_named(field):
    async with served(IMAGEGEN, FakePipeline(DISTILLED)) as server:
        for body in (field, *([{"options": field}] if "images" not in field else [])):
            status, reason = await ask(server, **body)
            assert status == 400
            assert next(iter(field)) in reason


@pytest.mark.parametrize("field", ["Grammar", "Logprobs", "Format"])
async def test_a_classic_request_for_more_than_a_picture_is_400(field):
    async with served(CLASSIC, FakePipeline()) as server:
        status, reason = await ask(server, **{field: {"Grammar": "root", "Logprobs": True, "Format": {}}[field]})
        assert status == 400
        assert field.lower() in reason.lower()


@pytest.mark.parametrize("name", HOSTILE)
async def test_no_hostile_file_harms_the_next_request(name):
    async with served(IMAGEGEN, FakePipeline()) as server:
        data = base64.b64encode(HOSTILE[name][0]).decode()
        status, reason = await ask(server, images=[data])
        assert (status, reason.startswith("images[0] ")) == (400, True)
        assert (await ask(server))[0] == 200


@speaks_pictures
@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"prompt":7}', b'{"prompt":"x","images":["!"]}', b'{"prompt":"x","n":1.5}'], ids=repr
)
async def test_a_body_that_is_none_is_400(dialect, body):
    async with served(dialect, FakePipeline()) as server:
        assert (await server.post("/completion", data=body))[0] == 400
        assert (await ask(server))[0] == 200


async def test_options_that_parents_merge_into_every_request_are_no_wish():
    merged = {
        "num_keep": 4, "seed": -1, "num_predict": -1, "top_k": 40, "top_p": 0.9, "typical_p": 1, "repeat_last_n": 64,
        "temperature": 0.8, "repeat_penalty": 1.1, "num_ctx": 8192, "num_batch": 512, "num_gpu": -1, "use_mmap": True,
        "draft_num_predict": 4,
    }  # fmt: skip
    async with served(IMAGEGEN, FakePipeline()) as server:
        assert (await ask(server, options=merged))[0] == 200
        assert (await ask(server, options={**merged, "temperature": 0.800000011920929, "top_p": 0.8999999761581421}))[
            0
        ] == 200


def test_every_option_is_for_pictures_or_refused_or_without_meaning_for_them():
    without_meaning = {
        "num_keep", "num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict",
    }  # fmt: skip
    for_pictures = {"seed", "negative_prompt", "guidance", "strength", "preview", "format", "n", "step_cache"}
    assert set(Options.model_fields) == for_pictures | without_meaning | set(UNASKED) | {"stop"}
    for name in UNASKED:
        with pytest.raises(BadRequest, match=name):
            wanted(options=Options(**{name: 3}))


def wanted(**fields):
    body = {"options": None, "width": 0, "height": 0, "steps": 0, "seed": 0, "images": (), **fields}
    return image_request("a hen", body.pop("options"), CompletionRequest(), **body)


def test_zeros_are_defaults_and_the_requests_own_seed_goes_first():
    assert wanted() == ImageRequest("a hen")
    assert wanted(seed=-4) == ImageRequest("a hen")
    assert wanted(seed=3, options=Options(seed=5)).seed == 3
    assert wanted(options=Options(seed=5)).seed == 5
    assert wanted(options=Options(seed=-1)).seed is None


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
        assert slowest < 5
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


@pytest.mark.parametrize("limit", [56_000, 20_000], ids=["as JPEG", "not at all"])
@speaks_pictures
async def test_no_line_is_longer_than_the_parent_reads(dialect, limit, monkeypatch):
    encoder = ImagegenPictureEncoder if dialect is IMAGEGEN else ollamarunner_pictures.OllamaRunnerPictureEncoder
    monkeypatch.setattr(encoder, "max_line", limit)
    async with served(dialect, FakePipeline(noise=True)) as server:
        status, body = await server.post(
            "/completion", json={"prompt": "a hen", "width": 128, "height": 128, "seed": 1}
        )
        assert status == 200
        lines = body.splitlines(keepends=True)
        assert max(map(len, lines)) <= limit
        last = json.loads(lines[-1])
        if limit == 56_000:
            assert (last["done"], last["format"]) == (True, "jpeg")
            assert Image.open(io.BytesIO(base64.b64decode(last["image"]))).format == "JPEG"
        else:
            assert "too large for an answer line" in (last.get("error") or last["content"])
        assert (await ask(server))[0] == 200


def test_the_limits_are_the_parents():
    assert imagegen.ImagegenPictureEncoder.max_line == 16 * 2**20
    assert ollamarunner_pictures.OllamaRunnerPictureEncoder.max_line == 500_000


async def test_a_classic_parent_never_gets_thirty_lines_without_content():
    async with served(CLASSIC, FakePipeline()) as server:
        for body in ({"steps": 500}, {"steps": 31, "n": 10}, {"steps": 14}):
            status, lines = await ask(server, width=16, height=16, **body)
            assert status == 200
            assert len(lines) <= 29
            assert lines[-1]["done"] is True
        assert [line.get("step") for line in lines[:-1]] == list(range(1, 15))


async def test_the_mlx_protocol_has_no_pictures_and_says_so():
    async with served(MLX, FakePipeline()) as server:
        status, reason = await server.post("/v1/completions", json={"Prompt": "a hen"})
        assert status == 501
        assert b"--imagegen-engine" in reason
        assert (await server.get("/v1/status"))[0] == 200


async def test_what_an_image_model_cannot_do_is_said_clearly():
    async with served(IMAGEGEN, FakePipeline()) as server:
        assert await server.post("/tokenize", json={"content": "x"}) == (
            501, b"tokenization is not supported for image generation models\n",
        )  # fmt: skip
        assert (await server.post("/embedding", json={"content": "x"}))[0] == 501


PICTURE_FIELDS = [
    {"guidance": 2},
    {"negative_prompt": "x"},
    {"strength": 0.5},
    {"preview": 1},
    {"n": 2},
    {"step_cache": 0.1},
]


@pytest.mark.parametrize("field", PICTURE_FIELDS, ids=str)
@pytest.mark.parametrize("dialect", list(DialectName), ids=lambda dialect: dialect.value)
async def test_a_text_model_refuses_the_fields_of_pictures_by_name(dialect, field):
    async with serve(dialect, ScriptedLoop()) as server:
        bodies = [{"options": field}] if dialect is MLX else [{"options": field}, field]
        for body in bodies:
            status, reason = await server.post("/completion", json={"prompt": "x", **body})
            assert status == 501
            assert next(iter(field)) in reason.decode()
        assert server.loop.requests == []


async def test_several_photos_fit_into_a_request_and_are_read_beside_the_event_loop():
    def body(photos):
        photo = base64.b64encode(b"x" * 11_900_000)
        return io.BytesIO(b'{"prompt":"a hen","images":["' + b'","'.join([photo] * photos) + b'"]}')

    async with served(IMAGEGEN, FakePipeline()) as server:
        status, reason = await server.post("/completion", data=body(4))
        assert (status, b"takes 2 input pictures" in reason) == (400, True)
        assert (await server.post("/completion", data=body(5)))[0] == 413
        assert MAX_BODY_BYTES < 5 * 16_000_000


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
