"""What this runner writes is what Go's structs were seen to decode.

`python tests/conformance/test_answers.py` writes the answers anew.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.device import Device
from models.image.base import PictureRequest
from protocol.gojson import write_line
from protocol.ollamarunner import HealthResponse, LoadResponse
from runner.dialects.imagegen import ImagegenEncoder, ImagegenPictureEncoder
from runner.dialects.mlxrunner import MLXEncoder
from runner.dialects.ollamarunner import OllamaRunnerEncoder, devices, memory_table
from runner.dialects.ollamarunner_pictures import OllamaRunnerPictureEncoder
from runner.engine.load import DeviceMemory, MemoryPlan
from runner.engine.pictures import EncodedPicture
from runner.engine.types import (
    FinishReason,
    ImageProgress,
    ImageQueued,
    Picture,
    TextChunk,
    TextDone,
    TokenLogprob,
)
from runner.errors import GenerationError

ANSWERS = Path(__file__).parent / "answers"
LOGPROBS = (TokenLogprob("Hé", -0.25, (TokenLogprob("Hé", -0.25), TokenLogprob("\ufffd", float("-inf")))),)
DONE = TextDone(
    id=1, reason=FinishReason.LENGTH, prompt_tokens=7, cached_tokens=2, prompt_ns=10**10, eval_tokens=3, eval_ns=10**12
)
PLAN = MemoryPlan(
    input_weights=2**33, device=DeviceMemory("0", "cpu", "A CPU", (2**31, 2**31, 5), (2**20, 2**20), 7), available=2**40
)
GPU = Device("metal", "Apple M2", 2**34, 2**33)


def stream(encoder):
    lines = [
        *encoder.chunk(TextChunk(1, 'Hé <b>"\u2028\n\U0001f600', LOGPROBS)),
        *encoder.chunk(TextChunk(1, "", LOGPROBS)),
        *encoder.done(DONE),
        encoder.error(GenerationError("the step failed")),
    ]
    return b"".join(lines)


PICTURE = Picture(
    pixels=np.zeros((48, 64, 3), np.uint8),
    request=PictureRequest("a hen", 64, 48, steps=9, seed=2**62),
    noised=False,
    model="m",
    format="png",
    index=1,
    steps_computed=8,
    wait_ns=10**9,
    encode_ns=10**10,
    denoise_ns=10**11,
    decode_ns=10**12,
)
FILE = EncodedPicture(b"\x89PNG\r\n\x1a\n\xff", "png")


def picture_stream(encoder):
    lines = [
        *encoder.queued(ImageQueued(1, 2)),
        *encoder.progress(ImageProgress(1, 1, 9), b""),
        *encoder.progress(ImageProgress(1, 9, 9, 1), b"\xff\xd8"),
        encoder.picture(replace(PICTURE, index=0), FILE, last=False),
        encoder.picture(PICTURE, FILE, last=True),
        encoder.error(GenerationError("the step failed")),
    ]
    return b"".join(lines)


def answers():
    gpu_plan = replace(PLAN, device=replace(PLAN.device, backend="metal", name="Apple M2"))
    return {
        "imagegen": stream(ImagegenEncoder()),
        "mlx": stream(MLXEncoder()),
        "classic": stream(OllamaRunnerEncoder()),
        "imagegen_picture": picture_stream(ImagegenPictureEncoder()),
        "classic_picture": picture_stream(OllamaRunnerPictureEncoder()),
        "classic_load": b"".join(
            answer.to_line()
            for answer in (
                LoadResponse(success=True, memory=memory_table(PLAN)),
                LoadResponse(success=True, memory=memory_table(gpu_plan)),
                LoadResponse(),
            )
        ),
        "classic_info": write_line([entry.to_value() for entry in devices(GPU)]) + write_line([]),
        "classic_health": HealthResponse(status=3, progress=0.5).to_line()
        + HealthResponse(status=5, error="e").to_line(),
    }


@pytest.mark.parametrize("name", answers())
def test_an_answer_is_the_one_that_go_decodes(name):
    assert answers()[name] == (ANSWERS / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("parent", ["mlx.v0.17", "mlx.v0.33", "mlx.v0.34", "imagegen.v0.17", "classic.v0.24"])
def test_every_parent_understands_text_and_counts(parent):
    lines = [json.loads(line) for line in (ANSWERS / f"{parent}.jsonl").read_text(encoding="utf-8").splitlines()]
    folded = [{key.replace("_", "").lower(): value for key, value in line.items()} for line in lines]
    assert folded[0]["content"] == 'Hé <b>"\u2028\n\U0001f600'
    done = next(line for line in folded if line["done"] and line.get("promptevalcount"))
    counts = ("promptevalcount", "promptevalduration", "evalcount", "evalduration")
    assert [done[name] for name in counts] == [7, 10**10, 3, 10**12]


@pytest.mark.parametrize("parent", ["imagegen_picture.v0.32.5", "classic_picture.v0.24"])
def test_every_parent_understands_steps_and_pictures_and_ignores_what_is_added(parent):
    lines = [json.loads(line) for line in (ANSWERS / f"{parent}.jsonl").read_text(encoding="utf-8").splitlines()]
    queued, first, second, made, done = lines[:5]
    assert (queued.get("image"), queued.get("step"), queued["done"]) == (None, None, False)
    assert [(line["step"], line.get("total", line.get("total_steps"))) for line in (first, second)] == [(1, 9), (9, 9)]
    assert [(line["image"], line["done"]) for line in (made, done)] == [("iVBORw0KGgr/", False), ("iVBORw0KGgr/", True)]
    assert (done["eval_count"], done["eval_duration"]) == (8, 10**11)


if __name__ == "__main__":
    for file, data in answers().items():
        (ANSWERS / f"{file}.jsonl").write_bytes(data)
