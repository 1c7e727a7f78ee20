"""Qwen3-VL's tower: learned positions stretched over a picture, and rows from several depths.

Source: Qwen3-VL (arXiv 2511.21631); DeepStack (arXiv 2406.04334); transformers v5.24 `modeling_qwen3_vl`, and
`vision_utils` for how positions are stretched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE, read_activation
from models.config_reader import JSON
from models.errors import CheckpointError
from models.ops import Activation, Embedding, LayerNorm, Linear
from models.ops.vision import TowerOps
from models.vision import corners, processing, qwen3_vl_gguf, qwen_tower, vit
from models.vision.base import Encode, Family, Files, Given, Pixels, Prepared, Vision
from models.vision.qwen_pictures import Cutting, Marks, Patches, read_cutting, read_marks
from models.vision.qwen_tower import ANGLES, EPS, PATCHES, PREFIX, Merger, Shape

PUBLISHED: Mapping[str, JSON] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
}
_NAMES = qwen_tower.names("mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True, slots=True)
class Exit:
    """Where rows are made. The norm is of a token's width, or of a whole window's."""

    norm: LayerNorm
    merger: Merger


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole tower's, and what makes rows of what it says at its end and before."""

    patches: Linear
    positions: Embedding
    layers: tuple[vit.Layer, ...]
    end: Exit
    deep: tuple[Exit, ...]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    cutting: Cutting
    marks: Marks
    shape: Shape
    side: int
    """Of the square of learned positions."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        cut = self.cutting.cut(pixels)
        given = {
            PATCHES: cut.values,
            ANGLES: cut.angles(self.shape.head_dim, self.shape.theta),
            **stretched(cut, self.side),
        }
        return Prepared((given,), len(cut.values), self.marks.around(math.prod(cut.grid)), cut.grid)


def stretched(cut: Patches, side: int) -> Given:
    """Between which four of the learned positions each patch lies, and how much each of them counts.

    The corners of the picture are the corners of the square of positions. Shapes: int64 (T,), float32 (T, 1) each.
    """
    places = processing.places_of(cut.rows, cut.columns, cut.merge)
    last = np.maximum(np.array([cut.rows, cut.columns]) - 1, 1).astype(np.float32)
    exact = places.astype(np.float32) * np.float32(side - 1) / last
    return corners.between(exact, side)


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    vision, shape = qwen_tower.vision_of(files), qwen_tower.read_shape(files, patch=16)
    activation = read_activation(vision, "hidden_act", "gelu_pytorch_tanh")
    exits = vision.integers("deepstack_visual_indexes")
    if exits != sorted(set(exits) & set(range(shape.num_layers))):
        raise CheckpointError(f"deepstack_visual_indexes {exits} names no layers in order", file=FILE)
    positions = vision.size("num_position_embeddings", 2304)
    weights = _weights(shape, positions, len(exits))

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        return _rows(ops, weights, shape, exits, activation)

    usual: Mapping[str, JSON] = {**PUBLISHED, "patch_size": shape.patch}
    cutting = read_cutting(files, usual, patch=shape.patch, merge=shape.merge, frames=shape.frames)
    marks = read_marks(files, encode)
    prepare = Preparation(cutting, marks, shape, math.isqrt(positions))
    return Vision(qwen_tower.tower(shape, weights, forward, len(exits)), prepare, marks.filler)


def _weights(shape: Shape, positions: int, exits: int) -> Weights:
    width, whole = shape.width, shape.width * shape.window

    def way_out(name: str, normed: int) -> Exit:
        merger = qwen_tower.merger(shape, f"{name}.linear_fc1", f"{name}.linear_fc2")
        return Exit(LayerNorm(f"{name}.norm", normed, EPS), merger)

    return Weights(
        qwen_tower.patches(shape, bias=True),
        Embedding(f"{PREFIX}pos_embed", positions, width),
        tuple(
            vit.layer(f"{PREFIX}blocks.{number}", _NAMES, width, shape.inner, EPS) for number in range(shape.num_layers)
        ),
        way_out(f"{PREFIX}merger", width),
        tuple(way_out(f"{PREFIX}deepstack_merger_list.{number}", whole) for number in range(exits)),
    )


def _rows(
    ops: TowerOps[Tensor], w: Weights, shape: Shape, exits: Sequence[int], activation: Activation
) -> Sequence[Tensor]:
    """The rows of a picture's windows, at the tower's end and behind each exit. Shapes: (N, out) each."""
    x = corners.added(ops, qwen_tower.embedded(ops, w.patches, shape), w.positions)
    deep: list[Tensor] = []
    for number, layer in enumerate(w.layers):
        x = vit.block(ops, x, layer, shape.attention, activation, angles=ANGLES)
        if number in exits:
            own = w.deep[len(deep)]
            deep.append(qwen_tower.merged(ops, ops.layer_norm(ops.fold(x, shape.window), own.norm), own.merger))
    return (qwen_tower.merged(ops, ops.fold(ops.layer_norm(x, w.end.norm), shape.window), w.end.merger), *deep)


FAMILY = Family(
    hf=("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
    build=build,
    gguf=qwen3_vl_gguf.LAYOUTS,
)
