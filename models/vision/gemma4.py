"""Gemma 4's tower: patches with a position of two tables, heads of which half turn by column and half by row.

Norms on queries, keys and values, matrices whose inputs and outputs are clipped, and a mean over squares of patches.

Source: transformers v5.24 `modeling_gemma4` and `image_processing_pil_gemma4`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.arch import build_model
from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import FILE, read_activation
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Activation, Attention, Embedding, Joined, Linear, Norm, Vector
from models.ops.vision import TowerOps
from models.vision import processing
from models.vision.base import PLACE, Encode, Family, Files, PictureError, Pixels, Prepared, Tower, Vision
from models.vision.processing import Floats, PixelRules
from models.vision.projector import working_bytes

_PREFIX = "vision_tower."
_BUDGETS = (70, 140, 280, 560, 1120)
_TABLE = "patch_embedder.position_embedding_table"
_STACKS = (Stack(rf"(.*){_TABLE}", (f"{_PREFIX}{_TABLE}.weight",), flat=True, whole=True),)
_PATCHES, _ONES = "patches", "ones"
_COLUMNS, _ROWS = "columns", "rows"
_COLUMN_ANGLES, _ROW_ANGLES = "column_angles", "row_angles"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a matrix's inputs and outputs are clipped to."""

    input_min: Vector
    input_max: Vector
    output_min: Vector
    output_max: Vector


@dataclass(frozen=True, slots=True)
class Clipped:
    """A matrix between two clips; several of the same input are one where nothing is clipped."""

    matrix: Joined | Linear
    limits: Limits | None


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each between two norms and beside a residual."""

    norm1: Norm
    qkv: tuple[Clipped, ...]
    q_norm: Norm
    k_norm: Norm
    v_norm: Norm
    out: Clipped
    norm1_behind: Norm
    norm2: Norm
    gate_up: tuple[Clipped, ...]
    down: Clipped
    norm2_behind: Norm


@dataclass(frozen=True, slots=True)
class Standard:
    """What is subtracted from pooled patches, and what the rest is multiplied by."""

    bias: Vector
    scale: Vector


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    patches: Linear
    positions: Embedding
    """Columns' rows, and behind them rows'."""
    layers: tuple[Layer, ...]
    standard: Standard | None
    norm: Norm
    projection: Linear


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a tower."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    num_layers: int
    patch: int
    """Pixels of a patch's side."""
    window: int
    """Patches of a side of what is pooled."""
    positions: int
    theta: float
    eps: float
    activation: Activation
    clips: bool
    standardizes: bool

    @property
    def attention(self) -> Attention:
        """Of every layer."""
        return Attention(self.heads, self.kv_heads, self.head_dim, 1.0)


def build(files: Files, encode: Encode) -> Vision:  # noqa: ARG001 - config.json has all tokens
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    shape = _read_shape(whole.section("vision_config") or ConfigReader({}))
    text = build_model(files.config).config
    weights = _weights(shape, text.hidden_size)

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        # The decoder multiplies embeddings by this, and pictures' rows not.
        return (ops.scale(_forward(ops, weights, shape), text.hidden_size**-0.5),)

    tower = Tower(
        weights,
        forward,
        text.hidden_size,
        shape.num_layers,
        (_PREFIX, "embed_vision."),
        working_bytes(max(shape.width, shape.heads * shape.head_dim), shape.inner, shape.heads),
        stacks=_STACKS,
    )
    decoder = whole.section("text_config") or ConfigReader({})
    prepare = _read_preparation(files, whole, shape)
    looks_both_ways = decoder.text("use_bidirectional_attention", "") == "vision"
    return Vision(
        tower,
        prepare,
        decoder.integer("pad_token_id", 0),
        prepare.budget if looks_both_ways else None,
    )


def _read_shape(vision: ConfigReader) -> Shape:
    rope = vision.section("rope_parameters") or ConfigReader({})
    if (kind := rope.text("rope_type", "axial")) not in ("axial", "default"):
        raise CheckpointError(f"rope_type {kind!r} of a vision tower is not supported", file=FILE)
    shape = Shape(
        width=vision.size("hidden_size", 768),
        inner=vision.size("intermediate_size", 3072),
        heads=vision.size("num_attention_heads", 12),
        kv_heads=vision.size("num_key_value_heads", 12),
        head_dim=vision.size("head_dim", 64),
        num_layers=vision.size("num_hidden_layers", 16),
        patch=vision.size("patch_size", 16),
        window=vision.size("pooling_kernel_size", 3),
        positions=vision.size("position_embedding_size", 10240),
        theta=rope.number("rope_theta", vision.number("rope_theta", 100.0)),
        eps=vision.number("rms_norm_eps", 1e-6),
        activation=read_activation(vision, "hidden_activation", "gelu_pytorch_tanh"),
        clips=vision.flag("use_clipped_linears", default=False),
        standardizes=vision.flag("standardize", default=False),
    )
    if shape.heads % shape.kv_heads or shape.head_dim % 4:
        raise CheckpointError(f"{shape.heads} heads of {shape.head_dim} cannot share {shape.kv_heads}", file=FILE)
    if shape.theta <= 1:
        raise CheckpointError(f"rope_theta must be above 1, not {shape.theta}", file=FILE)
    return shape


def _weights(shape: Shape, width: int) -> Weights:
    embedder = f"{_PREFIX}patch_embedder"
    standard = Standard(Vector(f"{_PREFIX}std_bias", shape.width), Vector(f"{_PREFIX}std_scale", shape.width))
    return Weights(
        Linear(f"{embedder}.input_proj", 3 * shape.patch**2, shape.width),
        Embedding(f"{_PREFIX}{_TABLE}", 2 * shape.positions, shape.width),
        tuple(_layer(shape, f"{_PREFIX}encoder.layers.{number}") for number in range(shape.num_layers)),
        standard if shape.standardizes else None,
        Norm("", shape.width, shape.eps),
        Linear("embed_vision.embedding_projection", shape.width, width),
    )


def _layer(shape: Shape, name: str) -> Layer:
    width, inner, head_dim = shape.width, shape.inner, shape.head_dim
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    queries, keys = shape.heads * head_dim, shape.kv_heads * head_dim

    def norm(part: str) -> Norm:
        return Norm(f"{name}.{part}", width, shape.eps)

    def of_one_input(prefix: str, parts: dict[str, int], *, precise: bool = False) -> tuple[Clipped, ...]:
        if shape.clips:
            return tuple(_clipped(shape, f"{prefix}.{part}_proj", width, rows) for part, rows in parts.items())
        linears = tuple(Linear(f"{prefix}.{part}_proj.linear", width, rows) for part, rows in parts.items())
        return (Clipped(Joined(linears, precise), None),)

    return Layer(
        norm("input_layernorm"),
        of_one_input(attention, {"q": queries, "k": keys, "v": keys}, precise=True),
        Norm(f"{attention}.q_norm", head_dim, shape.eps),
        Norm(f"{attention}.k_norm", head_dim, shape.eps),
        Norm("", head_dim, shape.eps),
        _clipped(shape, f"{attention}.o_proj", queries, width),
        norm("post_attention_layernorm"),
        norm("pre_feedforward_layernorm"),
        of_one_input(mlp, {"gate": inner, "up": inner}),
        _clipped(shape, f"{mlp}.down_proj", inner, width),
        norm("post_feedforward_layernorm"),
    )


def _clipped(shape: Shape, name: str, inputs: int, outputs: int) -> Clipped:
    def limit(part: str) -> Vector:
        return Vector(f"{name}.{part}", 1, as_number=True)

    limits = Limits(limit("input_min"), limit("input_max"), limit("output_min"), limit("output_max"))
    return Clipped(Linear(f"{name}.linear", inputs, outputs), limits if shape.clips else None)


def _forward(ops: TowerOps[Tensor], w: Weights, shape: Shape) -> Tensor:
    """The rows as the decoder's layers take them. Shapes: returns (N, its width)."""
    places = ops.add(ops.look_up(w.positions, _COLUMNS), ops.look_up(w.positions, _ROWS))
    x = ops.add(ops.linear(ops.given(_PATCHES, w.patches.inputs), w.patches), places)
    for layer in w.layers:
        looked = _attention(ops, ops.rms_norm(x, layer.norm1), layer, shape)
        x = ops.add(x, ops.rms_norm(looked, layer.norm1_behind))
        gate, up = _products(ops, ops.rms_norm(x, layer.norm2), layer.gate_up)
        made = _product(ops, ops.glu(gate, up, shape.activation), layer.down)
        x = ops.add(x, ops.rms_norm(made, layer.norm2_behind))
    x = ops.scale(ops.pool(x, shape.window**2), shape.width**0.5)
    if w.standard is not None:
        less = ops.scale(ops.weigh(ops.given(_ONES, 1), w.standard.bias), -1.0)
        x = ops.weigh(ops.add(x, less), w.standard.scale)
    return ops.linear(ops.rms_norm(x, w.norm), w.projection)


def _attention(ops: TowerOps[Tensor], x: Tensor, w: Layer, shape: Shape) -> Tensor:
    """Shapes: x (T, D); returns (T, D)."""
    q, k, v = _products(ops, x, w.qkv)
    q = _turned(ops, ops.rms_norm(q, w.q_norm), shape.heads, shape.head_dim)
    k = _turned(ops, ops.rms_norm(k, w.k_norm), shape.kv_heads, shape.head_dim)
    return _product(ops, ops.look_around(q, k, ops.rms_norm(v, w.v_norm), shape.attention), w.out)


def _turned(ops: TowerOps[Tensor], x: Tensor, heads: int, head_dim: int) -> Tensor:
    """The first half of each head turned by the patch's column, the second by its row."""
    first, second = ops.split(x, (head_dim // 2,) * 2, heads)
    return ops.join((ops.turn(first, heads, _COLUMN_ANGLES), ops.turn(second, heads, _ROW_ANGLES)), heads)


def _products(ops: TowerOps[Tensor], x: Tensor, matrices: Sequence[Clipped]) -> Sequence[Tensor]:
    first = matrices[0].matrix
    if isinstance(first, Joined):
        return ops.split(ops.linear(x, first), first.sizes)
    return [_product(ops, x, each) for each in matrices]


def _product(ops: TowerOps[Tensor], x: Tensor, w: Clipped) -> Tensor:
    if w.limits is None:
        return ops.linear(x, w.matrix)
    made = ops.linear(ops.clip(x, w.limits.input_min, w.limits.input_max), w.matrix)
    return ops.clip(made, w.limits.output_min, w.limits.output_max)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    shape: Shape
    budget: int
    """Rows that a picture has at most."""
    begin: int
    end: int
    """The tokens around."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        patch, window = self.shape.patch, self.shape.window
        side = patch * window
        rows, columns = places_within(self.budget, side, *pixels.shape[:2])
        if max(rows, columns) * window > self.shape.positions:
            raise PictureError("the picture is too long for its width: the model has no positions for it")
        values = self.rules.values(self.rules.resized(pixels, rows * side, columns * side))
        patches = processing.in_patches(values, patch, window, channels_last=True)
        places = processing.places_of(rows * window, columns * window, window)
        given = {
            _PATCHES: np.float32(2) * (patches - np.float32(0.5)),
            _COLUMNS: places[:, 1],
            _ROWS: places[:, 0] + self.shape.positions,
            _COLUMN_ANGLES: self._angles(places[:, 1:]),
            _ROW_ANGLES: self._angles(places[:, :1]),
        }
        if self.shape.standardizes:
            given[_ONES] = np.ones((rows * columns, 1), np.float32)
        return Prepared((given,), len(patches), (self.begin, *(PLACE,) * (rows * columns), self.end))

    def _angles(self, places: npt.NDArray[np.int64]) -> Floats:
        """Shapes: places (T, 1); returns (T, d / 4)."""
        half = self.shape.head_dim // 2
        frequencies = (1 / self.shape.theta ** (np.arange(0, half, 2) / half)).astype(np.float32)
        return places.astype(np.float32) * frequencies


def places_within(budget: int, side: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of places of `side` pixels: as many as fit in the picture's proportions, one at least."""
    factor = math.sqrt(budget * side**2 / (height * width))
    rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
    if not rows:
        return 1, min(width // height, budget)
    if not columns:
        return min(height // width, budget), 1
    return rows, columns


def read_budget(images: ConfigReader, patch: int, window: int) -> int:
    """How many rows a picture has at most.

    Raises:
        CheckpointError: it is none that the models know, or places are not those of config.json.
    """
    budget = images.size("max_soft_tokens", 280)
    if budget not in _BUDGETS:
        raise CheckpointError(f"max_soft_tokens must be one of {_BUDGETS}, not {budget}", file=images.file)
    said = (images.size("patch_size", patch), images.size("pooling_kernel_size", window))
    if said != (patch, window):
        raise CheckpointError(f"patch_size and pooling_kernel_size {said} are not config.json's", file=images.file)
    return budget


def read_bytes(images: ConfigReader) -> PixelRules:
    """How bytes become numbers from 0 to 1. Raises CheckpointError."""
    return processing.read_rules(images, mean=(0.0,) * 3, std=(1.0,) * 3, normalizes=False)


def tokens_around(whole: ConfigReader) -> tuple[int, int]:
    """The tokens in front of a picture's places and behind them. Raises CheckpointError."""
    return whole.integer("boi_token_id", 255999), whole.integer("eoi_token_id", 258882)


def _read_preparation(files: Files, whole: ConfigReader, shape: Shape) -> Preparation:
    images = processing.image_settings(files)
    budget = read_budget(images, shape.patch, shape.window)
    return Preparation(read_bytes(images), shape, budget, *tokens_around(whole))


FAMILY = Family(hf=("Gemma4ForConditionalGeneration",), build=build)
