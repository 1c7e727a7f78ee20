"""Contestant: mflux's Z-Image transformer and autoencoder, held in float32. With --blas, that library comes before MLX.

mflux builds its pipeline for the published model's sizes only, so its parts are built here at the checkpoint's, and its
own loader fills them. `set_float32` is its `--float32`; FULL_PRECISION is how it decodes without bfloat16.
"""

import ctypes
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from tests.bench.image_measurement import Floats, ImageJob, answer, flow_sigmas, measure, read_job

TRANSFORMER_KEYS = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim")
TRANSFORMER_KEYS += ("rope_theta", "t_scale", "axes_dims", "axes_lens")


class MfluxPainter:
    """What mflux's `ZImage.generate_image` does with its parts, not compiled: compiling cost more than it gained."""

    def __init__(self, transformer: Any, vae: Any, job: ImageJob) -> None:
        import mlx.core as mx

        self._mx, self._transformer, self._vae = mx, transformer, vae
        self._caption = mx.array(job.caption)
        self._latents = mx.zeros((1,))

    def _forward(self, latents: Any, sigma: float) -> Any:
        mx = self._mx
        timestep = mx.array([1.0 - sigma])
        return self._transformer(x=latents, timestep=timestep, sigmas=timestep, cap_feats=self._caption)

    def denoise(self, latents: Floats, steps: int) -> Iterator[None]:
        mx, sigmas = self._mx, flow_sigmas(steps)
        self._latents = mx.array(latents)[0][:, None]
        for sigma, following in pairwise(sigmas):
            self._latents = self._latents + (following - sigma) * self._forward(self._latents, sigma)
            mx.eval(self._latents)
            yield

    def decode(self) -> Floats:
        picture = np.array(self._vae.decode(self._latents[None, :, 0]))[0, :, 0]
        return np.clip(picture.transpose(1, 2, 0) / 2 + 0.5, 0, 1)

    def encode(self, picture: Floats) -> Floats:
        pixels = self._mx.array(np.ascontiguousarray(picture.transpose(2, 0, 1)[None] * 2 - 1))
        return np.array(self._vae.encode(pixels).astype(self._mx.float32))[:, :, 0]

    def velocity(self, latents: Floats, sigma: float) -> Floats:
        return np.array(self._forward(self._mx.array(latents)[0][:, None], sigma))[:, 0]


def load(job: ImageJob) -> tuple[Any, Any]:
    """The transformer and the autoencoder, weights read by mflux's own loader and kept as float32."""
    import mlx.core as mx
    from mflux.models.common.vae.block_decoder import VAEBlockDecoder
    from mflux.models.common.weights.loading.weight_definition import ComponentDefinition
    from mflux.models.common.weights.loading.weight_loader import WeightLoader
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
    from mflux.models.z_image.model.z_image_vae.vae import VAE
    from mflux.models.z_image.weights.z_image_weight_mapping import ZImageWeightMapping

    config = json.loads((job.pipeline / "transformer" / "config.json").read_text())
    transformer, vae = ZImageTransformer(**{key: config[key] for key in TRANSFORMER_KEYS}), VAE()
    mappings = (("transformer", transformer, ZImageWeightMapping.get_transformer_mapping),)
    if job.autoencoder:
        mappings += (("vae", vae, ZImageWeightMapping.get_vae_mapping),)
    for name, module, mapping in mappings:
        layers, blocks = (config["n_layers"], None) if name == "transformer" else (None, 4)
        part = ComponentDefinition(name, name, mapping, num_blocks=blocks, num_layers=layers, precision=mx.float32)
        module.update(WeightLoader.load_single_local(part, job.pipeline).components[name])
        mx.eval(module.parameters())
    transformer.set_float32(True)
    vae.decode_mode = VAEBlockDecoder.FULL_PRECISION
    return transformer, vae


def run(job: ImageJob) -> None:
    if job.blas is not None:
        ctypes.CDLL(str(job.blas), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
    transformer, vae = load(job)
    load_s = time.monotonic() - job.started
    versions = {name: importlib.metadata.version(name) for name in ("mflux", "mlx")}
    answer(measure(job, load_s, MfluxPainter(transformer, vae, job), versions))


if __name__ == "__main__":
    run(read_job())
