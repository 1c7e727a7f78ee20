"""CLIP's tower: a class token in front of the patches, learned positions, LayerNorms and one size of pictures.

Source: CLIP (arXiv 2103.00020); transformers v5.24 `modeling_clip` and `image_processing_pil_clip`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import read_activation
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Activation, Embedding, LayerNorm, Linear, Vector
from models.ops.vision import TowerOps
from models.vision import fixed_size, processing, vit
from models.vision.base import PLACE, Files, Pixels, Prepared
from models.vision.fixed_size import Sizes
from models.vision.processing import Floats, PixelRules

PREFIX = "vision_tower."
LAYERS = f"{PREFIX}encoder.layers."
UNUSED = (f"{PREFIX}post_layernorm.", f"{PREFIX}embeddings.position_ids")
STACKS = (Stack(r"(.*)vision_tower\.vision_model\.(.*)", (PREFIX + "{1}",), whole=True),)
"""Most checkpoints have one name more in front."""
_PATCHES, _CLASS, _POSITIONS, _KEPT = "patches", "class", "positions", "kept"
_DEFAULTS = Sizes(width=768, inner=3072, heads=12, num_layers=12, side=224, patch=32, eps=1e-5)


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole tower's."""

    patches: Linear
    class_token: Vector
    positions: Embedding
    norm: LayerNorm
    layers: tuple[vit.Layer, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a tower, and what is between the matrices of an MLP."""

    sizes: Sizes
    activation: Activation | None
    """None: x * sigmoid(1.702 * x)."""

    @property
    def num_patches(self) -> int:
        """Of a picture."""
        return self.sizes.patches_per_side**2


def read_shape(vision: ConfigReader) -> Shape:
    """Read `vision_config`.

    Raises:
        CheckpointError: a value is impossible or unsupported.
    """
    quick = vision.text("hidden_act", "quick_gelu") == "quick_gelu"
    return Shape(fixed_size.read_sizes(vision, _DEFAULTS), None if quick else read_activation(vision, "hidden_act"))


def weights(shape: Shape, count: int) -> Weights:
    """Declare the tower with its first `count` layers."""
    sizes = shape.sizes
    axes = (3, sizes.patch, sizes.patch)
    embeddings = f"{PREFIX}embeddings"
    return Weights(
        Linear(f"{embeddings}.patch_embedding", math.prod(axes), sizes.width, axes=axes),
        Vector(f"{embeddings}.class_embedding", sizes.width),
        Embedding(f"{embeddings}.position_embedding", shape.num_patches + 1, sizes.width),
        LayerNorm(f"{PREFIX}pre_layrnorm", sizes.width, sizes.eps),
        fixed_size.layers(LAYERS, sizes, count),
    )


def states(ops: TowerOps[Tensor], w: Weights, shape: Shape, groups: str = "") -> Sequence[Tensor]:
    """What no layer, one, two and so on make of the class token and the patches.

    Several pictures, each with its class token, are groups. Shapes: (1 + T, width) each.
    """
    # The class token's patch is all zeros, and only its flag is 1.
    x = ops.linear(ops.given(_PATCHES, w.patches.inputs), w.patches)
    x = ops.add(x, ops.weigh(ops.given(_CLASS, 1), w.class_token))
    x = ops.layer_norm(ops.add(x, ops.look_up(w.positions, _POSITIONS)), w.norm)
    made = [x]
    for layer in w.layers:
        x = vit.block(ops, x, layer, shape.sizes.attention, shape.activation, groups=groups)
        made.append(x)
    return made


def without_class(ops: TowerOps[Tensor], x: Tensor) -> Tensor:
    """The patches alone. Shapes: x (1 + T, D); returns (T, D)."""
    return ops.take(x, _KEPT)


def given_of(pictures: Sequence[Floats], patch: int) -> dict[str, npt.NDArray[Any]]:
    """What the tower is given of pictures of one size, one behind the other. Shapes: (H, W, 3) each."""
    patches = np.stack([processing.in_patches(values, patch) for values in pictures])
    count = patches.shape[1] + 1
    flags = np.zeros((len(pictures) * count, 1), np.float32)
    flags[::count] = 1
    return {
        _PATCHES: np.pad(patches, ((0, 0), (1, 0), (0, 0))).reshape(-1, patches.shape[2]),
        _CLASS: flags,
        _POSITIONS: np.tile(np.arange(count), len(pictures)),
    }


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    padded: bool
    """Made square first, with the mean's colour around."""
    edge: int | None
    """The shorter side is resized to so many pixels;"""
    size: tuple[int, int]
    """or None, and both sides are to these."""
    crop: tuple[int, int] | None
    """Height and width of the middle that is kept."""
    shape: Shape
    with_class: bool
    """The class token has a place too."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        pixels = self._padded(pixels) if self.padded else pixels
        height, width = pixels.shape[:2]
        size = self.size if self.edge is None else processing.shortest_edge(height, width, self.edge)
        pixels = self.rules.resized(pixels, *size)
        if self.crop is not None:
            pixels = processing.centre_crop(pixels, *self.crop)
        given = given_of([self.rules.values(pixels)], self.shape.sizes.patch)
        count = self.shape.num_patches
        if not self.with_class:
            given[_KEPT] = np.arange(1, count + 1)
        return Prepared((given,), count + 1, (PLACE,) * (count + self.with_class))

    def _padded(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        side = max(height, width)
        processing.bounded(side, side)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = [int(value * 255) for value in self.rules.mean or (0, 0, 0)]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        return square


def read_preparation(files: Files, shape: Shape, *, with_class: bool) -> Preparation:
    """How a checkpoint's processor makes pictures ready.

    Raises:
        CheckpointError: a value is impossible, or pictures come out in another size than the tower's.
    """
    images = processing.image_settings(files)
    edge, size = _sizes(images, shape.sizes.side)
    crops = images.flag("do_center_crop", default=True)
    crop = processing.read_sides(images, "crop_size", shape.sizes.side) if crops else None
    # Without a crop only a square picture has a square's size when its shorter side is resized.
    padded = images.flag("do_pad", default=False)
    final = crop or ((edge, edge) if edge is not None and padded else size)
    if final != (shape.sizes.side, shape.sizes.side):
        raise CheckpointError(f"pictures of a size other than {shape.sizes.side} are not supported", file=images.file)
    if padded and images.text("image_processor_type", "").removesuffix("Fast") != "LlavaImageProcessor":
        raise CheckpointError("do_pad is not supported", file=images.file)
    return Preparation(processing.read_rules(images), padded, edge, size, crop, shape, with_class)


def _sizes(images: ConfigReader, default: int) -> tuple[int | None, tuple[int, int]]:
    """The shorter side's pixels, or None; and then both sides'."""
    sizes = images.section("size") if isinstance(images.value("size"), dict) else None
    if sizes is None:
        return images.size("size", default), (0, 0)
    if sizes.value("shortest_edge") is not None:
        return sizes.size("shortest_edge"), (0, 0)
    return None, processing.read_sides(images, "size", default)
