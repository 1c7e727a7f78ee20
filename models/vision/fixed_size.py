"""Towers for pictures of one size, as CLIP and SigLIP say theirs: their sizes, and the names within a layer.

Source: transformers v5.24 `modeling_clip` and `modeling_siglip`.
"""

from dataclasses import dataclass

from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Attention
from models.vision import processing, vit
from models.vision.vit import attention_of

_NAMES = vit.Names(
    ("layer_norm1", "layer_norm2"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.out_proj",
    ("mlp.fc1", "mlp.fc2"),
)


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
        return attention_of(self.width, self.heads)


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


def layers(prefix: str, sizes: Sizes, count: int) -> tuple[vit.Layer, ...]:
    """Declare the first so many layers, whose names begin so."""
    return tuple(vit.layer(f"{prefix}{number}", _NAMES, sizes.width, sizes.inner, sizes.eps) for number in range(count))
