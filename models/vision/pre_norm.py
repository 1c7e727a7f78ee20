"""The blocks of a vision transformer as CLIP and SigLIP have them: norms in front, biases everywhere, no gate.

Source: ViT (arXiv 2010.11929); transformers v5.24 `modeling_siglip` for the names of tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Attention, Joined, LayerNorm, Linear
from models.ops.vision import TowerOps
from models.vision import processing


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a tower."""

    width: int
    inner: int
    heads: int
    num_layers: int
    side: int
    """Pixels of a picture's side,"""
    patch: int
    """and of a patch's."""
    eps: float

    @property
    def patches_per_side(self) -> int:
        """Rows of patches, and columns."""
        return self.side // self.patch

    @property
    def attention(self) -> Attention:
        """Of every layer."""
        head_dim = self.width // self.heads
        return Attention(self.heads, self.heads, head_dim, head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each behind a norm and beside a residual."""

    norm1: LayerNorm
    qkv: Joined
    out: Linear
    norm2: LayerNorm
    up: Linear
    down: Linear


def read_sizes(vision: ConfigReader, default: Sizes) -> Sizes:
    """Read `vision_config`.

    Raises:
        CheckpointError: a value is impossible, or pictures have not three channels.
    """
    sizes = Sizes(
        width=vision.size("hidden_size", default.width),
        inner=vision.size("intermediate_size", default.inner),
        heads=vision.size("num_attention_heads", default.heads),
        num_layers=vision.size("num_hidden_layers", default.num_layers),
        side=processing.read_square(vision, "image_size", default.side),
        patch=processing.read_square(vision, "patch_size", default.patch),
        eps=vision.number("layer_norm_eps", default.eps),
    )
    if vision.integer("num_channels", 3) != 3:
        raise CheckpointError("num_channels other than 3 is not supported", file=FILE)
    if sizes.width % sizes.heads:
        raise CheckpointError(f"a width of {sizes.width} has no {sizes.heads} heads", file=FILE)
    return sizes


def layer(name: str, sizes: Sizes) -> Layer:
    """Declare the layer of that name."""
    width, attention = sizes.width, f"{name}.self_attn"
    qkv = Joined(tuple(Linear(f"{attention}.{part}_proj", width, width, bias=True) for part in "qkv"), precise=True)
    return Layer(
        LayerNorm(f"{name}.layer_norm1", width, sizes.eps),
        qkv,
        Linear(f"{attention}.out_proj", width, width, bias=True),
        LayerNorm(f"{name}.layer_norm2", width, sizes.eps),
        Linear(f"{name}.mlp.fc1", width, sizes.inner, bias=True),
        Linear(f"{name}.mlp.fc2", sizes.inner, width, bias=True),
    )


def block(
    ops: TowerOps[Tensor],
    x: Tensor,
    w: Layer,
    sizes: Sizes,
    activate: Callable[[TowerOps[Tensor], Tensor], Tensor],
    *,
    groups: str = "",
) -> Tensor:
    """One layer, in which groups of tokens look at themselves alone. Shapes: x (T, width); returns the same."""
    q, k, v = ops.split(ops.linear(ops.layer_norm(x, w.norm1), w.qkv), (sizes.width,) * 3)
    x = ops.add(x, ops.linear(ops.look_around(q, k, v, sizes.attention, groups), w.out))
    inner = activate(ops, ops.linear(ops.layer_norm(x, w.norm2), w.up))
    return ops.add(x, ops.linear(inner, w.down))
