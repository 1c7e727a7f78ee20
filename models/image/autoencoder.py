"""The convolutional autoencoder of latent diffusion models: pictures to latents and back.

Attribute names are the checkpoints' tensor names (diffusers' AutoencoderKL, v0.42.1). Everything is float32 and NHWC.
Families whose latents are scaled in another way override `Autoencoder.unscaled` and `scaled`.
"""

from collections.abc import Iterator

import mlx.core as mx
from mlx import nn

from models.device import device
from models.host import to_uint8
from models.image.autoencoder_blocks import Decoder, Encoder
from models.image.autoencoder_config import AutoencoderConfig, read_autoencoder_config
from models.image.autoencoder_memory import peak_bytes
from models.image.base import Pixels
from models.image.convolution import Conv2d
from models.image.gemm import host_gemm
from models.image.host_autoencoder import HostNetwork
from models.image.tiling import Tiling

__all__ = ["Autoencoder", "AutoencoderConfig", "read_autoencoder_config", "to_pixels"]


class Autoencoder(nn.Module):
    """Encoder and decoder of one VAE. `prepare` must run after its weights are loaded. Thread: the MLX thread."""

    def __init__(self, config: AutoencoderConfig, tiling: Tiling | None = None) -> None:
        """Build it without weights; `tiling` says from which size on pictures are taken in strips."""
        super().__init__()
        self._config = config
        self._tiling = tiling or Tiling()
        self._host_encoder: HostNetwork | None = None
        self._host_decoder: HostNetwork | None = None
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(2 * latent, 2 * latent, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(latent, latent, 1)

    @property
    def on_host(self) -> bool:
        """Whether `prepare` chose numpy arrays."""
        return self._host_decoder is not None

    @property
    def config(self) -> AutoencoderConfig:
        """What it was built from. Thread: any."""
        return self._config

    def working_bytes(self, height: int, width: int) -> int:
        """The peak of encoding or decoding so many pixels, beyond the weights. Thread: any; touches no MLX."""
        return peak_bytes(self._config, self._tiling, height, width, on_host=self.on_host)

    def prepare(self, *, on_host: bool | None = None) -> None:
        """Bring the loaded weights to the form that is computed in.

        Args:
            on_host: on numpy arrays, which a CPU with a fast BLAS is best at, or in MLX's graph; None lets the device
                decide.
        """
        if on_host is None:
            on_host = device().kind == "cpu"
        if on_host and (gemm := host_gemm()) is not None:
            self._host_encoder, self._host_decoder = (HostNetwork(gemm, each) for each in (self.encoder, self.decoder))
        for module in self.modules():
            if isinstance(module, Conv2d) and "weight" in module:
                module.prepare()

    def unscaled(self, latents: mx.array) -> mx.array:
        """From what the transformer works on to what the decoder takes. Shapes: as `decode`; returns (1, h, w, C)."""
        return latents.astype(mx.float32) / self._config.scaling_factor + self._config.shift_factor

    def scaled(self, latents: mx.array) -> mx.array:
        """The inverse of `unscaled`."""
        return (latents - self._config.shift_factor) * self._config.scaling_factor

    def decode(self, latents: mx.array) -> mx.array:
        """Shapes: latents (1, h, w, C); returns the picture (1, H, W, 3), about -1 to 1."""
        (picture,) = (step for step in self.decode_steps(latents) if step is not None)
        return picture

    def decode_steps(self, latents: mx.array) -> Iterator[mx.array | None]:
        """`decode` in pieces: None after each, at last the picture. It may be given up at any of them."""
        x = self.unscaled(latents)
        if self._config.use_post_quant_conv:
            x = self.post_quant_conv(x)
        tiling = self._tiling if self._tiling.applies(x.shape[1], x.shape[2]) else None
        return (self._host_decoder or self.decoder).steps(x, tiling)

    def encode(self, picture: mx.array) -> mx.array:
        """The mean of the latents' distribution.

        Shapes: picture (1, H, W, 3), -1 to 1, sides multiples of the scale; returns (1, h, w, C).
        """
        height, width = (side // self._config.downscale for side in picture.shape[1:3])
        tiling = self._tiling if self._tiling.applies(height, width) else None
        steps = (self._host_encoder or self.encoder).steps(picture.astype(mx.float32), tiling)
        (moments,) = (step for step in steps if step is not None)
        if self._config.use_quant_conv:
            moments = self.quant_conv(moments)
        return self.scaled(moments[..., : self._config.latent_channels])


def to_pixels(picture: mx.array) -> Pixels:
    """Wait for a picture of -1 to 1 and round it to bytes. Shapes: (1, H, W, 3); returns (H, W, 3)."""
    return to_uint8(mx.round(mx.clip(picture[0] * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(mx.uint8))
