"""Contestant: the runner's pipeline in this process, driven by nothing but `next`: no server, no engine."""

import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.image import blas
from tests.bench.image_measurement import Floats, ImageJob, answer, measure, read_job

if TYPE_CHECKING:
    from models.image.base import ImageResult, ImageStep
    from models.image.z_image.pipeline import ZImagePipeline


class BarePainter:
    """The contract of models/image/base.py; for single parts, the pipeline's own."""

    def __init__(self, pipeline: "ZImagePipeline", job: ImageJob) -> None:
        self._pipeline, self._job = pipeline, job
        self._units: Iterator[ImageStep | ImageResult] = iter(())

    def denoise(self, latents: Floats, steps: int) -> Iterator[None]:
        from models.image.base import ImageStep, PictureRequest

        side = 8 * latents.shape[-1]
        request = PictureRequest(self._job.prompt, side, side, steps, self._job.seed, latents=latents)
        self._units = self._pipeline.generate(request)
        for unit in self._units:
            if isinstance(unit, ImageStep) and unit.phase == "denoise":
                yield
                if unit.step == unit.total:
                    return

    def decode(self) -> Floats:
        from models.image.base import ImageResult

        (result,) = (unit for unit in self._units if isinstance(unit, ImageResult))
        return result.pixels.astype(np.float32) / 255

    def encode(self, picture: Floats) -> Floats:
        import mlx.core as mx

        latents = self._pipeline._autoencoder.encode(mx.array(picture)[None] * 2 - 1)
        return np.array(latents.transpose(0, 3, 1, 2))

    def velocity(self, latents: Floats, sigma: float) -> Floats:
        import mlx.core as mx

        from models.image.z_image.transformer import Side

        transformer, (height, width) = self._pipeline._transformer, latents.shape[2:]
        known = transformer.condition(mx.array(self._job.caption), height, width)
        (predicted,) = transformer(mx.array(latents)[0].transpose(1, 2, 0), 1.0 - sigma, [Side(known)])
        return -np.array(predicted.transpose(2, 0, 1))


def run(job: ImageJob) -> None:
    report = blas.prepare(threads=job.threads)
    if report.warning is not None:
        raise SystemExit(report.warning)
    from models.checkpoint import open_checkpoint
    from models.image import load_image_pipeline
    from models.image.base import LoadChoices
    from models.image.z_image.pipeline import ZImagePipeline
    from models.mlx_memory import configure

    configure()
    pipeline = load_image_pipeline(open_checkpoint(str(job.pipeline), Path()), LoadChoices(policy="float32"))
    assert isinstance(pipeline, ZImagePipeline)
    load_s = time.monotonic() - job.started
    versions = {"mlx": importlib.metadata.version("mlx"), "BLAS": report.summary}
    answer(measure(job, load_s, BarePainter(pipeline, job), versions))


if __name__ == "__main__":
    run(read_job())
