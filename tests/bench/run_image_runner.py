"""Contestant: this project's runner, a real process spoken to over HTTP as Ollama would."""

import asyncio
import importlib.metadata
import time

import numpy as np

from tests.bench.image_client import ask_picture, spawn_images
from tests.bench.image_measurement import WARMUP_LATENT_SIDE, ImageJob, ImageMeasurement, answer, read_job


async def run(job: ImageJob) -> ImageMeasurement:
    # Not `job.started`: what loads from here on is the child, while this process is the parent.
    started = time.monotonic()
    async with spawn_images(job.pipeline, job.threads) as child:
        load_s = time.monotonic() - started
        await ask_picture(child, job.prompt, 8 * WARMUP_LATENT_SIDE, 1, job.seed)
        stream = await ask_picture(child, job.prompt, job.side, job.steps + 1, job.seed)
        peak = child.peak_memory_bytes() or 0
    np.savez(job.save, picture=stream.picture())
    return ImageMeasurement(
        load_s=load_s,
        step_s=stream.step_s,
        versions={"ollama-mlx-runner": importlib.metadata.version("ollama-mlx-runner")},
        decode_s=stream.decode_s,
        peak_rss_bytes=peak,
    )


if __name__ == "__main__":
    answer(asyncio.run(run(read_job())))
