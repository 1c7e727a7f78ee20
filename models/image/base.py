"""What an image pipeline is to the engine, and what a family's package declares.

A pipeline makes one picture at a time: on every device a step's cost grows with the pictures in it, so several are made
one after another, each with the bytes that it would have had alone. `generate` yields after each unit of work, which is
where a request can be given up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from models.checkpoint import Checkpoint
from models.quantization import WeightPolicy

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""An RGB picture, uint8 (H, W, 3)."""

Latents: TypeAlias = npt.NDArray[np.float32]
"""On the host, in the layout that the family's diffusers pipeline takes as `latents`, batch 1."""

Phase: TypeAlias = Literal["encode", "denoise", "decode"]


class PictureError(Exception):
    """An input picture that the pipeline cannot use: the request's fault, said to whoever sent it."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a pipeline can honour, and its defaults. A request that asks for more is refused by name."""

    steps: int
    """Denoising steps by default."""
    guidance: float
    """The default scale."""
    takes_guidance: bool
    """False for a distilled model: it has no unguided half to be steered away from."""
    takes_negative_prompt: bool
    takes_strength: bool
    """Image-to-image by noising the input picture; its default strength is `strength`."""
    max_images: int
    """Input pictures of one request; 0 if the pipeline only makes pictures from text."""
    size_multiple: int
    """Pixels: width and height are multiples of it."""
    width: int = 1024
    height: int = 1024
    strength: float = 0.6
    guidance_above: float = 0.0
    """Guidance is off up to this scale: what a pipeline with `takes_guidance` takes for one."""


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """One picture, every choice made: the engine has filled in defaults and checked it against `Abilities`."""

    prompt: str
    width: int
    height: int
    """Pixels, multiples of `Abilities.size_multiple`."""
    steps: int
    seed: int
    """0 to 2**63 - 1."""
    guidance: float = 0.0
    negative_prompt: str = ""
    images: tuple[Pixels, ...] = ()
    """Input pictures as they were sent; a pipeline scales them itself."""
    strength: float = 0.6
    """How much of the way to noise an input picture is taken: 0 < strength <= 1. Only with `takes_strength`."""
    preview_every: int = 0
    """Every so many steps an ImageStep carries a preview; 0 is never."""
    step_cache: float = 0.0
    """The relative change of a step's input below which its output is reused (see step_cache.py); 0 is off."""
    latents: Latents | None = None
    """The initial noise, for tests; None draws it from the seed."""


@dataclass(frozen=True, slots=True)
class ImageStep:
    """A unit of work is done. `step` of `total` denoising steps are behind; encoding and decoding are units as well."""

    phase: Phase
    step: int
    total: int
    preview: Pixels | None = None
    """A small picture of the present estimate."""


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The picture; the last thing that `generate` yields."""

    pixels: Pixels
    steps_computed: int
    """Forward passes that were not answered by the step cache, of all denoising steps."""


class ImagePipeline(Protocol):
    """A text-to-image model with its text encoder, transformer, scheduler and autoencoder."""

    @property
    def abilities(self) -> Abilities:
        """What it can honour. Thread: any."""
        ...

    def default_size(self, images: Sequence[Pixels]) -> tuple[int, int]:
        """Width and height where a request names none, by its input pictures. Thread: any; touches no MLX.

        Raises:
            PictureError: the pipeline cannot use one of them; the message says which and why.
        """
        ...

    def working_bytes(self, request: PictureRequest) -> int:
        """The bytes that making the picture takes at its peak, beyond the weights. Thread: any; touches no MLX."""
        ...

    def generate(self, request: PictureRequest) -> Iterator[ImageStep | ImageResult]:
        """Make the picture, one unit of work per `next`. Closing the iterator gives everything back.

        Thread: the MLX thread.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file to be merged into the weights at load, and its strength."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LoadChoices:
    """How a pipeline is to be loaded; what concerns weights, `models.image.loading` and `encoders` obey."""

    policy: WeightPolicy = "auto"
    loras: tuple[Lora, ...] = ()
    keep_text_encoder: bool = True
    """False: its weights are read again for each new prompt and freed behind it."""
    vae_tile: int = 64
    """A picture of more latents than a square of this side is decoded piece by piece (see tiling.py); 0: none is."""
    progress: Callable[[float], None] = lambda _: None
    """Told 0 to 1 as weights arrive; may raise to abandon the load."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family's entry. Each package in models/image ends its `pipeline` module with one, called FAMILY."""

    class_names: tuple[str, ...]
    """Values of model_index.json's `_class_name` (or of Ollama's `architecture`)."""
    components: tuple[str, ...]
    """The components that have weights."""
    load: Callable[[Checkpoint, LoadChoices], ImagePipeline]
    """Builds the pipeline. Thread: the MLX thread. Raises ModelError."""
    abilities: Callable[[Checkpoint], Abilities]
    """What its pipeline will be able to do, by its configuration files alone. Thread: any. Raises CheckpointError."""
    unused: Callable[[Checkpoint], Mapping[str, tuple[str, ...]]] = lambda _: {}
    """By component, what the names of tensors begin with (without `model.`) that are never loaded. Thread: any."""
