"""What a checkpoint's processor files say is done to a picture, done with Pillow and numpy.

Source: transformers v5.24 `image_processing_backends.py` (PilBackend) and `image_transforms.py`, whose order of
operations and whose widths of numbers count: resizing gives bytes, rescaling is in float64, normalising in float32.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.vision.base import Encode, Files, PictureError, Pixels

MOST_PIXELS = 1 << 26
"""Of a picture on its way to a tower."""
Floats: TypeAlias = npt.NDArray[np.float32]
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class PixelRules:
    """How bytes become numbers. Thread: any."""

    resample: Image.Resampling
    factor: float | None
    """What a byte is multiplied by; None: nothing."""
    mean: tuple[float, ...] | None
    """Of each channel, subtracted before the division by `std`; None: neither is done."""
    std: tuple[float, ...]

    def resized(self, pixels: Pixels, height: int, width: int) -> Pixels:
        """The picture at another size. Shapes: uint8 (H, W, 3); returns uint8 (height, width, 3).

        Raises:
            PictureError: it would be larger than any that makes sense.
        """
        bounded(height, width)
        return np.asarray(Image.fromarray(pixels).resize((width, height), self.resample))

    def values(self, pixels: Pixels | Floats) -> Floats:
        """The numbers that a tower is made for. Shapes: bytes, perhaps as float32, (H, W, 3); returns float32 alike."""
        if pixels.dtype != np.uint8:
            return self._numbers(pixels)
        # Looked up: 64 bits for every value of a large picture would be much.
        of_byte = self._numbers(np.repeat(np.arange(256, dtype=np.float32)[:, None], 3, axis=1))
        return np.stack([of_byte[:, channel][pixels[..., channel]] for channel in range(3)], axis=-1)

    def _numbers(self, pixels: Pixels | Floats) -> Floats:
        exact = np.multiply(pixels, 1.0 if self.factor is None else self.factor, dtype=np.float64)
        values: Floats = exact.astype(np.float32)
        if self.mean is None:
            return values
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        normalized: Floats = np.divide(np.subtract(values, mean, dtype=np.float32), std, dtype=np.float32)
        return normalized


def processor_settings(files: Files) -> ConfigReader:
    """What processor_config.json says, of text and picture together; nothing where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return _read(files, PROCESSOR)


def image_settings(files: Files) -> ConfigReader:
    """What is said of pictures: in processor_config.json's `image_processor`, else in preprocessor_config.json.

    Raises:
        CheckpointError: one of them is no JSON object.
    """
    return processor_settings(files).section("image_processor") or _read(files, PREPROCESSOR)


def read_rules(
    settings: ConfigReader,
    *,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    normalizes: bool = True,
) -> PixelRules:
    """The rules of a processor whose class has these defaults.

    Raises:
        CheckpointError: a value is impossible, or pictures are not to be resized.
    """
    if not settings.flag("do_resize", default=True):
        raise CheckpointError("do_resize false is not supported", file=settings.file)
    if (kind := settings.integer("resample", int(resample))) not in set(Image.Resampling):
        raise CheckpointError(f"resample {kind} is not one of Pillow's filters", file=settings.file)
    rescales = settings.flag("do_rescale", default=True)
    factor = settings.number("rescale_factor", 1 / 255) if rescales else None
    centre, spread = _channels(settings, "image_mean", mean), _channels(settings, "image_std", std)
    if 0 in spread:
        raise CheckpointError("image_std must not be 0", file=settings.file)
    normalizes = settings.flag("do_normalize", default=normalizes)
    return PixelRules(Image.Resampling(kind), factor, centre if normalizes else None, spread)


def read_sides(settings: ConfigReader, key: str, default: int) -> tuple[int, int]:
    """Height and width under `key`: an object of these two, or one number for both.

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(settings.value(key), dict):
        inner = ConfigReader(settings.mapping(key), settings.file)
        return inner.size("height"), inner.size("width")
    side = settings.size(key, default)
    return side, side


def read_square(settings: ConfigReader, key: str, default: int) -> int:
    """One number for height and width. Raises CheckpointError where they differ."""
    height, width = read_sides(settings, key, default)
    if height != width:
        raise CheckpointError(f"{key} must be square, not {height} x {width}", file=settings.file)
    return height


def bounded(height: int, width: int) -> None:
    """Refuse what a line of pixels grows to where its shorter side is made as long as a model wants it.

    Raises:
        PictureError: so many pixels are too many.
    """
    if height * width > MOST_PIXELS:
        raise PictureError(f"the picture would have to be {width} x {height} pixels for the model: it is too narrow")


def shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """Height and width with the shorter of them at `edge`, the longer one in proportion, rounded down."""
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def centre_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle of a picture, black where it is too small. Shapes: uint8 (H, W, 3); returns (height, width, 3)."""
    for axis, wanted in ((0, height), (1, width)):
        has = pixels.shape[axis]
        if has >= wanted:
            begin = (has - wanted) // 2
            pixels = pixels.take(np.arange(begin, begin + wanted), axis=axis)
        else:
            before = -((has - wanted) // 2)
            around = [(0, 0)] * 3
            around[axis] = (before, wanted - has - before)
            pixels = np.pad(pixels, around)
    return pixels


def in_patches(values: Floats, size: int, window: int = 1, *, channels_last: bool = False) -> Floats:
    """A picture's patches, those of each window of `window` x `window` one behind the other.

    Windows follow one another by rows, and so do the patches within one. A patch is (channels, height, width), or with
    `channels_last` (height, width, channels).

    Shapes: values (H, W, C), both sides multiples of size * window; returns (T, C * size * size).
    """
    height, width, channels = values.shape
    rows, columns = height // (size * window), width // (size * window)
    cut = values.reshape(rows, window, size, columns, window, size, channels)
    order = (0, 3, 1, 4, 2, 5, 6) if channels_last else (0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(cut.transpose(order)).reshape(-1, channels * size * size)


def places_of(rows: int, columns: int, window: int = 1) -> npt.NDArray[np.int64]:
    """Row and column of each patch in the order of `in_patches`. Shapes: returns (rows * columns, 2)."""
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    grid = np.stack([y, x], axis=-1).reshape(rows // window, window, columns // window, window, 2)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def one_token(encode: Encode, settings: ConfigReader, key: str, default: str) -> int:
    """The id of the special token that is named under `key`.

    Raises:
        CheckpointError: it is no token of its own.
    """
    text = settings.text(key, default)
    ids = encode(text)
    if len(ids) != 1:
        raise CheckpointError(f"{key} {text!r} is no token of the tokenizer", file=settings.file)
    return ids[0]


def _channels(settings: ConfigReader, key: str, default: Sequence[float]) -> tuple[float, ...]:
    if settings.value(key) is None:
        return tuple(default)
    if not isinstance(settings.value(key), list):
        return (settings.number(key),) * 3
    numbers = tuple(settings.numbers(key))
    if len(numbers) != 3:
        raise CheckpointError(f"{key} must have a value for each of three channels", file=settings.file)
    return numbers


def _read(files: Files, name: str) -> ConfigReader:
    text = files.read(name)
    if text is None:
        return ConfigReader({}, name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", file=name) from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", file=name)
    return ConfigReader(value, name)
