"""What making a picture takes beyond the weights, told from sizes alone. Touches no MLX."""

from collections.abc import Sequence

from models.image.autoencoder import AutoencoderConfig
from models.image.flux2.config import TransformerConfig

_FULL_SIZE_ARRAYS = 5
"""Arrays of the widest channels at full size that the autoencoder holds at once."""


def denoising_bytes(config: TransformerConfig, lengths: Sequence[int], *, itemsize: int, scores: int) -> int:
    """A step's peak.

    Args:
        config: the transformer's.
        lengths: tokens of the text, the picture, and each reference.
        itemsize: bytes of a number.
        scores: attention scores that are held at the same time; 0 where a kernel holds none.
    """
    length = sum(lengths)
    # The stream, its norm, what goes through one block's widest matrix, and what comes out of that.
    numbers = length * (2 * config.dim + 4 * config.dim + 3 * config.mlp_dim)
    rotations = 8 * length * config.head_dim // 2
    return numbers * itemsize + 4 * scores + rotations


def autoencoder_bytes(config: AutoencoderConfig, pixels: int) -> int:
    """The peak of encoding or decoding so many pixels at once."""
    widest = max(config.block_out_channels[:2] + config.decoder_block_out_channels[:2])
    return 4 * pixels * widest * _FULL_SIZE_ARRAYS
