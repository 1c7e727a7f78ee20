"""An image pipeline in miniature: real arrays and every phase, and pictures that depend on all that was asked for."""

import asyncio
import gc
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from models.image.base import (
    Abilities,
    ImageResult,
    ImageStep,
    Phase,
    PictureError,
    PictureRequest,
    Pixels,
)

ABILITIES = Abilities(
    steps=4,
    guidance=3.0,
    takes_guidance=True,
    takes_negative_prompt=True,
    takes_strength=True,
    max_images=2,
    size_multiple=16,
    width=64,
    height=64,
)
DISTILLED = Abilities(
    steps=4,
    guidance=0.0,
    takes_guidance=False,
    takes_negative_prompt=False,
    takes_strength=False,
    max_images=0,
    size_multiple=16,
    width=64,
    height=64,
)
Hook = Callable[[int, Phase, PictureRequest], None]


class Latents:
    """What a picture in the making holds; counted, to see that it is given back."""

    def __init__(self, array: mx.array) -> None:
        self.array = array


class FakePipeline:
    """An ImagePipeline. `before_unit(number, phase, picture)` is called at the beginning of each unit of work, in the
    thread that runs it; it may raise, wait or take notes. Numbers count from 0, over all pictures.
    """

    def __init__(
        self, abilities: Abilities = ABILITIES, *, before_unit: Hook | None = None, noise: bool = False
    ) -> None:
        self._abilities = abilities
        self.before_unit = before_unit
        self.noise = noise
        self.units = 0
        self.begun: list[PictureRequest] = []
        self._held: weakref.WeakSet[Latents] = weakref.WeakSet()

    @property
    def abilities(self) -> Abilities:
        return self._abilities

    def default_size(self, images: Sequence[Pixels]) -> tuple[int, int]:
        for index, image in enumerate(images):
            if min(image.shape[:2]) < 8:
                raise PictureError(f"images[{index}] is smaller than 8 pixels")
        return (images[0].shape[1], images[0].shape[0]) if images else (self._abilities.width, self._abilities.height)

    def working_bytes(self, request: PictureRequest) -> int:
        return 100 * request.width * request.height

    def living_latents(self) -> int:
        """How many pictures something still holds arrays of."""
        gc.collect()
        return len(self._held)

    def generate(self, request: PictureRequest) -> Iterator[ImageStep | ImageResult]:
        assert threading.current_thread().name.startswith("executor"), "a pipeline runs in one thread"
        self.begun.append(request)
        self._unit("encode", request)
        asked = repr((request.prompt, request.negative_prompt, request.guidance, request.strength, request.step_cache))
        digest = hashlib.sha256(asked.encode() + b"".join(image.tobytes() for image in request.images)).digest()
        wish = mx.array(np.frombuffer(digest[:3], dtype=np.uint8).astype(np.float32))
        yield ImageStep("encode", 0, request.steps)
        shape = (request.height, request.width, 3)
        latents = Latents(mx.random.normal(shape, key=mx.random.key(request.seed)))
        self._held.add(latents)
        for step in range(1, request.steps + 1):
            self._unit("denoise", request)
            latents.array = latents.array * (1.0 if self.noise else 0.7) + mx.sin(wish + step) / 10
            mx.eval(latents.array)
            shown = request.preview_every and step % request.preview_every == 0
            preview = _pixels(latents.array[::8, ::8]) if shown else None
            yield ImageStep("denoise", step, request.steps, preview)
        self._unit("decode", request)
        yield ImageStep("decode", request.steps, request.steps)
        self._unit("decode", request)
        yield ImageResult(_pixels(latents.array), request.steps)

    def _unit(self, phase: Phase, request: PictureRequest) -> None:
        number, self.units = self.units, self.units + 1
        if self.before_unit is not None:
            self.before_unit(number, phase, request)


def _pixels(latents: mx.array) -> Pixels:
    return np.array((mx.clip(latents / 2 + 0.5, 0, 1) * 255).astype(mx.uint8))


class UnitGate:
    """A `before_unit` that holds the pipeline up at one unit until it is opened."""

    PATIENCE_S = 60

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, number: int, phase: Phase, picture: PictureRequest) -> None:
        if number == self._unit:
            self._reached.set()
            assert self._opened.wait(self.PATIENCE_S), "nobody opened the gate"

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, self.PATIENCE_S), "the pipeline never came to the gate"

    def open(self) -> None:
        self._opened.set()
