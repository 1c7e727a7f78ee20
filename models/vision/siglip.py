"""SigLIP's tower: patches with learned positions, pre-norm layers, a norm behind them; no class token.

Source: SigLIP (arXiv 2303.15343); transformers v5.24 `modeling_siglip`.
"""

import math
from dataclasses import dataclass

from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import read_activation
from models.config_reader import ConfigReader
from models.ops import Activation, Embedding, LayerNorm, Linear
from models.ops.vision import TowerOps
from models.vision import fixed_size, vit
from models.vision.fixed_size import Sizes

PATCHES, POSITIONS = "patches", "positions"
"""What a pass is given: float32 (T, 3 * patch * patch), and the rows of the table of positions (T,)."""
DEFAULTS = Sizes(width=768, inner=3072, heads=12, num_layers=12, side=224, patch=16, eps=1e-6)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a tower, and what is between the matrices of an MLP."""

    sizes: Sizes
    activation: Activation


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole tower's."""

    patches: Linear
    positions: Embedding
    layers: tuple[vit.Layer, ...]
    norm: LayerNorm


def read_shape(vision: ConfigReader, default: Sizes = DEFAULTS) -> Shape:
    """Read `vision_config`.

    Raises:
        CheckpointError: a value is impossible or unsupported.
    """
    return Shape(fixed_size.read_sizes(vision, default), read_activation(vision, "hidden_act", "gelu_pytorch_tanh"))


def weights(shape: Shape, prefix: str) -> Weights:
    """Declare the tower whose tensors' names begin so."""
    sizes = shape.sizes
    axes = (3, sizes.patch, sizes.patch)
    return Weights(
        Linear(f"{prefix}embeddings.patch_embedding", math.prod(axes), sizes.width, bias=True, axes=axes),
        Embedding(f"{prefix}embeddings.position_embedding", sizes.patches_per_side**2, sizes.width),
        fixed_size.layers(f"{prefix}encoder.layers.", sizes, sizes.num_layers),
        LayerNorm(f"{prefix}post_layernorm", sizes.width, sizes.eps),
    )


def stacks(prefix: str) -> tuple[Stack, ...]:
    """That most checkpoints have one name more behind the prefix."""
    pattern = rf"(.*){prefix.replace('.', '[.]')}vision_model\.(.*)"
    return (Stack(pattern, (f"{prefix}{{1}}",), whole=True),)


def forward(ops: TowerOps[Tensor], w: Weights, shape: Shape) -> Tensor:
    """What the tower makes of a pass's patches. Shapes: returns (T, width)."""
    x = ops.linear(ops.given(PATCHES, w.patches.inputs), w.patches)
    x = ops.add(x, ops.look_up(w.positions, POSITIONS))
    for layer in w.layers:
        x = vit.block(ops, x, layer, shape.sizes.attention, shape.activation)
    return ops.layer_norm(x, w.norm)
