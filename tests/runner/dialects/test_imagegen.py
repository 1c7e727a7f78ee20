import json

import pytest

from runner.config import DialectName
from runner.engine.types import EngineState, EngineStatus, Failed, FinishReason
from runner.errors import GenerationError
from tests.fakes_wire import DONE, ScriptedLoop, chunk, serve

IMAGEGEN = DialectName.IMAGEGEN


def lines(body):
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


async def test_health_is_ok_when_the_model_is_loaded():
    async with serve(IMAGEGEN) as served:
        assert await served.get("/health") == (200, b'{"status":"ok"}\n')


@pytest.mark.parametrize("state", [EngineState.LAUNCHED, EngineState.LOADING, EngineState.ERROR])
async def test_health_is_never_200_before_the_model_is_loaded(state):
    async with serve(IMAGEGEN, ScriptedLoop(status=EngineStatus(state=state))) as served:
        assert (await served.get("/health"))[0] == 503


async def test_text_is_streamed_line_by_line():
    async with serve(IMAGEGEN) as served, served.client.post("/completion", json={"prompt": "p"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/x-ndjson"
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert lines(await response.read()) == [
            {"content": "Hel", "done": False},
            {"content": "lo", "done": False},
            {
                "done": True,
                "stop_reason": "stop",
                "prompt_eval_count": 7,
                "prompt_eval_duration": 11,
                "eval_count": 3,
                "eval_duration": 13,
            },
        ]


async def test_the_length_reason_is_a_number_and_a_word():
    async def script(request):
        yield type(DONE)(1, FinishReason.LENGTH, 1, 0, 1, 1, 1)

    async with serve(IMAGEGEN, ScriptedLoop(script)) as served:
        (last,) = lines((await served.post("/completion", json={"prompt": "p"}))[1])
        assert (last["done_reason"], last["stop_reason"]) == (1, "length")


async def test_a_failure_after_the_first_line_is_a_done_line_with_the_reason():
    async def script(request):
        yield chunk("a")
        yield Failed(1, GenerationError("the step failed"))

    async with serve(IMAGEGEN, ScriptedLoop(script)) as served:
        status, body = await served.post("/completion", json={"prompt": "p"})
        assert status == 200
        assert lines(body)[-1] == {"content": "error: the step failed", "done": True}


async def test_log_probabilities_have_no_place_and_lines_without_content_are_not_written():
    async def script(request):
        yield chunk("")
        yield DONE

    async with serve(IMAGEGEN, ScriptedLoop(script)) as served:
        assert len(lines((await served.post("/completion", json={"prompt": "p"}))[1])) == 1


@pytest.mark.parametrize(
    ("body", "seed"),
    [
        ({"prompt": "p", "seed": 7}, 7),
        ({"prompt": "p", "seed": 0}, None),
        ({"prompt": "p", "seed": -3}, None),
        ({"prompt": "p"}, None),
        ({"prompt": "p", "options": {}}, None),
        ({"prompt": "p", "options": {"seed": 5}}, 5),
        ({"prompt": "p", "seed": 7, "options": {"seed": 5}}, 7),
    ],
)
async def test_the_seed(body, seed):
    async with serve(IMAGEGEN) as served:
        await served.post("/completion", json=body)
        assert served.loop.requests[0].sampling.seed == seed


@pytest.mark.parametrize(("field", "value"), [("width", 64), ("height", 64), ("steps", 4)])
async def test_image_fields_are_refused_by_name(field, value):
    async with serve(IMAGEGEN) as served:
        status, body = await served.post("/completion", json={"prompt": "p", field: value})
        assert status == 501
        assert field in body.decode()
        assert served.loop.requests == []


async def test_tokenize_adds_no_bos():
    async with serve(IMAGEGEN) as served:
        assert await served.post("/tokenize", json={"content": "ab"}) == (200, b'{"tokens":[97,98]}\n')
        assert served.loop.tokenized == [("ab", False)]


async def test_tokenizing_nothing_is_an_empty_list():
    async with serve(IMAGEGEN) as served:
        assert await served.post("/tokenize", json={}) == (200, b'{"tokens":[]}\n')
