"""What real Ollama servers were seen to send is understood, to the byte."""

import json
from pathlib import Path

import pytest

from models.grammar import JSONSchema, OutputFormat
from runner.config import DialectName
from runner.engine.types import (
    EngineState,
    EngineStatus,
    Failed,
    ImageRequest,
    InputImage,
    SamplingParams,
    TextRequest,
)
from runner.errors import BadRequest
from tests.fakes_image import FakePipeline
from tests.fakes_wire import ScriptedLoop, serve
from tests.runner.dialects.serving_pictures import served as served_pipeline

RECORDED = Path(__file__).parent / "recorded"
CHAT = "<|im_start|>{}\n{}<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"
HI = CHAT.format("user", 'Say "hi" & <b>é\u2028</b>') + ASSISTANT
FOX = CHAT.format("user", "the fox") + ASSISTANT
BEGUN = InputImage(0, b"\x89PNG\r\n\x1a\n")
ANY_OBJECT = JSONSchema('{"type":"object"}')
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
TOOLS = f"<tools>{json.dumps([TOOL], separators=(',', ':'))}</tools>"


def sampling(repeat_penalty, **changes):
    """What a parent that was asked for nothing sends, but for `changes`."""
    defaults = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "typical_p": 1, "repeat_last_n": 64, "seed": None}
    return SamplingParams(**{**defaults, "repeat_penalty": repeat_penalty, **changes})


CHOSEN = {
    "temperature": 0.5,
    "seed": 0,
    "top_k": 5,
    "top_p": 0.7,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repeat_last_n": -1,
}
CHAT_REQUEST = TextRequest(
    CHAT.format("system", "be") + FOX,
    sampling(1.3, **CHOSEN),
    num_predict=4,
    num_ctx=96,
    stop=("zz", "\n\n"),
    logprobs=True,
    top_logprobs=2,
)
UNDERSTOOD = {
    "mlx_v0.32.5_generate": TextRequest(HI, sampling(1.1, temperature=0), num_predict=8, num_ctx=4096),
    "mlx_v0.32.5_chat": CHAT_REQUEST,
    "mlx_v0.34.4_generate": TextRequest(HI, sampling(1.0, temperature=0), num_predict=8, num_ctx=4096),
    "mlx_v0.34.4_chat": CHAT_REQUEST,
    "mlx_v0.34.4_raw": TextRequest("raw", sampling(1.0), num_predict=2, num_ctx=4096),
    "mlx_v0.34.4_openai": TextRequest(FOX, sampling(1.0, temperature=1, top_p=1), num_predict=5, num_ctx=4096),
    "mlx_v0.34.4_tools": TextRequest(
        CHAT.format("system", TOOLS) + CHAT.format("user", "fox") + ASSISTANT,
        sampling(1.0),
        num_predict=3,
        num_ctx=4096,
    ),
    "mlx_v0.34.4_format": TextRequest(
        FOX, sampling(1.0, temperature=0), num_predict=8, num_ctx=4096, format=OutputFormat(ANY_OBJECT)
    ),
    "mlx_v0.34.4_thinking_format": TextRequest(
        CHAT.format("user", "fox") + ASSISTANT + "<think>",
        sampling(1.0),
        num_predict=3,
        num_ctx=4096,
        format=OutputFormat(ANY_OBJECT, ("</think>",)),
    ),
    "mlx_v0.34.4_picture": TextRequest(
        CHAT.format("user", "[img-0]fox") + ASSISTANT, sampling(1.0), num_predict=3, num_ctx=4096, images=(BEGUN,)
    ),
}
REFUSED = {
    "imagegen_v0.32.5_generations": "width",
    "imagegen_v0.32.5_generate": "width",
}
PICTURES = {
    "imagegen_v0.32.5_generations": ImageRequest("a fox & <hen>", width=256, height=128, seed=1795344197876702624),
    "imagegen_v0.32.5_generations_seed": ImageRequest("fox", seed=7),
    "imagegen_v0.32.5_edits": ImageRequest("add a hat", seed=1795344197941506816, images=(b"\x89PNG\r\n\x1a\n",)),
    "imagegen_v0.32.5_generate": ImageRequest("fox", width=256, height=128, steps=3, seed=7),
}
# An image without a size is a request like one for text; what the loaded model is decides.
SIZELESS = {
    "imagegen_v0.32.5_generations_seed": ("fox", 7),
    "imagegen_v0.32.5_edits": ("[img-0]add a hat", 1795344197941506816),
}
TOKENIZED = ("mlx_v0.32.5_tokenize", "mlx_v0.34.4_tokenize")


async def refuse(request):
    """A script: what was understood is enough."""
    yield Failed(1, BadRequest("enough"))


def dialect_of(name):
    return DialectName(name.split("_")[0])


def body_of(name):
    return next(RECORDED.glob(f"{name}.*")).read_bytes()


@pytest.mark.parametrize("name", UNDERSTOOD)
async def test_a_completion_is_understood(name):
    async with serve(dialect_of(name)) as served:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        assert (await served.post("/completion", data=body_of(name), headers=headers))[0] == 200
        assert served.loop.requests == [UNDERSTOOD[name]]


@pytest.mark.parametrize("name", REFUSED)
async def test_a_request_for_more_than_text_is_refused_by_name(name):
    async with serve(dialect_of(name)) as served:
        status, reason = await served.post("/completion", data=body_of(name))
        assert status == 501
        assert REFUSED[name] in reason.decode()


@pytest.mark.parametrize("name", PICTURES)
async def test_a_request_for_a_picture_is_understood_where_the_model_makes_pictures(name):
    loop = ScriptedLoop(refuse, status=EngineStatus(state=EngineState.READY, makes_pictures=True))
    async with serve(dialect_of(name), loop) as served:
        await served.post("/completion", data=body_of(name))
        assert loop.requests == [PICTURES[name]]


@pytest.mark.parametrize("name", PICTURES)
async def test_a_request_for_a_picture_runs(name):
    async with served_pipeline(dialect_of(name), FakePipeline()) as served:
        status, body = await served.post("/completion", data=body_of(name))
        if PICTURES[name].images:
            # The recorded picture is no more than the beginning of one.
            assert (status, body) == (400, b"images[0] is not a picture in PNG, JPEG, WebP or GIF format\n")
            return
        assert status == 200
        *steps, last = [json.loads(line) for line in body.splitlines()]
        assert {(line["total"], line["done"]) for line in steps} == {(PICTURES[name].steps or 4, False)}
        assert (last["done"], last["seed"]) == (True, PICTURES[name].seed)
        assert last["image"].startswith("iVBORw0KGgo")


@pytest.mark.parametrize("name", SIZELESS)
async def test_an_image_request_without_a_size_keeps_its_seed(name):
    async with serve(dialect_of(name)) as served:
        assert (await served.post("/completion", data=body_of(name)))[0] == 200
        (request,) = served.loop.requests
        assert (request.prompt, request.sampling.seed) == SIZELESS[name]


@pytest.mark.parametrize("name", TOKENIZED)
async def test_the_prompt_and_answer_that_a_parent_counts_are_tokenised_with_bos(name):
    async with serve(dialect_of(name)) as served:
        status, answer = await served.post("/v1/tokenize", data=body_of(name), headers={"Content-Type": "text/plain"})
        assert status == 200
        assert served.loop.tokenized == [(body_of(name).decode(), True)]
        assert json.loads(answer)[0] == 1


def test_every_recorded_body_is_tested():
    assert {path.stem for path in RECORDED.iterdir()} == {*UNDERSTOOD, *REFUSED, *SIZELESS, *TOKENIZED}
