"""Contestant: diffusers' ZImagePipeline on torch's CPU kernels, in float32, as its users call it."""

import importlib.metadata
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from diffusers.utils import logging

from tests.bench.image_measurement import Floats, ImageJob, answer, measure, read_job


class DiffusersPainter:
    """What the pipeline's call does between its steps' callbacks, from `encode_prompt` on."""

    def __init__(self, pipeline: Any, job: ImageJob) -> None:
        self._pipeline = pipeline
        self._caption = [torch.from_numpy(job.caption)]
        self._latents = torch.empty(0)

    def denoise(self, latents: Floats, steps: int) -> Iterator[None]:
        scheduler, transformer = self._pipeline.scheduler, self._pipeline.transformer
        self._latents = torch.from_numpy(latents)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
        scheduler.set_begin_index(0)
        for moment in scheduler.timesteps:
            with torch.inference_mode():
                timestep = (1000 - moment.expand(1)) / 1000
                said = transformer([self._latents[0].unsqueeze(1)], timestep, self._caption, return_dict=False)[0]
                velocity = -torch.stack(said).squeeze(2)
                self._latents = scheduler.step(velocity, moment, self._latents, return_dict=False)[0]
            yield

    def decode(self) -> Floats:
        vae = self._pipeline.vae
        with torch.inference_mode():
            scaled = self._latents / vae.config.scaling_factor + vae.config.shift_factor
            picture = vae.decode(scaled, return_dict=False)[0]
            return self._pipeline.image_processor.postprocess(picture, output_type="np")[0]

    def encode(self, picture: Floats) -> Floats:
        vae = self._pipeline.vae
        with torch.inference_mode():
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1
            mean = vae.encode(pixels.contiguous()).latent_dist.mode()
            return ((mean - vae.config.shift_factor) * vae.config.scaling_factor).numpy()

    def velocity(self, latents: Floats, sigma: float) -> Floats:
        with torch.inference_mode():
            noise = torch.from_numpy(latents)[0].unsqueeze(1)
            said = self._pipeline.transformer([noise], torch.tensor([1 - sigma]), self._caption, return_dict=False)[0]
            return -said[0][:, 0].numpy()


def run(job: ImageJob) -> None:
    torch.set_num_threads(job.threads)
    logging.disable_progress_bar()
    pipeline = ZImagePipeline.from_pretrained(job.pipeline, dtype=torch.float32)
    load_s = time.monotonic() - job.started
    versions = {name: importlib.metadata.version(name) for name in ("diffusers", "torch")}
    answer(measure(job, load_s, DiffusersPainter(pipeline, job), versions))


if __name__ == "__main__":
    run(read_job())
