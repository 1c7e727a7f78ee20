"""The autoencoder of FLUX.2: the usual one, its latents in patches of 2 x 2 that batch statistics normalise.

What the transformer works on are such patches: each has the latents' channels four times, in the order (channel, row,
column). Source: diffusers' AutoencoderKLFlux2 and Flux2KleinPipeline, v0.42.1.
"""

import mlx.core as mx
from mlx import nn

from models.config_reader import ConfigReader
from models.errors import UnsupportedArchitecture
from models.image.autoencoder import Autoencoder, AutoencoderConfig, read_autoencoder_config
from models.image.tiling import Tiling

PATCH = 2
"""Latents of a patch's side."""


class BatchStatistics(nn.Module):
    """Mean and variance of every patch channel, as training measured them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean = mx.zeros((channels,))
        self.running_var = mx.ones((channels,))


class Flux2Autoencoder(Autoencoder):
    """An `Autoencoder` whose latents are patches: (1, h, w, 4C) with h and w in tokens. Thread: the MLX thread."""

    def __init__(self, config: AutoencoderConfig, tiling: Tiling | None = None, *, epsilon: float) -> None:
        """Build it without weights; `epsilon` is added to the variances, `tiling` is the `Autoencoder`'s."""
        super().__init__(config, tiling)
        self._epsilon = epsilon
        self.bn = BatchStatistics(PATCH * PATCH * config.latent_channels)

    @property
    def token_channels(self) -> int:
        """The channels of a patch. Thread: any."""
        return PATCH * PATCH * self.config.latent_channels

    def unscaled(self, latents: mx.array) -> mx.array:
        """From the transformer's patches to the decoder's latents. Shapes: (1, h, w, 4C); returns (1, 2h, 2w, C)."""
        return unpatchified(latents.astype(mx.float32) * self._deviation() + self.bn.running_mean)

    def scaled(self, latents: mx.array) -> mx.array:
        """The inverse of `unscaled`."""
        return (patchified(latents) - self.bn.running_mean) / self._deviation()

    def _deviation(self) -> mx.array:
        return mx.sqrt(self.bn.running_var + self._epsilon)


def patchified(latents: mx.array) -> mx.array:
    """Shapes: (1, 2h, 2w, C); returns (1, h, w, 4C)."""
    _, height, width, channels = latents.shape
    parts = latents.reshape(height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return parts.transpose(0, 2, 4, 1, 3).reshape(1, height // PATCH, width // PATCH, -1)


def unpatchified(patches: mx.array) -> mx.array:
    """The inverse of `patchified`."""
    _, height, width, channels = patches.shape
    parts = patches.reshape(height, width, channels // PATCH**2, PATCH, PATCH)
    return parts.transpose(0, 3, 1, 4, 2).reshape(1, PATCH * height, PATCH * width, -1)


def build_autoencoder(reader: ConfigReader, tiling: Tiling | None = None) -> Flux2Autoencoder:
    """Read vae/config.json and build it, without weights.

    Raises:
        CheckpointError: a value is missing or impossible.
        UnsupportedArchitecture: its blocks or patches are of another kind.
    """
    if (reader.sizes("patch_size") or (PATCH, PATCH)) != (PATCH, PATCH):
        raise UnsupportedArchitecture("FLUX.2's autoencoder is supported with patches of 2 x 2 only")
    return Flux2Autoencoder(read_autoencoder_config(reader), tiling, epsilon=reader.number("batch_norm_eps", 1e-4))
