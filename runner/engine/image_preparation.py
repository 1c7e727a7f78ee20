"""From an image request to pictures that the pipeline can make: every default filled in, every choice checked.

What the pipeline cannot honour is refused by name. Needs no device. Thread: any.

Source of the limits: Ollama v0.32.5, server/routes.go (4096 a side) and x/imagegen/models/flux2/flux2.go (4 MP in all,
sides rounded to the nearest multiple, a missing side by the aspect of the first input picture).
"""

import logging
import math
import secrets
from dataclasses import dataclass, replace
from typing import Final, get_args

from models.image.base import Abilities, ImagePipeline, PictureError, PictureRequest, Pixels
from runner.engine.pictures import decode_picture
from runner.engine.types import EmbeddingRequest, ImageFormat, ImageRequest, Request
from runner.errors import BadRequest, NotImplementedHere

logger = logging.getLogger("runner.engine")

MAX_SIDE: Final = 4096
MAX_PIXELS: Final = 2048 * 2048
MAX_STEPS: Final = 1000
"""As many as the schedulers' training had."""
MAX_COUNT: Final = 10
MAX_GUIDANCE: Final = 100.0
MAX_PROMPT: Final = 32_768
"""Characters; text encoders read some hundred tokens."""
SEEDS: Final = 2**63
DRAWN_SEEDS: Final = 2**32
"""Seeds that we draw are below, for JavaScript's numbers end at 2**53."""
FORMATS: Final[tuple[ImageFormat, ...]] = get_args(ImageFormat)


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A request, ready to run: one picture after another, each as if it were alone."""

    pictures: tuple[PictureRequest, ...]
    format: ImageFormat


def prepare_image(request: Request, pipeline: ImagePipeline) -> PreparedImage:
    """Fill in what was left open, and check.

    Raises:
        BadRequest: a field cannot be honoured; the message names it.
        NotImplementedHere: the request is for text or embeddings.
    """
    if isinstance(request, EmbeddingRequest):
        raise NotImplementedHere("this model does not support embeddings")
    if not isinstance(request, ImageRequest):
        raise NotImplementedHere("the loaded model generates images, not text")
    abilities = pipeline.abilities
    _check_prompts(request, abilities)
    steps = _bounded("steps", request.steps or abilities.steps, 1, MAX_STEPS)
    count = _bounded("n", request.count, 1, MAX_COUNT)
    guidance = _guidance(request, abilities)
    strength = _strength(request, abilities)
    wanted = _format(request.format)
    images = _images(request, abilities)
    width, height = _size(request, pipeline, images)
    seed = 1 + secrets.randbelow(DRAWN_SEEDS - MAX_COUNT) if request.seed is None else request.seed
    if not 0 <= seed < SEEDS - count:
        raise BadRequest(f"seed must be below {SEEDS - count}, not {seed}")
    picture = PictureRequest(
        prompt=request.prompt,
        width=width,
        height=height,
        steps=steps,
        seed=seed,
        guidance=guidance,
        negative_prompt=request.negative_prompt,
        images=images,
        strength=strength,
        preview_every=_bounded("preview", request.preview, 0, MAX_STEPS),
        step_cache=_number("step_cache", request.step_cache, 0.0, 1.0),
    )
    return PreparedImage(tuple(replace(picture, seed=seed + index) for index in range(count)), wanted)


def _check_prompts(request: ImageRequest, abilities: Abilities) -> None:
    if not request.prompt.strip():
        raise BadRequest("the prompt is empty")
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > MAX_PROMPT:
            raise BadRequest(f"{name} has {len(text)} characters, more than {MAX_PROMPT}")
    if request.negative_prompt and not abilities.takes_negative_prompt:
        raise BadRequest("negative_prompt cannot be honoured: this pipeline works without guidance")


def _guidance(request: ImageRequest, abilities: Abilities) -> float:
    if request.guidance is None:
        guidance = abilities.guidance
    else:
        guidance = _number("guidance", request.guidance, 0.0, MAX_GUIDANCE)
        if guidance > 0 and not abilities.takes_guidance:
            raise BadRequest(f"guidance {guidance:g} cannot be honoured: this pipeline is distilled and works without")
        if 0 < guidance < (least := abilities.guidance_above):
            raise BadRequest(
                f"guidance must be 0 or at least {least:g}, not {guidance:g}: this pipeline knows none below"
            )
    if request.negative_prompt and guidance <= abilities.guidance_above:
        raise BadRequest(f"negative_prompt cannot be honoured at guidance {guidance:g}; set guidance to more than 1")
    return guidance


def _strength(request: ImageRequest, abilities: Abilities) -> float:
    if request.strength is None:
        return abilities.strength
    if not abilities.takes_strength:
        raise BadRequest("strength cannot be honoured: this pipeline edits without noising its input picture")
    if not request.images:
        raise BadRequest("strength cannot be honoured without an input picture in images")
    strength = _number("strength", request.strength, 0.0, 1.0)
    if strength == 0:
        raise BadRequest("strength must be more than 0: at 0 the picture would stay as it is")
    return strength


def _format(asked: str) -> ImageFormat:
    name = asked.lower()
    name = "jpeg" if name == "jpg" else name or "png"
    for known in FORMATS:
        if name == known:
            return known
    raise BadRequest(f"format must be one of {', '.join(FORMATS)}, not {asked[:16]!r}")


def _images(request: ImageRequest, abilities: Abilities) -> tuple[Pixels, ...]:
    if request.images and not abilities.max_images:
        raise BadRequest("images cannot be honoured: this pipeline makes pictures from text alone")
    if len(request.images) > abilities.max_images:
        most = "1 input picture" if abilities.max_images == 1 else f"{abilities.max_images} input pictures"
        raise BadRequest(f"images has {len(request.images)} entries, this pipeline takes {most}")
    return tuple(decode_picture(data, f"images[{index}]") for index, data in enumerate(request.images))


def _size(request: ImageRequest, pipeline: ImagePipeline, images: tuple[Pixels, ...]) -> tuple[int, int]:
    """Width and height in pixels, as Ollama chooses them."""
    for name, side in (("width", request.width), ("height", request.height)):
        if side is not None:
            _bounded(name, side, 1, MAX_SIDE)
    multiple = pipeline.abilities.size_multiple
    wanted = _sides(request, pipeline, images)
    width, height = (max(1, math.floor(side / multiple + 0.5)) * multiple for side in wanted)
    if width * height > MAX_PIXELS:
        side = math.isqrt(MAX_PIXELS)
        raise BadRequest(
            f"width and height are too large: {width}x{height}, at most {MAX_PIXELS} pixels ({side}x{side}) can be made"
        )
    if (width, height) != (request.width or width, request.height or height):
        asked = f"{request.width or 'any'}x{request.height or 'any'}"
        logger.info(
            "size rounded", extra={"fields": {"asked": asked, "size": f"{width}x{height}", "multiple": multiple}}
        )
    return width, height


def _sides(request: ImageRequest, pipeline: ImagePipeline, images: tuple[Pixels, ...]) -> tuple[float, float]:
    """The sides as asked for; those left open by the first input picture, or by default."""
    abilities = pipeline.abilities
    if not images:
        return request.width or abilities.width, request.height or abilities.height
    try:
        # Asked in any case: the pipeline may refuse a picture.
        size = pipeline.default_size(images)
    except PictureError as error:
        raise BadRequest(str(error)) from None
    rows, columns = images[0].shape[:2]
    width, height = request.width, request.height
    if width is None and height is None:
        return size
    return width or (height or rows) * columns / rows, height or (width or columns) * rows / columns


def _bounded(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise BadRequest(f"{name} must be between {least} and {most}, not {value}")
    return value


def _number(name: str, value: float, least: float, most: float) -> float:
    # Also refuses what is not a number.
    if not least <= value <= most:
        raise BadRequest(f"{name} must be between {least:g} and {most:g}, not {value:g}")
    return value
