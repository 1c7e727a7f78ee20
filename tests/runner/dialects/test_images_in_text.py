"""Pictures in requests for text, in the three dialects."""

import asyncio
import base64
import json
import threading
import time

import pytest

from protocol import imagegen, ollamarunner
from runner.config import DialectName
from runner.dialects.imagegen import parse as parse_imagegen
from runner.dialects.mlxrunner import parse as parse_mlx
from runner.dialects.ollamarunner import parse as parse_classic
from runner.engine.types import InputImage, TextRequest
from tests.fakes import FakeExecutor, scripted
from tests.fakes_vision import FakeEncoder, failing, vision
from tests.fakes_wire import ScriptedLoop, serve
from tests.runner.dialects.test_with_engine import complete, every_dialect, idle, served_model
from tests.runner.engine.picture_requests import CAT, DOG, asked, image
from tests.runner.engine.serving import make_engine, run, seeing
from tests.runner.engine.test_pictures import HOSTILE

CLASSIC, MLX, IMAGEGEN = DialectName.CLASSIC, DialectName.MLX, DialectName.IMAGEGEN


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def with_images(dialect: DialectName, *images: InputImage) -> dict[str, object]:
    """The fields of a body that say so."""
    match dialect:
        case DialectName.CLASSIC:
            return {"Images": [{"data": encoded(each.data), "id": each.id} for each in images]}
        case DialectName.MLX:
            return {"Media": [{"data": encoded(each.data), "id": each.id, "Kind": "image"} for each in images]}
        case DialectName.IMAGEGEN:
            return {"images": [encoded(each.data) for each in images]}


# --- what the wire says


@pytest.mark.parametrize(
    "media",
    [
        {"Media": [{"data": "aGk=", "id": 3, "Kind": "image"}]},
        {"Media": [{"data": "aGk=", "id": 3, "Kind": ""}]},
        {"Media": [{"data": "aGk=", "id": 3}]},
        {"media": [{"Data": "aGk=", "ID": 3, "kind": "Image"}]},
        {"Images": [{"data": "aGk=", "id": 3}]},
        {"Media": [{"data": [104, 105], "id": 3}]},
    ],
    ids=str,
)
def test_the_mlx_dialects_media_are_understood(media: dict):
    assert parse_mlx(json.dumps({"Prompt": "p", **media}).encode()) == TextRequest("p", images=(InputImage(3, b"hi"),))


def test_the_classic_dialects_images_are_understood():
    body = {"Prompt": "p", "Images": [{"data": "aGk=", "id": 3}, None, {"data": "aG8=", "id": -1}]}
    wire = ollamarunner.CompletionRequest.from_json(json.dumps(body).encode())
    assert parse_classic(wire).images == (InputImage(3, b"hi"), InputImage(0, b""), InputImage(-1, b"ho"))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("what is this?", "[img-0][img-1]what is this?"),
        ("", "[img-0][img-1]"),
        ("a [img-1] b [img-0]", "a [img-1] b [img-0]"),
        ("a [img-1]", "a [img-1]"),
        # It refers to none of these.
        ("a [img-2]", "[img-0][img-1]a [img-2]"),
    ],
)
def test_the_imagegen_dialects_images_are_numbered_and_stand_in_front_of_a_prompt_that_names_none(
    prompt: str, expected: str
):
    wire = imagegen.CompletionRequest.from_json(json.dumps({"prompt": prompt, "images": ["aGk=", "aG8="]}).encode())
    request = parse_imagegen(wire)
    assert (request.prompt, request.images) == (expected, (InputImage(0, b"hi"), InputImage(1, b"ho")))


def test_without_images_a_prompt_of_the_imagegen_dialect_is_what_it_was():
    wire = imagegen.CompletionRequest.from_json(b'{"prompt":"a [img-0]"}')
    assert parse_imagegen(wire) == TextRequest("a [img-0]", parse_imagegen(wire).sampling)


@pytest.mark.parametrize("kind", ["audio", "Audio", "video", "image/png"])
@pytest.mark.parametrize("field", ["Media", "Images"])
async def test_other_media_are_refused_by_the_name_of_their_kind(field: str, kind: str):
    async with serve(MLX, ScriptedLoop()) as server:
        body = {"Prompt": "p", field: [{"data": "aGk=", "id": 0}, {"data": "aGk=", "id": 1, "Kind": kind}]}
        status, reason = await server.post("/v1/completions", json=body)
        assert status == 501
        assert reason.decode().startswith(f"Media of kind {kind} is not supported")
        assert server.loop.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"Prompt":"x","Media":[{"data":"!"}]}',
        b'{"Prompt":"x","Media":[{"id":9223372036854775808}]}',
        b'{"Prompt":"x","Media":[{"id":"1"}]}',
        b'{"Prompt":"x","Media":{}}',
        b'{"Prompt":"x","Images":[7]}',
    ],
    ids=repr,
)
@pytest.mark.parametrize("dialect", [MLX, CLASSIC], ids=lambda dialect: dialect.value)
async def test_a_body_that_is_none_is_400(dialect: DialectName, body: bytes):
    async with served_model(dialect, FakeExecutor("yes"), eye=seeing(vision())) as served:
        body = body.replace(b"Media", b"Images") if dialect is CLASSIC else body
        assert (await served.post("/completion", data=body))[0] == 400
        assert (await complete(served, dialect, scripted(0)))[:2] == (200, "yes")


# --- with an engine


@every_dialect
async def test_a_picture_is_part_of_what_is_answered(dialect: DialectName):
    expected = [
        run(make_engine(FakeExecutor(), eye=seeing(vision())), asked("a [img-0] b", each))[0]
        for each in (CAT, image(0, 31))
    ]
    assert expected[0].text != expected[1].text
    async with served_model(dialect, FakeExecutor(), eye=seeing(vision())) as served:
        for each, wanted in zip((CAT, image(0, 31)), expected, strict=True):
            options = {"num_predict": 20, "temperature": 0, "top_k": 0}
            status, text, last = await complete(
                served, dialect, "a [img-0] b", options=options, **with_images(dialect, each)
            )
            assert (status, text) == (200, wanted.text)
            assert wanted.done.prompt_tokens in last.values()


@every_dialect
async def test_a_model_without_vision_is_400_in_the_parents_words(dialect: DialectName):
    async with served_model(dialect, FakeExecutor("yes")) as served:
        status, reason, _ = await complete(served, dialect, "[img-0]", **with_images(dialect, CAT))
        assert (status, reason) == (400, "this model does not support image input\n")
        assert (await complete(served, dialect, scripted(0)))[:2] == (200, "yes")


@pytest.mark.parametrize("name", HOSTILE)
@every_dialect
async def test_no_hostile_file_harms_the_next_request(dialect: DialectName, name: str):
    async with served_model(dialect, FakeExecutor("yes"), eye=seeing(vision())) as served:
        hostile = InputImage(0, HOSTILE[name][0])
        status, reason, _ = await complete(served, dialect, "[img-0]", **with_images(dialect, hostile))
        assert (status, reason.startswith("decode image: [img-0] ")) == (400, True)
        body = with_images(dialect, CAT)
        assert (await complete(served, dialect, "[img-0]" + scripted(0), **body))[:2] == (200, "yes")


@pytest.mark.parametrize("dialect", [MLX, CLASSIC], ids=lambda dialect: dialect.value)
async def test_a_reference_to_nothing_is_400_in_the_parents_words(dialect: DialectName):
    async with served_model(dialect, FakeExecutor("yes"), eye=seeing(vision())) as served:
        status, reason, _ = await complete(served, dialect, f"[img-0] [img-{2**63}]", **with_images(dialect, CAT))
        assert (status, reason) == (400, f"invalid image index: {2**63}\n")


@every_dialect
async def test_a_tower_that_fails_ends_its_request_and_no_other(dialect: DialectName):
    encoder = FakeEncoder(before_piece=failing(0))
    async with served_model(dialect, FakeExecutor("yes"), eye=seeing(vision(), encoder)) as served:
        body = with_images(dialect, CAT)
        status, text, last = await complete(served, dialect, "[img-0]", **body)
        assert status == 500 or "the tower fell" in json.dumps(last)
        assert status != 500 or "the tower fell" in text
        assert (await complete(served, dialect, "[img-0]" + scripted(0), **body))[:2] == (200, "yes")


@every_dialect
async def test_a_client_that_leaves_while_its_picture_is_looked_at_frees_its_row(dialect: DialectName):
    reached, opened = threading.Event(), threading.Event()

    def hold(number: int, piece: int) -> None:
        if (number, piece) == (0, 1):
            reached.set()
            assert opened.wait(60)

    encoder, executor = FakeEncoder(before_piece=hold), FakeExecutor("yes")
    async with served_model(dialect, executor, eye=seeing(vision(), encoder)) as served:
        asking = asyncio.create_task(complete(served, dialect, "[img-0]", **with_images(dialect, CAT)))
        assert await asyncio.to_thread(reached.wait, 60)
        asking.cancel()
        await asyncio.wait([asking])
        async with asyncio.timeout(60):
            while served.loop._readers:
                await served.get("/health")
        opened.set()
        await idle(served, executor)
        assert (encoder.given_up, encoder.finished) == (1, 0)
        body = with_images(dialect, CAT)
        assert (await complete(served, dialect, "[img-0]" + scripted(0), **body))[:2] == (200, "yes")


async def test_few_requests_with_pictures_are_prepared_at_once_and_texts_do_not_wait_for_them():
    own = vision()
    inside, most, opened, both = [], [], threading.Event(), threading.Event()

    def slow(pixels):
        inside.append(1)
        most.append(len(inside))
        if len(inside) == 2:
            both.set()
        assert opened.wait(60)
        inside.pop()
        return own.prepare(pixels)

    async with served_model(CLASSIC, FakeExecutor("yes"), eye=seeing(type(own)(own.tower, slow, own.filler))) as served:
        body = with_images(CLASSIC, CAT)
        asking = [asyncio.create_task(complete(served, CLASSIC, "[img-0]" + scripted(0), **body)) for _ in range(12)]
        long = "x" * 2000
        assert await asyncio.to_thread(both.wait, 60)
        assert (await complete(served, CLASSIC, long, options={"num_ctx": 100}))[0] == 400
        assert (await complete(served, CLASSIC, scripted(0)))[:2] == (200, "yes")
        opened.set()
        answers = await asyncio.gather(*asking)
    assert [each[:2] for each in answers] == [(200, "yes")] * 12
    assert max(most) == 2


@every_dialect
async def test_the_event_loop_answers_while_a_large_picture_is_decoded(dialect: DialectName):
    large = image(0, 40, 300, 300)
    async with served_model(
        dialect, FakeExecutor("yes"), eye=seeing(vision()), context_length=100_000, prefill_chunk=100_000
    ) as served:
        begin = time.perf_counter()
        asking = asyncio.create_task(
            complete(served, dialect, "[img-0]" + scripted(0), **with_images(dialect, large, DOG))
        )
        answered = 0
        while not asking.done():
            assert (await served.get("/health"))[0] == 200
            answered += 1
        assert (await asking)[:2] == (200, "yes")
        assert answered > 1, f"in {time.perf_counter() - begin:.2f} s"
