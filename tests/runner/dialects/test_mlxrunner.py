import json

import pytest

from runner.config import DialectName
from runner.dialects.mlxrunner import MAX_LINE, parse
from runner.engine.types import EngineState, EngineStatus, Failed, TextRequest, TokenLogprob
from runner.errors import BadRequest, GenerationError, NotReady, PromptTooLong
from tests.fakes_wire import DONE, ScriptedLoop, chunk, serve

MLX = DialectName.MLX


def lines(body):
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


@pytest.mark.parametrize("path", ["/v1/status", "/health"])
async def test_status_tells_context_and_memory(path):
    async with serve(MLX) as served:
        expected = b'{"Status":0,"Progress":100,"ContextLength":8192,"Memory":123}\n'
        assert await served.get(path) == (200, expected)


@pytest.mark.parametrize("state", [EngineState.LAUNCHED, EngineState.LOADING, EngineState.ERROR])
@pytest.mark.parametrize("path", ["/v1/status", "/health", "/v1/models"])
async def test_nothing_is_200_before_the_model_is_loaded(state, path):
    async with serve(MLX, ScriptedLoop(status=EngineStatus(state=state))) as served:
        assert (await served.get(path))[0] == 503


async def test_models_are_there():
    async with serve(MLX) as served:
        expected = (200, b'{"Success":true}\n')
        assert await served.get("/v1/models") == expected
        assert await served.post("/v1/models") == expected
        assert await served.post("/load", json={"Operation": 0}) == expected


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
async def test_text_is_streamed_line_by_line(path):
    async with serve(MLX) as served, served.client.post(path, json={"Prompt": "p"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/jsonl"
        first, second, last = lines(await response.read())
        assert first == {"Content": "Hel", "Done": False, "DoneReason": 0}
        assert second["Content"] == "lo"
        assert last["Done"] is True
        assert last["DoneReason"] == 0
        for go_name, snake_name, value in (
            ("PromptEvalCount", "prompt_eval_count", 7),
            ("PromptEvalDuration", "prompt_eval_duration", 11),
            ("EvalCount", "eval_count", 3),
            ("EvalDuration", "eval_duration", 13),
        ):
            assert last[go_name] == last[snake_name] == value


async def test_log_probabilities_are_written_with_their_alternatives():
    async def script(request):
        yield chunk("a", [TokenLogprob("a", -0.5, (TokenLogprob("a", -0.5), TokenLogprob("b", -2.0)))])
        yield chunk("", [TokenLogprob("", -1.0)])
        yield DONE

    async with serve(MLX, ScriptedLoop(script)) as served:
        body = {"Prompt": "p", "Logprobs": True, "TopLogprobs": 2}
        first, second, _ = lines((await served.post("/v1/completions", json=body))[1])
        top = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -2.0}]
        assert first["Logprobs"] == [{"token": "a", "logprob": -0.5, "top_logprobs": top}]
        assert second == {"Content": "", "Done": False, "DoneReason": 0, "Logprobs": [{"token": "", "logprob": -1.0}]}
        assert (served.loop.requests[0].logprobs, served.loop.requests[0].top_logprobs) == (True, 2)


async def test_no_line_is_longer_than_the_parents_buffer():
    text = "\x01\U0001f600é" * 40_000

    async def script(request):
        yield chunk(text)
        yield DONE

    async with serve(MLX, ScriptedLoop(script)) as served:
        body = (await served.post("/v1/completions", json={"Prompt": "p"}))[1]
        assert all(len(line) < MAX_LINE < 64 * 1024 for line in body.splitlines())
        assert "".join(line["Content"] for line in lines(body)) == text


@pytest.mark.parametrize(
    ("failure", "status"), [(GenerationError("the step failed"), 500), (NotReady("shutting down"), 503)]
)
async def test_a_failure_after_the_first_line_is_an_error_line(failure, status):
    async def script(request):
        yield chunk("a")
        yield Failed(1, failure)

    async def raising(request):
        yield chunk("a")
        raise failure

    for way in (script, raising):
        async with serve(MLX, ScriptedLoop(way)) as served:
            answer = await served.post("/v1/completions", json={"Prompt": "p"})
            assert answer[0] == 200
            assert lines(answer[1])[-1] == {"Error": {"StatusCode": status, "Status": "", "error": str(failure)}}


async def test_a_stream_that_ends_without_a_last_output_still_gets_a_last_line():
    async def script(request):
        yield chunk("a")

    async with serve(MLX, ScriptedLoop(script)) as served:
        assert lines((await served.post("/v1/completions", json={"Prompt": "p"}))[1])[-1]["Error"]["StatusCode"] == 500


async def test_a_refused_prompt_is_a_status_with_plain_text():
    loop = ScriptedLoop()
    loop.refusal = PromptTooLong(9000, 8192)
    async with serve(MLX, loop) as served, served.client.post("/v1/completions", json={"Prompt": "p"}) as response:
        assert response.status == 400
        assert response.content_type == "text/plain"
        expected = "input length (9000 tokens) exceeds the model's maximum context length (8192 tokens)\n"
        assert await response.text() == expected


async def test_tokenize_takes_raw_text_and_adds_bos():
    async with serve(MLX) as served:
        headers = {"Content-Type": "text/plain"}
        assert await served.post("/v1/tokenize", data=b'{"a\xff', headers=headers) == (
            200,
            json.dumps([1, *b'{"a\xef\xbf\xbd'], separators=(",", ":")).encode() + b"\n",
        )
        assert served.loop.tokenized == [('{"a\ufffd', True)]


def test_a_person_without_options_gets_ollamas_defaults():
    assert parse(b'{"Prompt":"p"}') == TextRequest(prompt="p")


def test_an_absent_seed_is_zero_for_new_parents_and_random_for_those_that_never_send_one():
    assert parse(b'{"Prompt":"p","Options":{"num_ctx":9}}').sampling.seed == 0
    assert parse(b'{"prompt":"p","options":{"temperature":1}}').sampling.seed is None
    assert parse(b'{"prompt":"p","options":{"seed":3}}').sampling.seed == 3
    assert parse(b'{"Prompt":"p","Options":{"seed":-1}}').sampling.seed is None


@pytest.mark.parametrize("format_", [None, ""])
def test_an_empty_format_is_none(format_):
    assert parse(json.dumps({"Prompt": "p", "Format": format_, "Grammar": ""}).encode()) == TextRequest(prompt="p")


@pytest.mark.parametrize("body", [b"[]", b"", b'{"Prompt":1}', b'{"Options":{"num_predict":1.5}}', b'{"Prompt":NaN}'])
def test_a_wrong_body_is_a_bad_request(body):
    with pytest.raises(BadRequest, match="bad request: "):
        parse(body)


async def test_every_hint_is_accepted():
    hints = {"num_batch": 1, "num_thread": 9, "num_gpu": 0, "main_gpu": 3, "use_mmap": False}
    async with serve(MLX) as served:
        assert (await served.post("/v1/completions", json={"Prompt": "p", "Options": hints}))[0] == 200
