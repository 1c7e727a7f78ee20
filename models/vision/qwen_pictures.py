"""How the Qwens that see make a picture ready: sides of whole windows, and patches window by window.

The patches of a window become one row for the decoder. Source: transformers v5.24 `image_processing_pil_qwen2_vl`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.vision import processing
from models.vision.base import PLACE, Encode, Files, PictureError, Pixels
from models.vision.processing import Floats, PixelRules

MOST_EXTREME = 200
"""The longer side in lengths of the shorter one."""


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """A picture's patches, window by window. Shapes: values float32 (rows * columns, channels * side * side)."""

    values: Floats
    rows: int
    columns: int
    merge: int
    """Patches along a window's side."""

    @property
    def grid(self) -> tuple[int, int]:
        """Windows down and across."""
        return self.rows // self.merge, self.columns // self.merge

    def angles(self, head_dim: int, theta: float) -> Floats:
        """What each pair of a head turns by: the first half by the row, the others by the column.

        Shapes: returns (rows * columns, head_dim / 2). Source: 2-D rotary embedding, Qwen2-VL (arXiv 2409.12191).
        """
        pairs = head_dim // 4
        frequencies = (theta ** (-np.arange(pairs) / pairs)).astype(np.float32)
        places = processing.places_of(self.rows, self.columns, self.merge).astype(np.float32)
        return np.concatenate([places[:, :1] * frequencies, places[:, 1:] * frequencies], axis=1)


@dataclass(frozen=True, slots=True)
class Cutting:
    """What a picture becomes, by the checkpoint's own processor files. Thread: any."""

    rules: PixelRules
    least: int
    """Pixels that it has at least,"""
    most: int
    """and at most, as far as sides of whole windows allow."""
    patch: int
    """Pixels along a patch's side."""
    merge: int
    """Patches along a window's side."""

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture of such is resized to.

        Raises:
            PictureError: it is too long for its width.
        """
        short, long = sorted((height, width))
        if long > MOST_EXTREME * short:
            raise PictureError(
                f"the picture is {width} x {height} pixels: one side may be at most {MOST_EXTREME} times the other"
            )
        side = self.patch * self.merge
        rows, columns = (round(length / side) for length in (height, width))
        if rows * columns * side**2 > self.most:
            shrunk = math.sqrt(height * width / self.most)
            rows, columns = (max(1, math.floor(length / shrunk / side)) for length in (height, width))
        elif rows * columns * side**2 < self.least:
            grown = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(length * grown / side) for length in (height, width))
        return rows * side, columns * side

    def cut(self, pixels: Pixels) -> Patches:
        """A picture's patches.

        Raises:
            PictureError: see `size_of`.
        """
        height, width = self.size_of(*pixels.shape[:2])
        values = self.rules.values(self.rules.resized(pixels, height, width))
        patches = processing.in_patches(values, self.patch, self.merge)
        return Patches(patches, height // self.patch, width // self.patch, self.merge)


def read_cutting(files: Files, usual: Mapping[str, JSON], *, patch: int, merge: int, frames: int) -> Cutting:
    """What a checkpoint's processor files say; `usual` is what published ones do, for one without files.

    Raises:
        CheckpointError: a value is impossible, not honoured, or not the tower's.
    """
    found = processing.image_settings(files)
    says = any(found.value(key) is not None for key in ("image_processor_type", "size", "patch_size", "image_mean"))
    reader = found if says else ConfigReader(usual, found.file)
    rules = processing.read_rules(reader)
    for key, default, own in (("patch_size", 14, patch), ("merge_size", 2, merge), ("temporal_patch_size", 2, frames)):
        if (said := reader.size(key, default)) != own:
            raise CheckpointError(f"{key} is {said}, and config.json asks for {own}", file=reader.file)
    size = reader.section("size") or ConfigReader({})
    least = reader.integer("min_pixels", size.integer("shortest_edge", size.integer("min_pixels", 56 * 56)))
    most = reader.integer("max_pixels", size.integer("longest_edge", size.integer("max_pixels", 28 * 28 * 1280)))
    if not 0 < least <= most:
        raise CheckpointError(f"a picture cannot have from {least} to {most} pixels", file=reader.file)
    return Cutting(rules, least, most, patch, merge)


@dataclass(frozen=True, slots=True)
class Marks:
    """The tokens of a picture. A chat's template writes those around it itself, and Ollama's tag stands for all."""

    start: int
    end: int
    filler: int

    def around(self, places: int) -> tuple[int, ...]:
        """A picture's expansion."""
        return (self.start, *(PLACE,) * places, self.end)


def read_marks(files: Files, encode: Encode) -> Marks:
    """The tokens of a picture.

    Raises:
        CheckpointError: the vocabulary lacks one.
    """
    none = ConfigReader({}, "tokenizer.json")
    start, end, pad = (
        processing.one_token(encode, none, name, f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad")
    )
    return Marks(start, end, ConfigReader(files.config).integer("image_token_id", pad))
