"""FLUX.2 klein from prompt and reference pictures to a picture.

Source: diffusers' Flux2KleinPipeline, v0.42.1, and for the first size Ollama's x/imagegen at v0.32.5.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.host import wait
from models.image.autoencoder import read_autoencoder_config, to_pixels
from models.image.base import (
    Abilities,
    Family,
    ImageResult,
    ImageStep,
    LoadChoices,
    PictureRequest,
    Pixels,
)
from models.image.flux2.autoencoder import PATCH, Flux2Autoencoder, build_autoencoder
from models.image.flux2.blocks import Conditions
from models.image.flux2.config import is_distilled, transformer_config
from models.image.flux2.references import MAX_REFERENCES, check_references, prepare_reference, seen_size
from models.image.flux2.transformer import Denoiser, Grid, Transformer
from models.image.loading import component_config, component_spans, load_component
from models.image.preview import Preview
from models.image.schedulers import FlowMatchEuler, read_scheduler
from models.image.step_cache import StepCache
from models.image.text_encoder import MAX_TOKENS, Reading, TextEncoder, unused_tensors
from models.image.tiling import Tiling

READING = Reading(hidden_states=(9, 18, 27), enable_thinking=False, padded=True)

_DISTILLED_STEPS, _BASE_STEPS, _BASE_GUIDANCE = 4, 50, 4.0
_DEFAULT_SIDE_LATENTS = 128
_COMPONENTS = ("text_encoder", "transformer", "vae")
_UNUSED = {"vae": ("bn.num_batches_tracked",)}
"""What torch's batch norm counted in training."""


def empirical_mu(tokens: int, steps: int) -> float:
    """How far the noise levels are shifted, by the picture's tokens and the number of steps.

    Two lines, for 10 and for 200 steps; between and beyond them it is linear in the steps. Above 4300 tokens the second
    counts alone.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return at_200 + slope * (steps - 200)


@dataclass(frozen=True, slots=True)
class _Side:
    """What the steps share of the passes with one prompt: the one wanted, or the one to be guided away from."""

    conditions: Conditions
    cache: StepCache | None


class Flux2KleinPipeline:
    """See `ImagePipeline`."""

    def __init__(
        self,
        abilities: Abilities,
        text_encoder: TextEncoder,
        transformer: Denoiser,
        autoencoder: Flux2Autoencoder,
        scheduler: FlowMatchEuler,
    ) -> None:
        self._abilities = abilities
        self._multiple = abilities.size_multiple
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
        """The size of what is seen of the first reference picture. See `ImagePipeline`."""
        check_references(images)
        if not images:
            return self._abilities.width, self._abilities.height
        height, width = images[0].shape[:2]
        return seen_size(width, height, self._multiple)

    def working_bytes(self, request: PictureRequest) -> int:
        """See `ImagePipeline`."""
        grids = [self._grid(request.width, request.height)]
        grids += [self._grid(*seen_size(image.shape[1], image.shape[0], self._multiple)) for image in request.images]
        tokens = [height * width for height, width in grids]
        known = 4 * sum(tokens[1:]) * self._autoencoder.token_channels
        return max(
            self._text_encoder.working_bytes,
            known + max(self._autoencoder.working_bytes(*(side * self._multiple for side in grid)) for grid in grids),
            known + self._transformer.working_bytes([MAX_TOKENS, *tokens], texts=2 if self._is_guided(request) else 1),
        )

    def generate(self, request: PictureRequest) -> Iterator[ImageStep | ImageResult]:
        """See `ImagePipeline`.

        Raises:
            PictureError: a reference picture cannot be used.
            TokenizerError: the prompt cannot be tokenised.
        """
        check_references(request.images)
        latents, computed = yield from self._denoise(request)
        for picture in self._autoencoder.decode_steps(latents):
            if picture is None:
                yield ImageStep("decode", request.steps, request.steps)
            else:
                yield ImageResult(to_pixels(picture), computed)

    def _denoise(self, request: PictureRequest) -> Generator[ImageStep, None, tuple[mx.array, int]]:
        """From noise to clean latents (1, h, w, C), and how many steps were computed. Holds nothing else afterwards."""
        grid = self._grid(request.width, request.height)
        embeddings = self._text_encoder.encode(request.prompt, *[request.negative_prompt] * self._is_guided(request))
        yield ImageStep("encode", 0, request.steps)
        references = []
        for image in request.images:
            references.append(self._encode(image))
            yield ImageStep("encode", 0, request.steps)
        sides = [self._side(each, request) for each in self._transformer.condition(embeddings, references, grid)]
        sigmas = self._scheduler.sigmas(request.steps, empirical_mu(grid[0] * grid[1], request.steps))
        latents = self._noise(request, grid)
        for step, (sigma, following) in enumerate(pairwise(sigmas), start=1):
            predicted = self._predict(latents, sigma, sides, request.guidance)
            latents = latents + (following - sigma) * predicted
            wait([latents])
            shows = request.preview_every and step % request.preview_every == 0
            preview = self._preview((latents - following * predicted).reshape(1, *grid, -1)) if shows else None
            yield ImageStep("denoise", step, request.steps, preview)
        cache = sides[0].cache
        return latents.reshape(1, *grid, -1), request.steps if cache is None else cache.computed

    def _is_guided(self, request: PictureRequest) -> bool:
        return self._abilities.takes_guidance and request.guidance > self._abilities.guidance_above

    def _grid(self, width: int, height: int) -> Grid:
        return height // self._multiple, width // self._multiple

    def _encode(self, image: Pixels) -> tuple[mx.array, Grid]:
        """A reference picture's tokens. Shapes: (H, W, 3); returns (h * w, C)."""
        prepared = prepare_reference(image, self._multiple)
        pixels = mx.array(prepared.astype(np.float32) / 127.5 - 1.0)
        latents = self._autoencoder.encode(pixels[None])
        tokens = latents.reshape(-1, latents.shape[-1])
        wait([tokens])
        return tokens, (latents.shape[1], latents.shape[2])

    def _side(self, conditions: Conditions, request: PictureRequest) -> _Side:
        wait(conditions.arrays())
        return _Side(conditions, StepCache(request.step_cache, request.steps) if request.step_cache > 0 else None)

    def _noise(self, request: PictureRequest, grid: Grid) -> mx.array:
        """Tokens of pure noise. Shape: float32 (h * w, C)."""
        shape = (1, self._autoencoder.token_channels, *grid)
        if request.latents is None:
            noise = mx.random.normal(shape, key=mx.random.key(request.seed))
        else:
            noise = mx.array(request.latents)
        return noise.reshape(shape[1], -1).T

    def _predict(self, latents: mx.array, sigma: float, sides: Sequence[_Side], guidance: float) -> mx.array:
        """A step's prediction, guided where there is something to be guided away from. Shapes: both (S, C)."""
        modulations = self._transformer.modulations(sigma)
        wanted, *rest = (self._transformer(latents, modulations, side.conditions, side.cache) for side in sides)
        return rest[0] + guidance * (wanted - rest[0]) if rest else wanted


def read_abilities(checkpoint: Checkpoint) -> Abilities:
    """What a klein pipeline can do, by its configuration files. Thread: any. Raises CheckpointError."""
    downscale = read_autoencoder_config(component_config(checkpoint, "vae")).downscale
    distilled = is_distilled(checkpoint)
    return Abilities(
        steps=_DISTILLED_STEPS if distilled else _BASE_STEPS,
        guidance=0.0 if distilled else _BASE_GUIDANCE,
        takes_guidance=not distilled,
        takes_negative_prompt=not distilled,
        takes_strength=False,
        max_images=MAX_REFERENCES,
        size_multiple=downscale * PATCH,
        width=_DEFAULT_SIDE_LATENTS * downscale,
        height=_DEFAULT_SIDE_LATENTS * downscale,
        guidance_above=1.0,
    )


def load_pipeline(checkpoint: Checkpoint, choices: LoadChoices) -> Flux2KleinPipeline:
    """Build it and load its weights. Thread: the MLX thread. Raises ModelError."""
    abilities = read_abilities(checkpoint)
    scheduler = read_scheduler(component_config(checkpoint, "scheduler", "scheduler_config.json"))
    transformer = Transformer(transformer_config(checkpoint))
    autoencoder = build_autoencoder(component_config(checkpoint, "vae"), Tiling(choices.vae_tile))
    if transformer.config.channels != autoencoder.token_channels:
        raise CheckpointError(
            f"in_channels is {transformer.config.channels}, and the autoencoder makes {autoencoder.token_channels}",
            file="transformer/config.json",
        )
    spans = component_spans(checkpoint, _COMPONENTS)
    text_encoder = TextEncoder(checkpoint, READING, choices, spans[0])
    if text_encoder.width != transformer.config.text_dim:
        raise CheckpointError(
            f"joint_attention_dim is {transformer.config.text_dim}, and the text encoder makes {text_encoder.width}",
            file="transformer/config.json",
        )
    load_component(transformer, checkpoint, "transformer", choices, spans[1])
    transformer.prepare()
    load_component(autoencoder, checkpoint, "vae", choices, spans[2], unused=_UNUSED["vae"])
    autoencoder.prepare()
    return Flux2KleinPipeline(abilities, text_encoder, transformer, autoencoder, scheduler)


FAMILY = Family(
    class_names=("Flux2KleinPipeline",),
    components=_COMPONENTS,
    load=load_pipeline,
    abilities=read_abilities,
    unused=lambda checkpoint: unused_tensors(checkpoint, READING) | _UNUSED,
)
