"""LLaVA-NeXT (LLaVA 1.6): CLIP looks at the whole picture and at tiles of it, and each line of all tiles has an end.

Source: transformers v5.24 `modeling_llava_next`, `image_processing_pil_llava_next` and `processing_llava_next`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.arch import build_model
from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Vector
from models.ops.vision import TowerOps
from models.vision import clip, processing
from models.vision.base import PLACE, Encode, Family, Files, Pixels, Prepared, Tower, Vision
from models.vision.fixed_size import Sizes
from models.vision.processing import PixelRules
from models.vision.projector import (
    Projector,
    feature_layers,
    projected,
    projector,
    side_by_side,
    unused_layers,
    working_bytes,
)

_NEWLINE = "image_newline"
_PREFIXES = ("vision_tower.", "multi_modal_projector.", _NEWLINE)
_USUAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_TILES, _TAKEN, _IS_PATCH, _IS_END = "tiles", "taken", "is_patch", "is_end"
_DIGITS = 7
"""That sizes are rounded to before they are cut."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    tower: clip.Weights
    projector: Projector
    newline: Vector
    """What ends a line."""


def build(files: Files, encode: Encode) -> Vision:  # noqa: ARG001 - a picture has places alone
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    vision = whole.section("vision_config") or ConfigReader({})
    if (kind := vision.text("model_type", "clip_vision_model")) != "clip_vision_model":
        raise CheckpointError(f"a vision tower of type {kind!r} is not supported", file=FILE)
    if (strategy := whole.text("vision_feature_select_strategy", "default")) != "default":
        raise CheckpointError(f"vision_feature_select_strategy {strategy!r} is not supported", file=FILE)
    text = build_model(files.config).config
    shape = clip.read_shape(vision)
    sizes = shape.sizes
    wanted = feature_layers(whole, sizes.num_layers, -2)
    used = max(wanted)
    behind = projector(whole, sizes.width * len(wanted), text.hidden_size, bias=True)
    weights = Weights(clip.weights(shape, used), behind, Vector(_NEWLINE, text.hidden_size))

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = side_by_side(ops, clip.states(ops, weights.tower, shape, _TILES), wanted)
        x = ops.mul(projected(ops, ops.take(x, _TAKEN), behind), ops.given(_IS_PATCH, 1))
        return (ops.add(x, ops.weigh(ops.given(_IS_END, 1), weights.newline)),)

    tower = Tower(
        weights,
        forward,
        text.hidden_size,
        used,
        _PREFIXES,
        _working_bytes(sizes),
        stacks=clip.STACKS,
        other_parts=(*clip.UNUSED, *unused_layers(clip.LAYERS, used, sizes.num_layers)),
    )
    filler = whole.integer("image_token_index", whole.integer("image_token_id", 32000))
    return Vision(tower, _read_preparation(files, whole, sizes), filler if 0 <= filler < text.vocab_size else 0)


def _working_bytes(sizes: Sizes) -> Callable[[int], int]:
    """Tiles look at themselves alone, one beside the other."""
    tile = sizes.patches_per_side**2 + 1
    alone = working_bytes(sizes.width, sizes.inner, sizes.heads)
    return lambda patches: -(-patches // tile) * alone(tile)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    sizes: Sizes
    resolutions: tuple[tuple[int, int], ...]
    """Heights and widths of whole tiles that a picture may be brought to."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        height, width = pixels.shape[:2]
        side = self.sizes.side
        target = best_resolution(height, width, self.resolutions)
        large = self._padded(pixels, *target)
        down, across = target[0] // side, target[1] // side
        tiles = large.reshape(down, side, across, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        pictures = [self.rules.resized(pixels, side, side), *tiles]
        taken = self._taken(height, width, down, across)
        is_patch = (taken >= 0).astype(np.float32)[:, None]
        given = clip.given_of([self.rules.values(each) for each in pictures], self.sizes.patch) | {
            _TILES: np.full(len(pictures), self.sizes.patches_per_side**2 + 1),
            _TAKEN: np.maximum(taken, 0),
            _IS_PATCH: is_patch,
            _IS_END: 1 - is_patch,
        }
        return Prepared((given,), len(given["patches"]), (PLACE,) * len(taken))

    def _padded(self, pixels: Pixels, height: int, width: int) -> Pixels:
        """The picture as large as it can be within these sides, black around it."""
        own = pixels.shape[:2]
        by_height, by_width = height / own[0], width / own[1]
        if by_width < by_height:
            size = min(math.ceil(own[0] * by_width), height), width
        else:
            size = height, min(math.ceil(own[1] * by_height), width)
        made = np.zeros((height, width, 3), np.uint8)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        made[top : top + size[0], left : left + size[1]] = self.rules.resized(pixels, *size)
        return made

    def _taken(self, height: int, width: int, down: int, across: int) -> npt.NDArray[np.int64]:
        """Which of all tokens stand where: the whole picture's, then the tiles' line by line; -1 ends a line.

        What was padded is left out. Shapes: returns (N,).
        """
        line = self.sizes.patches_per_side
        tokens = np.arange((down * across + 1) * (line**2 + 1)).reshape(-1, line**2 + 1)[:, 1:]
        tiles = tokens[1:].reshape(down, across, line, line).swapaxes(1, 2).reshape(down * line, across * line)
        rows, columns = tiles.shape
        if width / height > columns / rows:
            cut = (rows - int(round(height * (columns / width), _DIGITS))) // 2
            tiles = tiles[cut : rows - cut]
        else:
            cut = (columns - int(round(width * (rows / height), _DIGITS))) // 2
            tiles = tiles[:, cut : columns - cut]
        return np.concatenate([tokens[0], np.pad(tiles, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)])


def best_resolution(height: int, width: int, resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The height and width that keep most of a picture's pixels, and of those that keep as many the smallest."""

    def rank(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=rank)


def _read_preparation(files: Files, whole: ConfigReader, sizes: Sizes) -> Preparation:
    images = processing.image_settings(files)
    own = _resolutions(whole, _USUAL)
    if (said := _resolutions(images, own)) != own:
        raise CheckpointError(f"image_grid_pinpoints {said} are not config.json's", file=images.file)
    if any(height % sizes.side or width % sizes.side for height, width in own):
        raise CheckpointError(f"image_grid_pinpoints {own} are not whole tiles of {sizes.side}", file=images.file)
    size = images.section("size") if isinstance(images.value("size"), dict) else None
    edge = size.size("shortest_edge", size.integer("height", sizes.side)) if size else images.size("size", sizes.side)
    crop = processing.read_sides(images, "crop_size", sizes.side)
    if edge != sizes.side or crop != (sizes.side, sizes.side):
        raise CheckpointError(f"tiles of a size other than {sizes.side} are not supported", file=images.file)
    return Preparation(processing.read_rules(images), sizes, own)


def _resolutions(reader: ConfigReader, usual: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    key = "image_grid_pinpoints"
    value = reader.value(key)
    if value is None:
        return tuple(usual)
    pairs = [ConfigReader({key: pair}, reader.file).sizes(key) for pair in value] if isinstance(value, list) else []
    found = tuple((pair[0], pair[1]) for pair in pairs if pair is not None and len(pair) == 2)
    if not found or len(found) != len(pairs):
        raise CheckpointError(f"{key} must be pairs of heights and widths", file=reader.file)
    return found


FAMILY = Family(hf=("LlavaNextForConditionalGeneration",), build=build)
