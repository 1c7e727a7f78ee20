"""Reference pictures: which can be used, and what of them is looked at.

Follows diffusers (Flux2ImageProcessor and Flux2KleinPipeline, v0.42.1) in every index. Touches no MLX.
"""

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image

from models.image.base import PictureError, Pixels

MAX_REFERENCES = 10
"""Of one request. Neither the model nor diffusers sets a bound, but each adds up to 4096 tokens to every step."""

LEAST_SIDE = 64
GREATEST_ASPECT = 8
GREATEST_AREA = 1024 * 1024
"""Pixels; a larger picture is shrunk to it."""


def seen_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """Width and height of what is looked at, of a picture of that size. All in pixels."""
    width, height = _shrunk_size(width, height)
    return width // multiple * multiple, height // multiple * multiple


def check_references(images: Sequence[Pixels]) -> None:
    """Refuse pictures that are too small or too long.

    Raises:
        PictureError: one is; the message says which, by its place in the request.
    """
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        if min(width, height) < LEAST_SIDE:
            raise PictureError(f"images[{index}] is {width}x{height}; both sides must be at least {LEAST_SIDE} pixels")
        if max(width, height) > GREATEST_ASPECT * min(width, height):
            raise PictureError(
                f"images[{index}] is {width}x{height}; "
                f"the longer side must be at most {GREATEST_ASPECT} times the shorter"
            )


def prepare_reference(image: Pixels, multiple: int) -> Pixels:
    """Shrink a large picture, then take its middle, whose sides are multiples of `multiple`. Shapes: (H, W, 3)."""
    height, width = image.shape[:2]
    shrunk = _shrunk_size(width, height)
    if shrunk != (width, height):
        picture = PIL.Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(picture.resize(shrunk, PIL.Image.Resampling.LANCZOS))
    width, height = seen_size(width, height, multiple)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _shrunk_size(width: int, height: int) -> tuple[int, int]:
    if width * height <= GREATEST_AREA:
        return width, height
    scale = math.sqrt(GREATEST_AREA / (width * height))
    return int(width * scale), int(height * scale)
