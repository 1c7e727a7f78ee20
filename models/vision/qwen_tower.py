"""What the towers of the Qwens that see have in common: patches of several frames, and attention that turns by places.

Source: Qwen2-VL (arXiv 2409.12191); transformers v5.24 `modeling_qwen2_5_vl` and `modeling_qwen3_vl`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models.arch import build_model
from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Attention, Linear
from models.ops.vision import TowerOps
from models.vision.base import Files, Tower
from models.vision.pixtral import read_theta
from models.vision.projector import working_bytes
from models.vision.vit import Names, attention_of

PREFIX = "visual."
EPS = 1e-6
"""Of every norm, whatever a configuration says."""

_CHANNELS = 3
_PREFIXES = (PREFIX, "vision_tower.")
_STACKS = (Stack(r"(?:model\.)?vision_tower\.(.+)", (f"{PREFIX}{{0}}",), whole=True),)
"""MLX's converters call it otherwise."""
PATCHES, ANGLES = "patches", "angles"
"""What every picture is given as."""


def names(*mlp: str) -> Names:
    """A layer's names, those of its MLP given."""
    return Names(("norm1", "norm2"), ("attn.qkv",), "attn.proj", mlp)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a tower."""

    width: int
    inner: int
    heads: int
    num_layers: int
    patch: int
    """Pixels of a patch's side."""
    merge: int
    """Patches along the side of a window that becomes one row."""
    frames: int
    """How often a patch holds a picture, as it would hold a video's frames."""
    out: int
    """The width of a row, which is the decoder's."""
    theta: float

    @property
    def window(self) -> int:
        """Patches that become one row."""
        return self.merge**2

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // self.heads

    @property
    def attention(self) -> Attention:
        """Of every layer."""
        return attention_of(self.width, self.heads)


def read_shape(files: Files, *, patch: int) -> Shape:
    """Read config.json's `vision_config`; a patch's side is where it does not say.

    Raises:
        CheckpointError: a value is missing, impossible or unsupported.
    """
    vision = vision_of(files)
    sides = (vision.size("hidden_size"), vision.size("intermediate_size"), vision.size("out_hidden_size"))
    return shape_of(files, *sides, patch=patch, out_key="out_hidden_size")


def vision_of(files: Files) -> ConfigReader:
    """What config.json says of the tower."""
    return ConfigReader(files.config).section("vision_config") or ConfigReader({})


def shape_of(files: Files, width: int, inner: int, out: int, *, patch: int, out_key: str) -> Shape:
    """A shape of these sizes; the last one's key is for messages. Raises CheckpointError as `read_shape` does."""
    vision = vision_of(files)
    shape = Shape(
        width,
        inner,
        vision.size("num_heads", 16),
        vision.size("depth"),
        vision.size("patch_size", patch),
        vision.size("spatial_merge_size", 2),
        vision.size("temporal_patch_size", 2),
        out,
        read_theta(vision),
    )
    if vision.integer("in_channels", vision.integer("in_chans", _CHANNELS)) != _CHANNELS:
        raise CheckpointError(f"in_channels other than {_CHANNELS} is not supported", file=FILE)
    if width % shape.heads or shape.head_dim % 4:
        raise CheckpointError(f"{shape.heads} heads cannot share a width of {width} in fours", file=FILE)
    if (hidden := build_model(files.config).config.hidden_size) != out:
        raise CheckpointError(f"{out_key} is {out}, and the text model's width {hidden}", file=FILE)
    return shape


def patches(shape: Shape, *, bias: bool) -> Linear:
    """Declare what makes a token of a patch."""
    axes = (_CHANNELS, shape.frames, shape.patch, shape.patch)
    return Linear(f"{PREFIX}patch_embed.proj", math.prod(axes), shape.width, bias, axes=axes)


def embedded(ops: TowerOps[Tensor], w: Linear, shape: Shape) -> Tensor:
    """The tokens of a picture, all of whose frames are alike. Shapes: returns (T, width)."""
    given = ops.given(PATCHES, w.inputs // shape.frames)
    return ops.linear(given if shape.frames == 1 else ops.join((given,) * shape.frames, _CHANNELS), w)


@dataclass(frozen=True, slots=True)
class Merger:
    """What makes a row of a window, behind a norm."""

    up: Linear
    down: Linear


def merger(shape: Shape, up: str, down: str) -> Merger:
    """Declare it by the names of its two matrices."""
    whole = shape.width * shape.window
    return Merger(Linear(up, whole, whole, bias=True), Linear(down, whole, shape.out, bias=True))


def merged(ops: TowerOps[Tensor], windows: Tensor, w: Merger) -> Tensor:
    """Shapes: windows (N, window * width), normed; returns (N, out)."""
    return ops.linear(ops.activate(ops.linear(windows, w.up), "gelu"), w.down)


def tower(shape: Shape, weights: object, forward: Callable[[TowerOps[Any]], Sequence[Any]], deep: int = 0) -> Tower:
    """The tower with these weights."""
    predicted = working_bytes(shape.width, shape.inner, shape.heads)
    return Tower(weights, forward, shape.out, shape.num_layers, _PREFIXES, predicted, deep, _STACKS)
