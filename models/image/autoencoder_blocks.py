"""The blocks of a convolutional autoencoder, as checkpoints have them and as MLX computes them.

Attribute names are the checkpoints' tensor names (diffusers' AutoencoderKL, v0.42.1). Everything is float32 and NHWC.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
from mlx import nn

from models.image.autoencoder_config import AutoencoderConfig
from models.image.convolution import Conv2d
from models.image.gemm import chunks
from models.image.tiling import Tiling

EPSILON = 1e-6
"""Added to the variance in every norm."""

SCORES = 1 << 24
"""Attention scores that are held at once; where there would be more, queries are taken in parts."""


class Rows(Protocol):
    """A map of channels that gives rows of itself in float32: held, or computed when it is asked."""

    @property
    def height(self) -> int:
        """In pixels."""
        ...

    @property
    def width(self) -> int:
        """In pixels."""
        ...

    def __call__(self, start: int, stop: int) -> mx.array:
        """Shapes: returns float32 (B, stop - start, W, C)."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A map in memory, float32 or bfloat16 (B, H, W, C)."""

    data: mx.array

    @property
    def height(self) -> int:
        """See `Rows`."""
        return self.data.shape[1]

    @property
    def width(self) -> int:
        """See `Rows`."""
        return self.data.shape[2]

    def __call__(self, start: int, stop: int) -> mx.array:
        """See `Rows`."""
        return self.data[:, start:stop].astype(mx.float32)


def strips_of(height: int, width: int, channels: int, tiling: Tiling | None) -> list[slice]:
    """The strips of a map; one where there is no `tiling`."""
    return chunks(height, height if tiling is None else tiling.strip_rows(width, channels))


def joined(strips: Sequence[slice], part: Callable[[slice], mx.array], *, half: bool) -> Held:
    """A map made strip by strip; held in bfloat16 if `half`."""
    if not half:
        return Held(part(strips[0]) if len(strips) == 1 else mx.concatenate([part(strip) for strip in strips], axis=1))
    parts = []
    for strip in strips:
        parts.append(part(strip).astype(mx.bfloat16))
        mx.eval(parts)
    return Held(mx.concatenate(parts, axis=1))


class GroupNorm(nn.Module):
    """Normalises groups of neighbouring channels over the whole picture."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.groups = groups

    def affine(self, x: Rows, strips: Sequence[slice]) -> tuple[mx.array, mx.array]:
        """What normalising comes to: a scale and a shift for each channel. Shapes: (C,) both."""
        counts, means, squares = [], [], []
        for strip in strips:
            grouped = x(strip.start, strip.stop).reshape(-1, self.groups, self.weight.size // self.groups)
            mean = mx.mean(grouped, axis=(0, 2), keepdims=True)
            square = mx.mean(mx.square(grouped - mean), axis=(0, 2))
            if len(strips) > 1:
                mx.eval(mean, square)
            counts.append((strip.stop - strip.start) / x.height)
            means.append(mean[0, :, 0])
            squares.append(square)
        share, each = mx.array(counts)[:, None], mx.stack(means)
        mean = mx.sum(share * each, axis=0)
        variance = mx.sum(share * (mx.stack(squares) + mx.square(each - mean)), axis=0)
        width = self.weight.size // self.groups
        scale = mx.repeat(mx.rsqrt(variance + EPSILON), width) * self.weight
        return scale, self.bias - mx.repeat(mean, width) * scale


class DenseLinear(nn.Linear):
    """A linear layer that is never quantised: `models.image.weights` quantises `nn.Linear` itself, not its kin."""


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

    def __call__(self, x: Rows, tiling: Tiling | None = None) -> Held:
        """Shapes: (B, H, W, inputs); returns (B, H, W, outputs)."""
        middle = active_convolved(x, self.norm1, self.conv1, tiling)

        def residual(strip: slice) -> mx.array:
            rows = x(strip.start, strip.stop)
            return self.conv_shortcut(rows) if "conv_shortcut" in self else rows

        return active_convolved(middle, self.norm2, self.conv2, tiling, residual)


def active_convolved(
    x: Rows,
    norm: GroupNorm,
    conv: Conv2d,
    tiling: Tiling | None,
    residual: Callable[[slice], mx.array] | None = None,
) -> Held:
    """Norm, SiLU, a 3 x 3 convolution, and a residual. Shapes: (B, H, W, I); returns (B, H, W, O)."""
    strips = strips_of(x.height, x.width, norm.weight.size, tiling)
    scale, shift = norm.affine(x, strips)

    def convolve(strip: slice) -> mx.array:
        # The padding belongs around what comes out of SiLU.
        start, stop = max(strip.start - 1, 0), min(strip.stop + 1, x.height)
        active = nn.silu(x(start, stop) * scale + shift)
        above, below = start - (strip.start - 1), strip.stop + 1 - stop
        out = conv(mx.pad(active, [(0, 0), (above, below), (0, 0), (0, 0)]), padded=True)
        return out if residual is None else out + residual(strip)

    return joined(strips, convolve, half=tiling is not None)


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
        scale, shift = self.group_norm.affine(Held(x), [slice(0, height)])
        h = (x * scale + shift).reshape(batch, places, channels)
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

    def __call__(self, x: Held) -> Held:
        """Shapes: (B, H, W, C), the same back."""
        x = self.resnets[0](x)
        if "attentions" in self:
            x = Held(self.attentions[0](x.data))
        return self.resnets[1](x)


class Downsampler(nn.Module):
    """Half the width and height; pads right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, stride=2)

    def __call__(self, x: Held, tiling: Tiling | None = None) -> Held:
        """Shapes: (B, H, W, C); returns (B, H / 2, W / 2, C)."""
        strips = strips_of(x.height // 2, x.width // 2, x.data.shape[-1], tiling)

        def convolve(strip: slice) -> mx.array:
            stop = min(2 * strip.stop + 1, x.height)
            below = 2 * strip.stop + 1 - stop
            return self.conv(mx.pad(x(2 * strip.start, stop), [(0, 0), (0, below), (0, 1), (0, 0)]))

        return joined(strips, convolve, half=tiling is not None)


class Upsampler(nn.Module):
    """Twice the width and height: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, padding=1)


@dataclass(frozen=True, slots=True)
class Grown:
    """What an upsampler makes of a map, computed whenever rows of it are asked for."""

    source: Held
    upsampler: Upsampler

    @property
    def height(self) -> int:
        """See `Rows`."""
        return 2 * self.source.height

    @property
    def width(self) -> int:
        """See `Rows`."""
        return 2 * self.source.width

    def __call__(self, start: int, stop: int) -> mx.array:
        """See `Rows`."""
        first, last = max(start - 1, 0), min(stop + 1, self.height)
        rows = self.source(first // 2, -(-last // 2))
        batch, height, width, channels = rows.shape
        wide = mx.broadcast_to(rows[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        wide = wide.reshape(batch, 2 * height, 2 * width, channels)[:, first % 2 :][:, : last - first]
        above, below = first - (start - 1), stop + 1 - last
        return self.upsampler.conv(mx.pad(wide, [(0, 0), (above, below), (0, 0), (0, 0)]), padded=True)


class DownBlock(nn.Module):
    """Residual blocks, and a downsampler unless it is the last."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, layers: int, last: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(inputs if n == 0 else outputs, outputs, groups) for n in range(layers)]
        if not last:
            self.downsamplers = [Downsampler(outputs)]


class UpBlock(nn.Module):
    """Residual blocks, and an upsampler unless it is the last."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, layers: int, last: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(inputs if n == 0 else outputs, outputs, groups) for n in range(layers)]
        if not last:
            self.upsamplers = [Upsampler(outputs)]


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

    def steps(self, picture: mx.array, tiling: Tiling | None) -> Iterator[mx.array | None]:
        """Run it: None after each unit of work where there is a `tiling`, at last the result.

        Shapes: picture (B, H, W, 3); the result (B, h, w, 2C).
        """
        levels = len(self.down_blocks)
        x = Held(self.conv_in(picture))
        for number, block in enumerate(self.down_blocks):
            # The first levels are the large ones.
            cut = tiling if number < levels - levels // 2 else None
            for resnet in block.resnets:
                x = resnet(x, cut)
                yield from settled(x, tiling)
            if "downsamplers" in block:
                x = block.downsamplers[0](x, cut)
        x = self.mid_block(x)
        yield active_convolved(x, self.conv_norm_out, self.conv_out, None).data


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

    def steps(self, latents: mx.array, tiling: Tiling | None) -> Iterator[mx.array | None]:
        """Run it: None after each unit of work where there is a `tiling`, at last the result.

        Shapes: latents (B, h, w, C); the result (B, H, W, 3).
        """
        x: Rows = self.mid_block(Held(self.conv_in(latents)))
        for number, block in enumerate(self.up_blocks):
            cut = None if number < len(self.up_blocks) // 2 else tiling
            for resnet in block.resnets:
                held = resnet(Held(x(0, x.height)) if cut is None else x, cut)
                yield from settled(held, tiling)
                x = held
            if "upsamplers" in block:
                x = Grown(held, block.upsamplers[0])
        assert isinstance(x, Held)
        yield active_convolved(x, self.conv_norm_out, self.conv_out, tiling).data.astype(mx.float32)


def settled(x: Held, tiling: Tiling | None) -> Iterator[None]:
    """Wait for a map, and let the work be given up here, where there is a `tiling`."""
    if tiling is not None:
        mx.eval(x.data)
        yield None
