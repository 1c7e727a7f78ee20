"""Encoder and decoder in the form that is fast on a CPU: numpy arrays, a BLAS, and one thread for each core.

Owns the weights that it takes from `models.image.autoencoder_blocks`, lent by MLX in the layout of the products; the
modules are empty afterwards. At most three pictures
are in memory at once: a residual block's input, its middle and, where the widths differ, its output.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from models.gemm import Crew, Gemm, chunks
from models.host import lend
from models.image import autoencoder_blocks as blocks
from models.image import winograd
from models.image.convolution import Conv2d
from models.image.host_convolution import Affine, Convolver, FeatureMap, Floats, Kernel, norm, project

QUERIES = 128
"""So many places attend at once: their scores stay in the cache."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A group norm's weights."""

    weight: Floats
    bias: Floats
    groups: int

    def __call__(self, crew: Crew, x: FeatureMap) -> Affine:
        """What normalising `x` comes to."""
        return norm(crew, x, self.weight, self.bias, self.groups)


@dataclass(frozen=True, slots=True)
class Resnet:
    """A residual block."""

    norm1: Norm
    conv1: Kernel
    norm2: Norm
    conv2: Kernel
    shortcut: Kernel | None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Attention's weights; matrices are (in, out), and q has taken in the scale."""

    norm: Norm
    qkv: Kernel
    out: Kernel


@dataclass(frozen=True, slots=True)
class Level:
    """Residual blocks of one size, and the convolution that leads to the next."""

    resnets: list[Resnet]
    resize: Kernel | None


@dataclass(frozen=True, slots=True)
class Weights:
    """An encoder or decoder."""

    conv_in: Kernel
    mid: list[Resnet]
    attention: AttentionWeights | None
    levels: list[Level]
    norm_out: Norm
    conv_out: Kernel


class HostNetwork:
    """A whole encoder or decoder. Thread: the MLX thread."""

    def __init__(self, gemm: Gemm, network: blocks.Encoder | blocks.Decoder) -> None:
        """Take the weights out of `network`, layer by layer."""
        self._gemm = gemm
        self._encodes = isinstance(network, blocks.Encoder)
        self._weights = _weights(network)
        self._resize = winograd.downsampling() if self._encodes else winograd.upsampling()
        self._plain = winograd.plain()

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (1, H, W, I); returns (1, H', W', O)."""
        with Crew(self._gemm) as crew:
            result = _Pass(crew, Convolver(crew, self._plain), Convolver(crew, self._resize)).run(
                self._weights, FeatureMap.copy_of(lend(x)[0]), encodes=self._encodes
            )
        return mx.array(result.inside)[None]


@dataclass(frozen=True, slots=True)
class _Pass:
    """One picture's way through the network."""

    crew: Crew
    convolve: Convolver
    resize: Convolver

    def run(self, weights: Weights, x: FeatureMap, *, encodes: bool) -> FeatureMap:
        x = self.convolve(x, weights.conv_in)
        if not encodes:
            x = self.middle(weights, x)
        for level in weights.levels:
            for resnet in level.resnets:
                x = self.resnet(resnet, x)
            if level.resize is not None:
                x = self.resize(x, level.resize)
        if encodes:
            x = self.middle(weights, x)
        return self.convolve(x, weights.conv_out, weights.norm_out(self.crew, x))

    def middle(self, weights: Weights, x: FeatureMap) -> FeatureMap:
        x = self.resnet(weights.mid[0], x)
        if weights.attention is not None:
            self.attend(weights.attention, x)
        return self.resnet(weights.mid[1], x)

    def resnet(self, weights: Resnet, x: FeatureMap) -> FeatureMap:
        """Without a shortcut the result takes the place of `x`."""
        middle = self.convolve(x, weights.conv1, weights.norm1(self.crew, x))
        onto = x if weights.shortcut is None else project(self.crew, x, weights.shortcut)
        return self.convolve(middle, weights.conv2, weights.norm2(self.crew, middle), onto)

    def attend(self, weights: AttentionWeights, x: FeatureMap) -> None:
        """Add to each place what it finds at all others. Scores are held for a few queries at a time."""
        affine, gemm, channels = weights.norm(self.crew, x), self.crew.gemm, x.channels
        places = x.height * x.width
        qkv = np.empty((places, 3 * channels), np.float32)
        rows = chunks(x.height, max(1, QUERIES // x.width))

        def project_rows(_: int, part: slice) -> None:
            normed = (x.inside[part] * affine.scale + affine.shift).reshape(-1, channels)
            result = qkv[part.start * x.width : part.stop * x.width]
            gemm.multiply(normed, weights.qkv.matrices[0], result)
            result += weights.qkv.bias

        keys, values = qkv[:, channels : 2 * channels], qkv[:, 2 * channels :]

        def attend_rows(_: int, part: slice) -> None:
            queries = qkv[part.start * x.width : part.stop * x.width, :channels]
            scores = np.empty((len(queries), places), np.float32)
            gemm.multiply(queries, keys, scores, transpose_b=True)
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            attended, result = np.empty((2, len(queries), channels), np.float32)
            gemm.multiply(scores, values, attended)
            gemm.multiply(attended, weights.out.matrices[0], result)
            result += weights.out.bias
            target = x.inside[part]
            target += result.reshape(target.shape)

        self.crew.share(project_rows, rows)
        self.crew.share(attend_rows, rows)


def _weights(network: blocks.Encoder | blocks.Decoder) -> Weights:
    """Take everything out of the modules."""
    stages: list[blocks.DownBlock] | list[blocks.UpBlock]
    stages = network.down_blocks if isinstance(network, blocks.Encoder) else network.up_blocks
    mid = network.mid_block
    return Weights(
        conv_in=_kernel(network.conv_in),
        mid=[_resnet(each) for each in mid.resnets],
        attention=_attention(mid.attentions[0]) if "attentions" in mid else None,
        levels=[Level([_resnet(each) for each in stage.resnets], _resize(stage)) for stage in stages],
        norm_out=_norm(network.conv_norm_out),
        conv_out=_kernel(network.conv_out),
    )


def _resize(stage: blocks.DownBlock | blocks.UpBlock) -> Kernel | None:
    if isinstance(stage, blocks.DownBlock):
        return _kernel(stage.downsamplers[0].conv) if "downsamplers" in stage else None
    return _kernel(stage.upsamplers[0].conv) if "upsamplers" in stage else None


def _resnet(module: blocks.ResnetBlock) -> Resnet:
    return Resnet(
        norm1=_norm(module.norm1),
        conv1=_kernel(module.conv1),
        norm2=_norm(module.norm2),
        conv2=_kernel(module.conv2),
        shortcut=_kernel(module.conv_shortcut) if "conv_shortcut" in module else None,
    )


def _attention(module: blocks.Attention) -> AttentionWeights:
    query, key, value, out = module.to_q, module.to_k, module.to_v, module.to_out[0]
    scale = query.weight.shape[0] ** -0.5
    weight = mx.concatenate([query.weight * scale, key.weight, value.weight]).T
    bias = mx.concatenate([query.bias * scale, key.bias, value.bias])
    taken = AttentionWeights(
        norm=_norm(module.group_norm),
        qkv=Kernel(_lent(weight)[None], _lent(bias)),
        out=Kernel(_lent(out.weight.T)[None], _lent(out.bias)),
    )
    for each in (query, key, value, out):
        each.clear()
    return taken


def _norm(module: blocks.GroupNorm) -> Norm:
    return Norm(_lent(module.weight), _lent(module.bias), module.groups)


def _kernel(module: Conv2d) -> Kernel:
    outputs, inputs, height, width = module.weight.shape
    matrices = _lent(module.weight.transpose(2, 3, 1, 0).reshape(height * width, inputs, outputs))
    taken = Kernel(matrices, _lent(module.bias))
    module.clear()
    return taken


def _lent(array: mx.array) -> Floats:
    """A copy in rows that MLX keeps account of."""
    return lend(mx.contiguous(array.astype(mx.float32)))
