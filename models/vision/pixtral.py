"""Pixtral's tower: pictures of any size, two-dimensional rope, RMSNorm and gated MLPs.

Source: Pixtral 12B (arXiv 2410.07073); transformers v5.24 `modeling_pixtral`, `image_processing_pil_pixtral` and
`processing_pixtral`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import FILE, read_activation
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Attention, Linear, Norm
from models.ops.vision import TowerOps
from models.vision import processing, vit
from models.vision.base import PLACE, Encode, Files, Pixels, Prepared
from models.vision.processing import Floats, PixelRules

PREFIX = "vision_tower."
LAYERS = f"{PREFIX}transformer.layers."
STACKS = (Stack(r"(?:model\.)?vision_tower\.vision_model\.(.*)", (PREFIX + "{0}",), whole=True),)
"""MLX's converters have one name more in front."""
_EPS = 1e-5
_PATCHES, _ANGLES = "patches", "angles"
_NAMES = vit.Names(
    ("attention_norm", "ffn_norm"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.o_proj",
    ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
)


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole tower's."""

    patches: Linear
    norm: Norm
    layers: tuple[vit.GatedLayer, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a tower."""

    width: int
    inner: int
    heads: int
    num_layers: int
    patch: int
    """Pixels of a patch's side."""
    theta: float

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // self.heads

    @property
    def attention(self) -> Attention:
        """Of every layer."""
        return vit.attention_of(self.width, self.heads)


def read_shape(vision: ConfigReader) -> Shape:
    """Read `vision_config`.

    Raises:
        CheckpointError: a value is impossible or unsupported.
    """
    shape = Shape(
        width=vision.size("hidden_size", 1024),
        inner=vision.size("intermediate_size", 4096),
        heads=vision.size("num_attention_heads", 16),
        num_layers=vision.size("num_hidden_layers", 24),
        patch=processing.read_square(vision, "patch_size", 16),
        theta=read_theta(vision),
    )
    if vision.integer("num_channels", 3) != 3:
        raise CheckpointError("num_channels other than 3 is not supported", file=FILE)
    if shape.width % shape.heads or shape.head_dim % 4 or vision.size("head_dim", shape.head_dim) != shape.head_dim:
        raise CheckpointError(f"{shape.heads} heads of a width of {shape.width} have no such head_dim", file=FILE)
    return shape


def weights(vision: ConfigReader, shape: Shape, count: int) -> Weights:
    """Declare the tower with its first `count` layers. Raises CheckpointError for an unknown activation."""
    activation = read_activation(vision, "hidden_act")
    width, axes = shape.width, (3, shape.patch, shape.patch)
    return Weights(
        Linear(f"{PREFIX}patch_conv", math.prod(axes), width, axes=axes),
        Norm(f"{PREFIX}ln_pre", width, _EPS),
        tuple(
            vit.gated_layer(f"{LAYERS}{number}", _NAMES, width, shape.inner, _EPS, activation=activation)
            for number in range(count)
        ),
    )


def states(ops: TowerOps[Tensor], w: Weights, shape: Shape) -> Sequence[Tensor]:
    """What no layer, one, two and so on make of a pass's patches. Shapes: (T, width) each."""
    x = ops.rms_norm(ops.linear(ops.given(_PATCHES, w.patches.inputs), w.patches), w.norm)
    made = [x]
    for layer in w.layers:
        x = vit.gated_block(ops, x, layer, shape.attention, angles=_ANGLES)
        made.append(x)
    return made


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready for a tower whose rows stand for `merge` x `merge` patches each. Thread: any."""

    rules: PixelRules
    most: tuple[int, int]
    """Height and width that no picture exceeds, but by what is missing to a whole patch."""
    shape: Shape
    merge: int
    row_end: int
    """The token behind each row of places,"""
    picture_end: int
    """and that behind the last."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        patch, merge = self.shape.patch, self.merge
        rows, columns = self._places(*pixels.shape[:2])
        values = self.rules.values(self.rules.resized(pixels, rows * merge * patch, columns * merge * patch))
        given = {
            _PATCHES: processing.in_patches(values, patch, merge),
            _ANGLES: self._angles(rows * merge, columns * merge),
        }
        row = (*(PLACE,) * columns, self.row_end)
        expansion = (*(row * rows)[:-1], self.picture_end)
        return Prepared((given,), rows * columns * merge**2, expansion)

    def _places(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a picture's places: one at least, where transformers fails with a picture too narrow."""
        ratio = max(height / self.most[0], width / self.most[1])
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        side = self.shape.patch * self.merge
        return max(-(-height // side), 1), max(-(-width // side), 1)

    def _angles(self, rows: int, columns: int) -> Floats:
        """Rows turn by every other frequency from the first on, columns by the rest. Shapes: returns (T, d / 2)."""
        dims = self.shape.head_dim
        frequencies = (1 / self.shape.theta ** (np.arange(0, dims, 2) / dims)).astype(np.float32)
        places = processing.places_of(rows, columns, self.merge).astype(np.float32)
        return np.concatenate([places[:, :1] * frequencies[::2], places[:, 1:] * frequencies[1::2]], axis=1)


def read_preparation(files: Files, encode: Encode, shape: Shape, merge: int) -> Preparation:
    """How a checkpoint's processor makes pictures ready.

    Raises:
        CheckpointError: a value is impossible or unsupported.
    """
    processor, images = processing.processor_settings(files), processing.image_settings(files)
    patch = processing.read_square(processor, "patch_size", shape.patch)
    said = (patch, processor.size("spatial_merge_size", merge))
    if said[0] * said[1] != shape.patch * merge:
        raise CheckpointError(f"places of {said} pixels and patches are not config.json's", file=processor.file)
    if images.flag("do_center_crop", default=False):
        raise CheckpointError("do_center_crop is not supported", file=images.file)
    return Preparation(
        processing.read_rules(images),
        _most(images),
        shape,
        merge,
        processing.one_token(encode, processor, "image_break_token", "[IMG_BREAK]"),
        processing.one_token(encode, processor, "image_end_token", "[IMG_END]"),
    )


def _most(images: ConfigReader) -> tuple[int, int]:
    sizes = images.section("size") if isinstance(images.value("size"), dict) else None
    if sizes is not None and sizes.value("longest_edge") is None:
        return processing.read_sides(images, "size", 1024)
    longest = images.size("size", 1024) if sizes is None else sizes.size("longest_edge")
    return longest, longest


def read_theta(vision: ConfigReader) -> float:
    """The base of a tower whose positions are rows and columns. Raises CheckpointError for another kind of rope."""
    rope = vision.section("rope_parameters") or vision.section("rope_scaling") or ConfigReader({})
    if (kind := rope.text("rope_type", rope.text("type", "axial"))) not in ("axial", "default"):
        raise CheckpointError(f"rope_type {kind!r} of a vision tower is not supported", file=FILE)
    theta = rope.number("rope_theta", vision.number("rope_theta", 10000.0))
    if theta <= 1:
        raise CheckpointError(f"rope_theta must be above 1, not {theta}", file=FILE)
    return theta
