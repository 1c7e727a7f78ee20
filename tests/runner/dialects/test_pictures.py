"""Pictures through the dialects: the real loop and the real engine over real sockets, with a pipeline in miniature."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from runner.dialects import imagegen, ollamarunner_pictures
from runner.dialects.imagegen import ImagegenPictureEncoder
from runner.dialects.pictures import software
from tests.fakes_image import FakePipeline
from tests.runner.dialects.serving_pictures import (
    CLASSIC,
    IMAGEGEN,
    MLX,
    TOTAL,
    ask,
    file_of,
    pixels_of,
    served,
    speaks_pictures,
)
from tests.runner.engine.test_pictures import png


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
