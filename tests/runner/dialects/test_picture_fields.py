"""Every field of a request for pictures is honoured, or refused by name."""

import base64
import io

import pytest

from protocol.imagegen import CompletionRequest
from protocol.options import Options
from runner.app import MAX_BODY_BYTES
from runner.config import DialectName
from runner.dialects.pictures import UNASKED, image_request
from runner.engine.types import ImageRequest
from runner.errors import BadRequest
from tests.fakes_image import DISTILLED, FakePipeline
from tests.fakes_wire import ScriptedLoop, serve
from tests.runner.dialects.serving_pictures import CLASSIC, IMAGEGEN, MLX, ask, served, speaks_pictures
from tests.runner.engine.test_pictures import HOSTILE, png

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
