"""The blocks of a convolutional autoencoder, as checkpoints have them and as MLX computes them.

Attribute names are the checkpoints' tensor names (diffusers' AutoencoderKL, v0.42.1). Everything is float32 and NHWC.
"""

import mlx.core as mx
from mlx import nn

from models.image.autoencoder_config import AutoencoderConfig
from models.image.convolution import Conv2d

EPSILON = 1e-6
"""Added to the variance in every norm."""

SCORES = 1 << 24
"""Attention scores that are held at once; where there would be more, queries are taken in parts."""


class GroupNorm(nn.Module):
    """Normalises groups of neighbouring channels over the whole picture."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.groups = groups

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, C), the same back."""
        grouped = x.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        mean = mx.mean(grouped, axis=(1, 3), keepdims=True)
        centred = grouped - mean
        variance = mx.mean(mx.square(centred), axis=(1, 3), keepdims=True)
        return (centred * mx.rsqrt(variance + EPSILON)).reshape(x.shape) * self.weight + self.bias


class DenseLinear(nn.Linear):
    """A linear layer that is never quantised: `models.weights` quantises `nn.Linear` itself, not its kin."""


class ResnetBlock(nn.Module):
    """Two convolutions, each behind norm and SiLU, beside a residual."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = Conv2d(inputs, outputs, padding=1)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = Conv2d(outputs, outputs, padding=1)
        if inputs != outputs:
            self.conv_shortcut = Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, inputs); returns (B, H, W, outputs)."""
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + h


class Attention(nn.Module):
    """Every place of the picture attends to all; one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(channels, groups)
        self.to_q = DenseLinear(channels, channels)
        self.to_k = DenseLinear(channels, channels)
        self.to_v = DenseLinear(channels, channels)
        self.to_out = [DenseLinear(channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, C), the same back."""
        batch, height, width, channels = x.shape
        places = height * width
        h = self.group_norm(x).reshape(batch, places, channels)
        queries, keys, values = self.to_q(h) * channels**-0.5, self.to_k(h).swapaxes(1, 2), self.to_v(h)
        part = max(1, SCORES // places)
        attended = [
            mx.softmax(queries[:, start : start + part] @ keys, axis=-1) @ values for start in range(0, places, part)
        ]
        out: mx.array = self.to_out[0](mx.concatenate(attended, axis=1))
        return x + out.reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention where the model has it, residual block."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        if attention:
            self.attentions = [Attention(channels, groups)]

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, C), the same back."""
        x = self.resnets[0](x)
        if "attentions" in self:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsampler(nn.Module):
    """Half the width and height; pads right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, C); returns (B, H / 2, W / 2, C)."""
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsampler(nn.Module):
    """Twice the width and height: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, C); returns (B, 2H, 2W, C)."""
        batch, height, width, channels = x.shape
        wide = mx.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return self.conv(wide.reshape(batch, 2 * height, 2 * width, channels))


class DownBlock(nn.Module):
    """Residual blocks, and a downsampler unless it is the last."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, layers: int, last: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(inputs if n == 0 else outputs, outputs, groups) for n in range(layers)]
        if not last:
            self.downsamplers = [Downsampler(outputs)]

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, inputs); returns (B, H', W', outputs)."""
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if "downsamplers" in self else x


class UpBlock(nn.Module):
    """Residual blocks, and an upsampler unless it is the last."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, layers: int, last: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(inputs if n == 0 else outputs, outputs, groups) for n in range(layers)]
        if not last:
            self.upsamplers = [Upsampler(outputs)]

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, inputs); returns (B, H', W', outputs)."""
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if "upsamplers" in self else x


class Encoder(nn.Module):
    """From a picture to the moments of its latents' distribution, mean first."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(3, widths[0], padding=1)
        self.down_blocks = [
            DownBlock(widths[max(n - 1, 0)], width, groups, layers=config.layers_per_block, last=n == len(widths) - 1)
            for n, width in enumerate(widths)
        ]
        self.mid_block = MidBlock(widths[-1], groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, H, W, 3); returns (B, h, w, 2C)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """From latents to a picture."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.decoder_block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention=config.mid_block_add_attention)
        layers = config.layers_per_block + 1
        self.up_blocks = [
            UpBlock(widths[max(n - 1, 0)], width, groups, layers=layers, last=n == len(widths) - 1)
            for n, width in enumerate(widths)
        ]
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv2d(widths[-1], 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (B, h, w, C); returns (B, H, W, 3)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))
