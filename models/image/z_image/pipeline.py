"""Z-Image from prompt, and perhaps a picture to begin with, to a picture.

Source: diffusers' ZImagePipeline and ZImageImg2ImgPipeline, v0.42.1. One difference: a picture to begin with is encoded
to the mean of the autoencoder's distribution, not to a sample of it.
"""

from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np
import PIL.Image
import PIL.ImageOps

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.host import wait
from models.image.autoencoder import Autoencoder, read_autoencoder_config, to_pixels
from models.image.base import Abilities, Family, ImageResult, ImageStep, LoadChoices, PictureRequest, Pixels
from models.image.loading import component_config, component_spans, load_component
from models.image.preview import Preview
from models.image.schedulers import FlowMatchEuler, Sigmas, first_step, read_scheduler
from models.image.step_cache import StepCache
from models.image.text_encoder import MAX_TOKENS, Reading, TextEncoder, unused_tensors
from models.image.tiling import Tiling
from models.image.z_image.config import PATCH, read_abilities, read_transformer_config
from models.image.z_image.transformer import Side, Transformer

READING = Reading(hidden_states=(-2,), enable_thinking=True)

_COMPONENTS = ("text_encoder", "transformer", "vae")


class ZImagePipeline:
    """See `ImagePipeline`. Latents are (h, w, C) between the steps."""

    def __init__(
        self,
        abilities: Abilities,
        text_encoder: TextEncoder,
        transformer: Transformer,
        autoencoder: Autoencoder,
        scheduler: FlowMatchEuler,
    ) -> None:
        self._abilities = abilities
        self._text_encoder = text_encoder
        self._transformer = transformer
        self._autoencoder = autoencoder
        self._scheduler = scheduler
        self._preview = Preview(autoencoder)

    @property
    def abilities(self) -> Abilities:
        """See `ImagePipeline`."""
        return self._abilities

    def default_size(self, images: Sequence[Pixels]) -> tuple[int, int]:
        """The picture's own size, shrunk to no more pixels than the default size has. See `ImagePipeline`."""
        own = self._abilities
        if not images:
            return own.width, own.height
        height, width = images[0].shape[:2]
        shrink = min(1.0, (own.width * own.height / (width * height)) ** 0.5)
        multiple = own.size_multiple
        width, height = (max(multiple, int(side * shrink) // multiple * multiple) for side in (width, height))
        return width, height

    def working_bytes(self, request: PictureRequest) -> int:
        """See `ImagePipeline`."""
        height, width = self._latent_size(request)
        latents = 4 * height * width * self._transformer.config.channels
        sides = 2 if self._is_guided(request) else 1
        captions = 4 * sides * MAX_TOKENS * self._transformer.config.dim
        return max(
            self._text_encoder.working_bytes,
            self._transformer.working_bytes(height, width, MAX_TOKENS) + captions + 3 * latents,
            self._autoencoder.working_bytes(request.height, request.width) + latents,
        )

    def generate(self, request: PictureRequest) -> Iterator[ImageStep | ImageResult]:
        """See `ImagePipeline`. Raises TokenizerError."""
        latents, steps, computed = yield from self._denoise(request)
        for picture in self._autoencoder.decode_steps(latents[None]):
            if picture is None:
                yield ImageStep("decode", steps, steps)
            else:
                yield ImageResult(to_pixels(picture), computed)

    def _denoise(self, request: PictureRequest) -> Generator[ImageStep, None, tuple[mx.array, int, int]]:
        """From noise, or a picture with noise, to clean latents (h, w, C); how many steps, and of them computed."""
        skipped = first_step(request.steps, request.strength) if request.images else 0
        steps = request.steps - skipped
        embeddings = self._text_encoder.encode(request.prompt, *[request.negative_prompt] * self._is_guided(request))
        yield ImageStep("encode", 0, steps)
        sigmas = self._sigmas(request)[skipped:]
        latents = self._noise(request)
        for image in request.images:
            latents = sigmas[0] * latents + (1.0 - sigmas[0]) * self._encoded(image, request)
            wait([latents])
            yield ImageStep("encode", 0, steps)
        sides = [self._side(each, request, steps) for each in embeddings]
        for step, (sigma, following) in enumerate(pairwise(sigmas), start=1):
            velocity = self._velocity(latents, sigma, sides, request.guidance)
            clean = latents - sigma * velocity
            latents = latents + (following - sigma) * velocity
            wait([latents])
            is_shown = request.preview_every > 0 and step % request.preview_every == 0
            yield ImageStep("denoise", step, steps, self._preview(clean[None]) if is_shown else None)
        cache = sides[0].cache
        return latents, steps, steps if cache is None else cache.computed

    def _is_guided(self, request: PictureRequest) -> bool:
        return request.guidance > self._abilities.guidance_above

    def _velocity(self, latents: mx.array, sigma: float, sides: Sequence[Side], guidance: float) -> mx.array:
        """The predicted noise - picture, guided where there is something to be guided away from. Shape: (h, w, C)."""
        # The model's time runs from noise to picture, and so does what it predicts.
        predictions = self._transformer(latents, 1.0 - sigma, sides)
        wanted, *unwanted = (prediction.astype(mx.float32) for prediction in predictions)
        return -(wanted + guidance * (wanted - unwanted[0])) if unwanted else -wanted

    def _side(self, embeddings: mx.array, request: PictureRequest, steps: int) -> Side:
        height, width = self._latent_size(request)
        known = self._transformer.condition(embeddings, height, width)
        wait([known.caption, known.image_rotations, known.rotations])
        return Side(known, StepCache(request.step_cache, steps) if request.step_cache > 0 else None)

    def _sigmas(self, request: PictureRequest) -> Sigmas:
        height, width = self._latent_size(request)
        return self._scheduler.sigmas(request.steps, self._scheduler.mu(height * width // PATCH**2))

    def _noise(self, request: PictureRequest) -> mx.array:
        """Shape: (h, w, C)."""
        shape = (1, self._transformer.config.channels, *self._latent_size(request))
        if request.latents is None:
            noise = mx.random.normal(shape, key=mx.random.key(request.seed))
        else:
            noise = mx.array(request.latents)
        return noise[0].transpose(1, 2, 0)

    def _encoded(self, image: Pixels, request: PictureRequest) -> mx.array:
        """A picture's latents; what does not fit the wanted shape is cut from its sides. Shape: (h, w, C)."""
        size = (request.width, request.height)
        fitted = PIL.ImageOps.fit(PIL.Image.fromarray(image), size, PIL.Image.Resampling.LANCZOS)
        pixels = mx.array(np.asarray(fitted, dtype=np.float32) / 127.5 - 1.0)
        return self._autoencoder.encode(pixels[None])[0]

    def _latent_size(self, request: PictureRequest) -> tuple[int, int]:
        """Height and width in latents."""
        downscale = self._abilities.size_multiple // PATCH
        return request.height // downscale, request.width // downscale


def load_pipeline(checkpoint: Checkpoint, choices: LoadChoices) -> ZImagePipeline:
    """Build it and load its weights. Thread: the MLX thread. Raises ModelError."""
    abilities = read_abilities(checkpoint)
    scheduler = read_scheduler(component_config(checkpoint, "scheduler", "scheduler_config.json"))
    transformer = Transformer(read_transformer_config(component_config(checkpoint, "transformer")))
    autoencoder = Autoencoder(read_autoencoder_config(component_config(checkpoint, "vae")), Tiling(choices.vae_tile))
    spans = component_spans(checkpoint, _COMPONENTS)
    text_encoder = TextEncoder(checkpoint, READING, choices, spans[0])
    for key, wanted, made in (
        ("cap_feat_dim", transformer.config.caption_dim, text_encoder.width),
        ("in_channels", transformer.config.channels, autoencoder.config.latent_channels),
    ):
        if wanted != made:
            raise CheckpointError(
                f"{key} is {wanted}, and what makes them makes {made}", file="transformer/config.json"
            )
    load_component(transformer, checkpoint, "transformer", choices, spans[1])
    transformer.prepare()
    load_component(autoencoder, checkpoint, "vae", choices, spans[2])
    autoencoder.prepare()
    return ZImagePipeline(abilities, text_encoder, transformer, autoencoder, scheduler)


FAMILY = Family(
    class_names=("ZImagePipeline",),
    components=_COMPONENTS,
    load=load_pipeline,
    abilities=read_abilities,
    unused=lambda checkpoint: unused_tensors(checkpoint, READING),
)
