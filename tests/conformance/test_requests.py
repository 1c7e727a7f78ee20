"""What Go's parents write is understood."""

import json
from pathlib import Path

import pytest

from models.grammar import JSONSchema, OutputFormat
from protocol.ollamarunner import LayersOnDevice, LoadRequest
from runner.config import DialectName
from runner.engine.load import LoadOptions
from runner.engine.types import EngineState, EngineStatus, Failed, ImageRequest, InputImage, SamplingParams, TextRequest
from runner.errors import BadRequest
from tests.fakes_wire import ScriptedLoop, serve

REQUESTS = Path(__file__).parent / "requests"
PROMPT = '<|im_start|>user\nSay "hi" & <b>é\u2028</b><|im_end|>\n'
DEFAULTS = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, typical_p=1.0, repeat_last_n=64, repeat_penalty=1.0)
OFF = SamplingParams(temperature=0, top_k=0, top_p=0, typical_p=0, repeat_last_n=0, repeat_penalty=0)


def sampling(base, **changes):
    fields = {name: getattr(base, name) for name in SamplingParams.__slots__}
    return SamplingParams(**{**fields, **changes})


UNDERSTOOD = {
    "mlx_v0.33_completion": TextRequest(
        PROMPT, DEFAULTS, num_ctx=4096, stop=("<|im_end|>",), logprobs=True, top_logprobs=3, draft=4
    ),
    "mlx_v0.33_greedy": TextRequest(PROMPT, sampling(DEFAULTS, temperature=0.0, seed=0), num_ctx=4096, draft=4),
    "mlx_v0.33_no_options": TextRequest(PROMPT, sampling(OFF, seed=0), num_keep=0),
    "mlx_v0.17_completion": TextRequest(PROMPT, sampling(OFF, temperature=0.8, top_k=40, top_p=0.9), num_keep=0),
    "imagegen_v0.17_completion": TextRequest(
        PROMPT,
        sampling(OFF, temperature=0.800000011920929, top_k=40, top_p=0.8999999761581421, seed=1763804160000000001),
        num_predict=128,
        num_keep=0,
        stop=("</s>",),
    ),
    "classic_v0.24_completion": TextRequest(
        PROMPT,
        sampling(DEFAULTS, repeat_penalty=1.1),
        num_ctx=4096,
        stop=("<|im_end|>",),
        logprobs=True,
        top_logprobs=2,
        shift=True,
        truncate=True,
    ),
    "classic_v0.24_format": TextRequest(
        PROMPT,
        sampling(DEFAULTS, repeat_penalty=1.1),
        num_ctx=4096,
        stop=("<|im_end|>",),
        format=OutputFormat(JSONSchema('{"type":"object"}')),
    ),
    "mlx_v0.33_media": TextRequest(
        "[img-0]", DEFAULTS, num_ctx=4096, stop=("<|im_end|>",), draft=4, images=(InputImage(0, b"\x89PNG"),)
    ),
    "classic_v0.24_images": TextRequest(
        PROMPT,
        sampling(DEFAULTS, repeat_penalty=1.1),
        num_ctx=4096,
        stop=("<|im_end|>",),
        images=(InputImage(0, b"\x89PNG"),),
    ),
}
REFUSED = {"imagegen_v0.32_image": "width"}


async def refuse(request):
    """A script: what was understood is enough."""
    yield Failed(1, BadRequest("enough"))


def dialect_of(name):
    return {"mlx": DialectName.MLX, "imagegen": DialectName.IMAGEGEN, "classic": DialectName.CLASSIC}[
        name.split("_")[0]
    ]


def body_of(name):
    return (REQUESTS / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", UNDERSTOOD)
async def test_a_completion_is_understood(name):
    async with serve(dialect_of(name)) as served:
        headers = {"Content-Type": "application/json"}
        assert (await served.post("/completion", data=body_of(name), headers=headers))[0] == 200
        assert served.loop.requests == [UNDERSTOOD[name]]


@pytest.mark.parametrize("name", REFUSED)
async def test_a_request_for_more_than_text_is_refused_by_name(name):
    async with serve(dialect_of(name)) as served:
        status, reason = await served.post("/completion", data=body_of(name))
        assert status == 501
        assert REFUSED[name] in reason.decode()


async def test_an_image_request_with_all_that_a_parent_may_write_is_understood():
    loop = ScriptedLoop(refuse, status=EngineStatus(state=EngineState.READY, makes_pictures=True))
    async with serve(DialectName.IMAGEGEN, loop) as served:
        await served.post("/completion", data=body_of("imagegen_v0.32_image"))
        picture = ImageRequest("a cat", width=1024, height=1024, steps=9, seed=42, images=(b"\x89PNG",))
        assert loop.requests == [picture]


async def test_the_sequence_of_loads_that_a_parent_goes_through():
    async with serve(DialectName.CLASSIC, ScriptedLoop(status=EngineStatus())) as served:
        for operation in ("fit", "alloc", "commit"):
            status, answer = await served.post("/load", data=body_of(f"classic_v0.24_load_{operation}"))
            assert status == 200
            assert json.loads(answer)["Success"] is True
        assert {options for _, options in served.loader.planned} == {LoadOptions(2, 4096, 512)}
        assert served.loader.built == 1
        assert (await served.post("/load", data=body_of("classic_v0.24_load_close")))[0] == 200


def test_layers_for_a_gpu_are_read():
    body = LoadRequest.from_json(body_of("classic_v0.24_load_fit_gpu"))
    assert body.gpu_layers == (LayersOnDevice(id="0", backend="Metal", layers=(0, 1, 2)),)


def test_every_recorded_request_is_tested():
    tested = {
        *UNDERSTOOD,
        *REFUSED,
        *(f"classic_v0.24_load_{name}" for name in ("fit", "alloc", "commit", "close", "fit_gpu")),
    }
    assert {path.stem for path in REQUESTS.iterdir()} == tested
