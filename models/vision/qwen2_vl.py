"""Qwen2-VL's tower: LayerNorms, MLPs without a gate, and attention to the whole picture on every layer.

Source: Qwen2-VL (arXiv 2409.12191); transformers v5.24 `modeling_qwen2_vl`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.arch.base import Tensor
from models.arch.encoder_blocks import read_activation
from models.config_reader import JSON
from models.ops import Activation, LayerNorm, Linear
from models.ops.vision import TowerOps
from models.vision import qwen2_vl_gguf, qwen_tower, vit
from models.vision.base import Encode, Family, Files, Pixels, Prepared, Vision
from models.vision.qwen2_5_vl import PUBLISHED
from models.vision.qwen_pictures import Cutting, Marks, read_cutting, read_marks
from models.vision.qwen_tower import ANGLES, EPS, PATCHES, PREFIX, Merger, Shape

_NAMES = qwen_tower.names("mlp.fc1", "mlp.fc2")


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole tower's, and behind the norm what makes rows of windows."""

    patches: Linear
    layers: tuple[vit.Layer, ...]
    norm: LayerNorm
    merger: Merger


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    cutting: Cutting
    marks: Marks
    shape: Shape

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        cut = self.cutting.cut(pixels)
        given = {PATCHES: cut.values, ANGLES: cut.angles(self.shape.head_dim, self.shape.theta)}
        return Prepared((given,), len(cut.values), self.marks.around(math.prod(cut.grid)), cut.grid)


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    vision = qwen_tower.vision_of(files)
    width = vision.size("embed_dim", 1280)
    inner = int(width * vision.number("mlp_ratio", 4))
    shape = qwen_tower.shape_of(files, width, inner, vision.size("hidden_size"), patch=14, out_key="hidden_size")
    quick = vision.text("hidden_act", "quick_gelu") == "quick_gelu"
    activation = None if quick else read_activation(vision, "hidden_act")
    weights = _weights(shape)

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        return (_rows(ops, weights, shape, activation),)

    usual: Mapping[str, JSON] = {**PUBLISHED, "patch_size": shape.patch}
    cutting = read_cutting(files, usual, patch=shape.patch, merge=shape.merge, frames=shape.frames)
    marks = read_marks(files, encode)
    return Vision(qwen_tower.tower(shape, weights, forward), Preparation(cutting, marks, shape), marks.filler)


def _weights(shape: Shape) -> Weights:
    width = shape.width
    return Weights(
        qwen_tower.patches(shape, bias=False),
        tuple(
            vit.layer(f"{PREFIX}blocks.{number}", _NAMES, width, shape.inner, EPS) for number in range(shape.num_layers)
        ),
        LayerNorm(f"{PREFIX}merger.ln_q", width, EPS),
        qwen_tower.merger(shape, f"{PREFIX}merger.mlp.0", f"{PREFIX}merger.mlp.2"),
    )


def _rows(ops: TowerOps[Tensor], w: Weights, shape: Shape, activation: Activation | None) -> Tensor:
    """The rows of a picture's windows. Shapes: returns (N, out)."""
    x = qwen_tower.embedded(ops, w.patches, shape)
    for layer in w.layers:
        x = vit.block(ops, x, layer, shape.attention, activation, angles=ANGLES)
    return qwen_tower.merged(ops, ops.fold(ops.layer_norm(x, w.norm), shape.window), w.merger)


FAMILY = Family(hf=("Qwen2VLForConditionalGeneration",), build=build, gguf=qwen2_vl_gguf.LAYOUTS)
