"""Asks a spawned runner for pictures, as Ollama's imagegen parent would, and notes when each line came."""

import base64
import io
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from runner.config import DialectName
from runner.parent import Child, ChildError, spawn
from tests.bench.image_measurement import Floats

LINE_BYTES = 16 << 20


@dataclass(slots=True)
class PictureStream:
    """One request and its answer. Times are of `perf_counter`, when a line was in the client's hands."""

    begin: float
    steps: dict[int, float] = field(default_factory=dict)
    """When step k was told to be done."""
    end: float = 0.0
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last line."""

    @property
    def step_s(self) -> list[float]:
        """Between neighbouring steps, so without the first, which has the prompt's encoding before it."""
        return [self.steps[k] - self.steps[k - 1] for k in sorted(self.steps) if k - 1 in self.steps]

    @property
    def decode_s(self) -> float:
        """From the last step to the picture."""
        return self.end - max(self.steps.values())

    @property
    def total_s(self) -> float:
        """From the request to the picture."""
        return self.end - self.begin

    def picture(self) -> Floats:
        """(H, W, 3) in 0 to 1."""
        with Image.open(io.BytesIO(base64.b64decode(self.last["image"]))) as picture:
            return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


@asynccontextmanager
async def spawn_images(model: Path, threads: int) -> AsyncIterator[Child]:
    """A runner that is ready.

    Raises:
        LookupError: it does not come up; the message says why.
    """
    flags = ("--weights=float32", f"--threads={threads}")
    async with spawn(model, dialect=DialectName.IMAGEGEN, flags=flags) as child:
        try:
            await child.wait_ready()
        except ChildError as error:
            raise LookupError(str(error)) from None
        yield child


async def ask_picture(child: Child, prompt: str, side: int, steps: int, seed: int) -> PictureStream:
    """Stream one picture.

    Raises:
        LookupError: the runner refused, broke the stream or sent no picture.
    """
    body = {"prompt": prompt, "width": side, "height": side, "steps": steps, "seed": seed}
    stream, lines = PictureStream(time.perf_counter()), []
    try:
        async with child.session.post(f"{child.url}/completion", json=body, read_bufsize=LINE_BYTES) as response:
            if response.status != 200:
                raise LookupError(f"status {response.status}: {(await response.text()).strip()[:200]}")
            lines = [(time.perf_counter(), line) async for line in response.content]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LookupError(f"the stream broke: {error!r}") from error
    # Only now: the clock is not to pay for reading JSON.
    for moment, line in lines:
        take(stream, moment, json.loads(line))
    if "image" not in stream.last or not stream.steps:
        raise LookupError(f"a stream without a picture; its last line: {str(stream.last)[:200]}")
    return stream


def take(stream: PictureStream, moment: float, said: Mapping[str, Any]) -> None:
    """Note one line. Step 0, if told, is the prompt's encoding; of a step told twice the first counts."""
    if said.get("done"):
        stream.end, stream.last = moment, said
    elif step := said.get("step"):
        stream.steps.setdefault(int(step), moment)
