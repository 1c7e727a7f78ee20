"""Many small pictures on end from one spawned runner: does its memory grow, does it answer while it works?"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from runner.parent import Child
from tests.bench.commands import REPOSITORY
from tests.bench.image_client import ask_picture, spawn_images
from tests.bench.load import PROBE_S, percentile
from tests.bench.serving_report import slope

SIDE, STEPS = 64, 4
PLACES = (REPOSITORY / "models" / "image" / "shapes", REPOSITORY / "tests" / "parity_image" / "z_image")
"""The demo model; else the tiny pipeline of the tests."""
WARMUP_SHARE = 0.25
PROMPTS = ("a red circle on a white ground", "a blue square on a black ground", "a green triangle", "a yellow star")


@dataclass(slots=True)
class SoakResult:
    """What was seen. Times in seconds."""

    pipeline: str = ""
    requests: int = 0
    samples: list[tuple[int, int]] = field(default_factory=list)
    """How many pictures behind the warm-up, and the resident bytes then."""
    request_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    """Of each probe while a picture was made."""
    failure: str = ""

    def figures(self) -> dict[str, float | None]:
        """What is told: slope of memory in KiB a picture, with its uncertainty; percentiles in ms."""
        fitted = slope(self.samples)
        return {
            "slope_kib": None if fitted is None else 1024 * fitted[0],
            "slope_error_kib": None if fitted is None else 1024 * fitted[1],
            "rss_mib": self.samples[-1][1] / 2**20 if self.samples else None,
            "request_p50_s": percentile(self.request_s, 0.5) if self.request_s else None,
            "health_p50_ms": 1000 * percentile(self.health_s, 0.5) if self.health_s else None,
            "health_p99_ms": 1000 * percentile(self.health_s, 0.99) if self.health_s else None,
        }

    def to_json(self) -> dict[str, object]:
        return {
            "pipeline": self.pipeline,
            "requests": self.requests,
            "failure": self.failure,
            "samples": self.samples,
            **self.figures(),
        }


def soak_pipeline() -> Path:
    """The pipeline to make pictures with.

    Raises:
        LookupError: there is none.
    """
    for place in PLACES:
        if (place / "model_index.json").exists():
            return place
    raise LookupError("there is neither the demo model nor the tests' pipeline")


@asynccontextmanager
async def probing(child: Child, taken: list[float]) -> AsyncIterator[None]:
    """Ask for health every 10 ms meanwhile, and note how long each answer took."""

    async def probe() -> None:
        while True:
            begin = time.perf_counter()
            async with child.session.get(f"{child.url}/health") as response:
                await response.read()
            taken.append(time.perf_counter() - begin)
            await asyncio.sleep(PROBE_S)

    task = asyncio.create_task(probe())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled() and isinstance(task.exception(), aiohttp.ClientError):
        raise LookupError(f"a health probe failed: {task.exception()!r}")


async def soak(requests: int, threads: int) -> SoakResult:
    """`requests` pictures one after another, the first quarter of them a warm-up.

    Raises:
        LookupError: the runner refused, broke off, or does not come up.
    """
    pipeline = soak_pipeline()
    result = SoakResult(pipeline=str(pipeline.relative_to(REPOSITORY)), requests=requests)
    warmup = int(requests * WARMUP_SHARE)
    async with spawn_images(pipeline, threads) as child:
        process = psutil.Process(child.pid)
        for number in range(requests):
            waits = result.health_s if number >= warmup else []
            async with probing(child, waits):
                stream = await ask_picture(child, PROMPTS[number % len(PROMPTS)], SIDE, STEPS, number + 1)
            if number >= warmup:
                result.request_s.append(stream.total_s)
                result.samples.append((number - warmup, process.memory_info().rss))
    return result
