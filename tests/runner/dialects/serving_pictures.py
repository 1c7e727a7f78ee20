"""A dialect with a pipeline behind it, on a real socket, and how its answers are read."""

import base64
import io
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image

from models.image.base import ImagePipeline
from runner.config import DialectName
from runner.engine.executor_thread import ExecutorThread
from runner.engine.image import ImageEngine
from runner.engine.loop import EngineLoop
from tests.fakes_wire import serve

IMAGEGEN, CLASSIC, MLX = DialectName.IMAGEGEN, DialectName.CLASSIC, DialectName.MLX


TOTAL = {IMAGEGEN: "total", CLASSIC: "total_steps"}
speaks_pictures = pytest.mark.parametrize("dialect", [IMAGEGEN, CLASSIC], ids=lambda dialect: dialect.value)


@asynccontextmanager
async def served(dialect: DialectName, pipeline: ImagePipeline, **options):
    """A dialect with `pipeline` loaded."""
    thread = ExecutorThread()
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
