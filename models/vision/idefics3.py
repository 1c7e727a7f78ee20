"""Idefics3 and SmolVLM: SigLIP on tiles of one size, and windows of patches side by side through one matrix.

A picture is resized to whole tiles; each tile is looked at by itself, and behind them the whole picture as one tile.

Source: Idefics3 (arXiv 2408.12637), SmolVLM (arXiv 2504.05299); transformers v5.24 `modeling_idefics3`,
`processing_idefics3` and `image_processing_pil_idefics3`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.arch import build_model
from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Linear
from models.ops.vision import TowerOps
from models.vision import processing, siglip
from models.vision.base import PLACE, Encode, Family, Files, Given, Pixels, Prepared, Tower, Vision
from models.vision.fixed_size import Sizes
from models.vision.processing import PixelRules
from models.vision.projector import working_bytes

_TOWER, _CONNECTOR = "vision_model.", "connector."
_DEFAULTS = Sizes(width=1152, inner=3072, heads=16, num_layers=12, side=224, patch=32, eps=1e-6)
_STANDARD = (0.5, 0.5, 0.5)
_LARGEST = 4096
"""Pixels of a picture's longer side, whatever its processor asks for."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    tower: siglip.Weights
    projection: Linear


@dataclass(frozen=True, slots=True)
class Expansion:
    """The text that stands for a picture, a special token for each place."""

    around: str
    whole: str
    place: str
    places: int
    """Of a tile."""
    encode: Encode
    place_id: int

    def tokens(self, rows: int, columns: int) -> tuple[int, ...]:
        """All tokens of a picture in so many tiles; without any it is looked at as a whole alone."""
        places = self.place * self.places
        text = ""
        for row in range(1, rows + 1):
            text += "".join(f"{self.around}<row_{row}_col_{column}>{places}" for column in range(1, columns + 1)) + "\n"
        text += f"{chr(10) if rows else ''}{self.around}{self.whole}{places}{self.around}"
        return tuple(PLACE if token == self.place_id else token for token in self.encode(text))


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    longest: int
    """Pixels of the longer side, before whole tiles are made of it."""
    tile: int
    splits: bool
    patch: int
    window: int
    positions: npt.NDArray[np.int64]
    """Of a tile's patches in the order of windows."""
    expansion: Expansion

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        height, width = scaled(pixels.shape[0], pixels.shape[1], self.longest)
        pixels = self.rules.resized(pixels, height, width)
        if not self.splits:
            return self._prepared([self.rules.resized(pixels, self.tile, self.tile)], 0, 0)
        height, width = whole_tiles(height, width, self.tile)
        pixels = self.rules.resized(pixels, height, width)
        rows, columns = height // self.tile, width // self.tile
        if rows == columns == 1:
            return self._prepared([pixels], 0, 0)
        cut = pixels.reshape(rows, self.tile, columns, self.tile, 3).swapaxes(1, 2).reshape(-1, self.tile, self.tile, 3)
        return self._prepared([*cut, self.rules.resized(pixels, self.tile, self.tile)], rows, columns)

    def _prepared(self, tiles: Sequence[Pixels], rows: int, columns: int) -> Prepared:
        passes = tuple(self._pass(tile) for tile in tiles)
        return Prepared(passes, len(self.positions), self.expansion.tokens(rows, columns))

    def _pass(self, tile: Pixels) -> Given:
        patches = processing.in_patches(self.rules.values(tile), self.patch, self.window)
        return {siglip.PATCHES: patches, siglip.POSITIONS: self.positions}


def scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width with the longer at `longest` and the shorter even, and none beyond the largest. Thread: any."""
    ratio = width / height
    if width >= height:
        height, width = _even(int(longest / ratio)), longest
    else:
        height, width = longest, _even(int(longest * ratio))
    ratio = width / height
    if width >= height and width > _LARGEST:
        height, width = int(_LARGEST / ratio), _LARGEST
    elif height > _LARGEST:
        height, width = _LARGEST, int(_LARGEST * ratio)
    return max(height, 1), max(width, 1)


def whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Height and width in whole tiles: the longer side rounded up, then the shorter one by that. Thread: any."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / ratio) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * ratio) / tile) * tile


def _even(number: int) -> int:
    return max(number + number % 2, 1)


def bucketed(count: int, buckets: int) -> npt.NDArray[np.int64]:
    """Which of a table's rows (or columns) each of `count` rows of patches takes, in float32 as the reference does.

    Shapes: returns (count,).
    """
    bounds = np.arange(1 / buckets, 1.0, 1 / buckets).astype(np.float32)
    along = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
    found: npt.NDArray[np.int64] = np.searchsorted(bounds, np.minimum(along, np.float32(1 - 1e-6)), side="right")
    return found


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    text = build_model(files.config).config
    shape = siglip.read_shape(whole.section("vision_config") or ConfigReader({}), _DEFAULTS)
    sizes = shape.sizes
    window = whole.size("scale_factor", 2)
    weights = Weights(
        siglip.weights(shape, _TOWER),
        Linear(f"{_CONNECTOR}modality_projection.proj", sizes.width * window * window, text.hidden_size),
    )

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = siglip.forward(ops, weights.tower, shape)
        return (ops.linear(ops.fold(x, window * window), weights.projection),)

    tower = Tower(
        weights,
        forward,
        text.hidden_size,
        sizes.num_layers,
        (_TOWER, _CONNECTOR),
        working_bytes(sizes.width, sizes.inner, sizes.heads),
    )
    filler = whole.integer("image_token_id", 128257)
    if not 0 <= filler < text.vocab_size:
        raise CheckpointError(f"image_token_id {filler} is no token of {text.vocab_size}", file=FILE)
    return Vision(tower, _preparation(files, encode, sizes, window, filler), filler)


def _preparation(files: Files, encode: Encode, sizes: Sizes, window: int, filler: int) -> Preparation:
    """How a checkpoint's processor makes pictures ready. Raises CheckpointError."""
    images, processor = processing.image_settings(files), processing.processor_settings(files)
    tile = _longest_edge(images, "max_image_size", 364)
    if tile % (sizes.patch * window):
        reason = f"tiles of {tile} pixels are no whole number of {window} x {window} patches of {sizes.patch}"
        raise CheckpointError(reason, file=images.file)
    per_side = tile // sizes.patch
    count = (per_side // window) ** 2
    if processor.size("image_seq_len", count) != count:
        raise CheckpointError(f"image_seq_len must be {count} for tiles of {tile} pixels", file=processor.file)
    rules = processing.read_rules(images, resample=Image.Resampling.LANCZOS, mean=_STANDARD, std=_STANDARD)
    buckets = bucketed(per_side, sizes.patches_per_side)
    positions = buckets[processing.places_of(per_side, per_side, window)] @ (sizes.patches_per_side, 1)
    tokens = Expansion("<fake_token_around_image>", "<global-img>", "<image>", count, encode, filler)
    if tuple(encode(tokens.place)) != (filler,):
        raise CheckpointError(f"image_token_id {filler} is not what the tokenizer has for {tokens.place}", file=FILE)
    return Preparation(
        rules,
        _longest_edge(images, "size", 4 * 364),
        tile,
        images.flag("do_image_splitting", default=True),
        sizes.patch,
        window,
        positions,
        tokens,
    )


def _longest_edge(images: ConfigReader, key: str, default: int) -> int:
    sizes = images.section(key)
    if sizes is None:
        return default
    if sizes.value("longest_edge") is None:
        raise CheckpointError(f"{key} without longest_edge is not supported", file=images.file)
    return sizes.size("longest_edge")


FAMILY = Family(hf=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), build=build)
