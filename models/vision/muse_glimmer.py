"""Muse Glimmer's tower: most layers look within windows, positions turn heads and are learned besides.

The decoder norms its embeddings, and transformers the rows of pictures alike; so the rows here are as they are before.

Source: transformers v5.24 `modeling_muse_glimmer`, `image_processing_muse_glimmer` (resizing with Pillow instead) and
`processing_muse_glimmer`; Ollama v0.34.4 `x/models/glimmer` for which of two sizes that fit alike is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.arch import build_model, kinds
from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE, read_activation
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Activation, Attention, Embedding, LayerNorm, Linear
from models.ops.vision import TowerOps
from models.vision import corners, processing, vit
from models.vision.base import PLACE, Encode, Family, Files, Given, Pixels, Prepared, Tower, Vision
from models.vision.pixtral import read_theta
from models.vision.processing import Floats, PixelRules
from models.vision.projector import working_bytes

_PREFIX = "vision_tower."
_WINDOWED = "window_attention"
_FULL_EVERY = 4
_EPS = 1e-5
_MEAN = _STD = (0.5, 0.5, 0.5)
_PATCHES, _ANGLES, _WINDOWS, _MERGED = "patches", "angles", "windows", "merged"
_NAMES = vit.Names(
    ("norm1", "norm2"), ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.proj", ("mlp.fc1", "mlp.fc2")
)


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    patches: Linear
    positions: Embedding
    """A square of them, row by row."""
    norm_before: LayerNorm
    layers: tuple[vit.Layer, ...]
    norm_behind: LayerNorm
    adapter: tuple[Linear, Linear]
    projection: Linear


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a tower."""

    width: int
    inner: int
    heads: int
    windowed: tuple[bool, ...]
    """Of each layer."""
    patch: int
    frames: int
    """How often a patch holds a picture, as it would hold a video's frames."""
    merge: int
    """Patches along the side of what becomes one row."""
    side: int
    """Of the square of positions, and of a window, in patches."""
    theta: float
    activation: Activation

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // self.heads

    @property
    def attention(self) -> Attention:
        """Of every layer."""
        return vit.attention_of(self.width, self.heads)


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    vision = whole.section("vision_config") or ConfigReader({})
    shape = _read_shape(vision)
    text = build_model(files.config).config
    weights = _weights(whole, shape, vision.number("layer_norm_eps", 1e-5), text.hidden_size)
    behind = read_activation(whole, "projector_hidden_act")

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = ops.fold(ops.take(_tower(ops, weights, shape), _MERGED), shape.merge**2, interleaved=True)
        for matrix in weights.adapter:
            x = ops.activate(ops.linear(x, matrix), behind)
        return (ops.linear(x, weights.projection),)

    tower = Tower(
        weights,
        forward,
        text.hidden_size,
        len(shape.windowed),
        (_PREFIX, "vision_adapter.", "vision_projection."),
        working_bytes(shape.width, shape.inner, shape.heads),
    )
    return Vision(tower, _read_preparation(files, encode, shape), 0)


def _read_shape(vision: ConfigReader) -> Shape:
    layers = vision.size("num_hidden_layers", 50)
    usual = [kinds.FULL if (n + 1) % _FULL_EVERY == 0 or n == layers - 1 else _WINDOWED for n in range(layers)]
    types = vision.texts("layer_types") or usual
    if len(types) != layers or not set(types) <= {kinds.FULL, _WINDOWED}:
        raise CheckpointError(f"layer_types must name {layers} known kinds of attention", file=FILE)
    shape = Shape(
        width=vision.size("hidden_size", 1536),
        inner=vision.size("intermediate_size", 8960),
        heads=vision.size("num_attention_heads", 16),
        windowed=tuple(kind == _WINDOWED for kind in types),
        patch=vision.size("patch_size", 14),
        frames=vision.size("patch_temporal", 2),
        merge=vision.size("merge_size", 2),
        side=vision.size("pos_emb_height", 32),
        theta=read_theta(vision),
        activation=read_activation(vision, "hidden_act"),
    )
    if (width := vision.size("pos_emb_width", 32)) != shape.side:
        raise CheckpointError(f"pos_emb_height {shape.side} and pos_emb_width {width} are no square", file=FILE)
    if shape.width % shape.heads or shape.head_dim % 4:
        raise CheckpointError(f"{shape.heads} heads cannot share a width of {shape.width} in fours", file=FILE)
    return shape


def _weights(whole: ConfigReader, shape: Shape, eps: float, decoder: int) -> Weights:
    width = shape.width
    merged, adapted = width * shape.merge**2, whole.size("projector_hidden_size", 4096)
    if (said := whole.size("out_hidden_size", 6144)) != merged:
        raise CheckpointError(f"out_hidden_size is {said}, and merged patches are {merged} wide", file=FILE)
    embedder = f"{_PREFIX}patch_embedder"
    return Weights(
        Linear(f"{embedder}.patch_embedding", shape.frames * 3 * shape.patch**2, width),
        Embedding(f"{embedder}.position_embedding_table", shape.side**2, width),
        LayerNorm(f"{_PREFIX}ln_pre", width, eps),
        tuple(
            vit.layer(f"{_PREFIX}layers.{number}", _NAMES, width, shape.inner, _EPS)
            for number in range(len(shape.windowed))
        ),
        LayerNorm(f"{_PREFIX}ln_post", width, eps),
        (Linear("vision_adapter.fc1", merged, adapted), Linear("vision_adapter.fc2", adapted, adapted)),
        Linear("vision_projection", adapted, decoder),
    )


def _tower(ops: TowerOps[Tensor], w: Weights, shape: Shape) -> Tensor:
    """The patches, window by window. Shapes: returns (T, width)."""
    frame = ops.given(_PATCHES, w.patches.inputs // shape.frames)
    x = ops.linear(frame if shape.frames == 1 else ops.join((frame,) * shape.frames, 1), w.patches)
    x = ops.layer_norm(corners.added(ops, x, w.positions), w.norm_before)
    for layer, windowed in zip(w.layers, shape.windowed, strict=True):
        groups = _WINDOWS if windowed else ""
        x = vit.block(ops, x, layer, shape.attention, shape.activation, groups=groups, angles=_ANGLES)
    return ops.layer_norm(x, w.norm_behind)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    shape: Shape
    most: int
    """Rows that a picture has at most."""
    begin: int
    end: int
    """The tokens around."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        patch, merge, side = self.shape.patch, self.shape.merge, self.shape.side
        height, width = pixels.shape[:2]
        down, across = _grid(height, width, patch * merge, self.most)
        rows, columns = down * merge, across * merge
        values = self.rules.values(self.rules.resized(pixels, rows * patch, columns * patch))
        order, lengths = _by_windows(rows, columns, side)
        blocks = processing.places_of(rows, columns, merge)
        given: Given = {
            _PATCHES: processing.in_patches(values, patch)[order],
            _ANGLES: self._angles(rows, columns)[order],
            _WINDOWS: lengths,
            _MERGED: np.argsort(order)[blocks[:, 0] * columns + blocks[:, 1]],
            **{name: value[order] for name, value in _corners(rows, columns, side).items()},
        }
        return Prepared((given,), rows * columns, (self.begin, *(PLACE,) * (down * across), self.end))

    def _angles(self, rows: int, columns: int) -> Floats:
        """The first half of a head's pairs turn by the column, the others by the row, both counted from 1.

        Shapes: returns (T, d / 2), patches row by row.
        """
        half = self.shape.head_dim // 2
        frequencies = (1 / self.shape.theta ** (np.arange(0, half, 2) / half)).astype(np.float32)
        places = (processing.places_of(rows, columns) + 1).astype(np.float32)
        return np.concatenate([places[:, 1:] * frequencies, places[:, :1] * frequencies], axis=1)


def _grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Rows and columns of squares of `side` pixels, at most so many, whose proportions are nearest to the picture's.

    Of two that are as near the larger counts.
    """
    rows, columns = height / side, width / side
    if rows * columns > most:
        rows = math.sqrt(most / (width / height))
        columns = rows * (width / height)
    sizes = {math.floor(rows), math.ceil(rows)}, {math.floor(columns), math.ceil(columns)}
    found = [(down, across) for down, across in product(*sizes) if down and across and down * across <= most]
    if not found:
        return max(1, round(rows)), max(1, round(columns))
    return min(found, key=lambda grid: (abs(grid[0] / grid[1] - height / width), -grid[0] * grid[1]))


def _by_windows(rows: int, columns: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The patches' numbers, counted row by row, in the order of the windows, and how many each window has.

    Shapes: returns (T,) and (windows,).
    """
    numbers = np.arange(rows * columns).reshape(rows, columns)
    starts = product(range(0, rows, side), range(0, columns, side))
    windows = [numbers[top : top + side, left : left + side].reshape(-1) for top, left in starts]
    return np.concatenate(windows), np.array([len(window) for window in windows])


def _corners(rows: int, columns: int, side: int) -> Given:
    """The four learned positions around each patch and their shares; beyond the square there is nothing.

    The model was made with rows and columns of patches mistaken for each other: the patches, counted row by row, have
    the positions of a picture that is turned, counted row by row. Shapes: int64 (T,), float32 (T, 1) each.
    """
    turned = processing.places_of(columns, rows).astype(np.float32)
    wanted = (turned + np.float32(0.5)) * np.float32(side) / np.array([columns, rows], np.float32) - np.float32(0.5)
    low = np.floor(wanted)
    near = [low.astype(np.int64) + step for step in (0, 1)]
    shares = []
    for down, right in corners.CORNERS:
        corner = np.stack([near[down][:, 0], near[right][:, 1]], axis=1)
        inside = ((corner >= 0) & (corner < side)).all(axis=1)
        shares.append((1 - np.abs(wanted - corner)).prod(axis=1) * inside)
    kept = [each.clip(0, side - 1) for each in near]
    return corners.given([each[:, 0] for each in kept], [each[:, 1] for each in kept], shares, side)


def _read_preparation(files: Files, encode: Encode, shape: Shape) -> Preparation:
    images = processing.image_settings(files)
    for key, default, own in (
        ("patch_size", 14, shape.patch),
        ("merge_size", 2, shape.merge),
        ("temporal_patch_size", 2, shape.frames),
    ):
        if (said := images.size(key, default)) != own:
            raise CheckpointError(f"{key} is {said}, and config.json asks for {own}", file=images.file)
    rules = processing.read_rules(images, resample=Image.Resampling.LANCZOS, mean=_MEAN, std=_STD)
    none = ConfigReader({}, "tokenizer.json")
    begin, end = (processing.one_token(encode, none, name, f"<|{name}|>") for name in ("image_start", "image_end"))
    return Preparation(rules, shape, images.size("max_image_tokens", 4096), begin, end)


FAMILY = Family(hf=("MuseGlimmerForConditionalGeneration",), build=build)
