"""Qwen2.5-VL's tower: most layers look around within squares of a picture, some at all of it.

Source: Qwen2.5-VL (arXiv 2502.13923); transformers v5.24 `modeling_qwen2_5_vl`, and `vision_utils` for the squares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE, read_activation
from models.config_reader import JSON
from models.errors import CheckpointError
from models.ops import Activation, Linear, Norm
from models.ops.vision import TowerOps
from models.vision import qwen2_5_vl_gguf, qwen_tower, vit
from models.vision.base import Encode, Family, Files, Pixels, Prepared, Vision
from models.vision.processing import CLIP_MEAN, CLIP_STD
from models.vision.qwen_pictures import Cutting, Marks, read_cutting, read_marks
from models.vision.qwen_tower import ANGLES, EPS, PATCHES, PREFIX, Merger, Shape

PUBLISHED: Mapping[str, JSON] = {
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "size": {"shortest_edge": 3136, "longest_edge": 12845056},
}
_SQUARES, _BACK = "squares", "back"
_NAMES = qwen_tower.names("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole tower's, and behind the norm what makes rows of windows."""

    patches: Linear
    layers: tuple[vit.GatedLayer, ...]
    norm: Norm
    merger: Merger


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    cutting: Cutting
    marks: Marks
    shape: Shape
    square: int
    """Windows along the side of a square whose patches look at each other."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        cut = self.cutting.cut(pixels)
        rows, columns = cut.grid
        order, squares = squared(rows, columns, self.square)
        window = self.shape.window
        patches = (order[:, None] * window + np.arange(window)).reshape(-1)
        given = {
            PATCHES: cut.values[patches],
            ANGLES: cut.angles(self.shape.head_dim, self.shape.theta)[patches],
            _SQUARES: squares * window,
            _BACK: np.argsort(order),
        }
        return Prepared((given,), len(patches), self.marks.around(rows * columns), cut.grid)


def squared(rows: int, columns: int, side: int) -> tuple[Whole, Whole]:
    """The windows of a grid square by square, and how many each square has; those at the edges have fewer.

    Shapes: returns (rows * columns,) and (squares,).
    """
    row, column = np.indices((rows, columns)).reshape(2, -1)
    square = row // side * -(-columns // side) + column // side
    order: Whole = np.argsort(square, kind="stable")
    return order, np.bincount(square).astype(np.int64)


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    vision, shape = qwen_tower.vision_of(files), qwen_tower.read_shape(files, patch=14)
    key = "fullatt_block_indexes"
    whole = [7, 15, 23, 31] if vision.value(key) is None else vision.integers(key)
    square = vision.size("window_size", 112) // shape.merge // shape.patch
    if square < 1:
        raise CheckpointError(f"window_size is less than a window of {shape.merge} patches", file=FILE)
    weights = _weights(shape, read_activation(vision, "hidden_act", "silu"))

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        return (_rows(ops, weights, shape, whole),)

    usual: Mapping[str, JSON] = {**PUBLISHED, "patch_size": shape.patch}
    cutting = read_cutting(files, usual, patch=shape.patch, merge=shape.merge, frames=shape.frames)
    marks = read_marks(files, encode)
    prepare = Preparation(cutting, marks, shape, square)
    return Vision(qwen_tower.tower(shape, weights, forward), prepare, marks.filler)


def _weights(shape: Shape, activation: Activation) -> Weights:
    width, biases = shape.width, {"attention_bias": True, "mlp_bias": True}
    return Weights(
        qwen_tower.patches(shape, bias=False),
        tuple(
            vit.gated_layer(
                f"{PREFIX}blocks.{number}", _NAMES, width, shape.inner, EPS, activation=activation, **biases
            )
            for number in range(shape.num_layers)
        ),
        Norm(f"{PREFIX}merger.ln_q", width, EPS),
        qwen_tower.merger(shape, f"{PREFIX}merger.mlp.0", f"{PREFIX}merger.mlp.2"),
    )


def _rows(ops: TowerOps[Tensor], w: Weights, shape: Shape, whole: Sequence[int]) -> Tensor:
    """The rows of a picture's windows. Shapes: returns (N, out)."""
    x = qwen_tower.embedded(ops, w.patches, shape)
    for number, layer in enumerate(w.layers):
        groups = "" if number in whole else _SQUARES
        x = vit.gated_block(ops, x, layer, shape.attention, groups=groups, angles=ANGLES)
    windows = ops.fold(ops.rms_norm(x, w.norm), shape.window)
    return ops.take(qwen_tower.merged(ops, windows, w.merger), _BACK)


FAMILY = Family(hf=("Qwen2_5_VLForConditionalGeneration",), build=build, gguf=qwen2_5_vl_gguf.LAYOUTS)
