"""Encoder and decoder in the form that is fast on a CPU: numpy arrays, a BLAS, and one thread for each core.

Owns the weights that it takes from `models.image.autoencoder_blocks`, lent by MLX in the layout of the products; the
modules are empty afterwards. At most three pictures
are in memory at once: a residual block's input, its middle and, where the widths differ, its output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from models.host import lend
from models.image import autoencoder_blocks as blocks
from models.image import winograd
from models.image.convolution import Conv2d
from models.image.feature_map import FeatureMap, Floats
from models.image.gemm import Crew, Gemm, chunks
from models.image.host_convolution import Affine, Convolver, Kernel, Planes, Tally, project, store
from models.image.tiling import Tiling

QUERIES = 128
"""So many places attend at once: their scores stay in the cache."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A group norm's weights."""

    weight: Floats
    bias: Floats
    groups: int


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


Unit: TypeAlias = "Callable[[_Pass, FeatureMap], FeatureMap]"
"""What is done between two moments at which the work can be given up."""


class HostNetwork:
    """A whole encoder or decoder. Thread: the MLX thread."""

    def __init__(self, gemm: Gemm, network: blocks.Encoder | blocks.Decoder) -> None:
        """Take the weights out of `network`, layer by layer."""
        self._gemm = gemm
        self._encodes = isinstance(network, blocks.Encoder)
        self._weights = _weights(network)
        self._resize = winograd.downsampling() if self._encodes else winograd.upsampling()
        self._plain = winograd.plain()

    def steps(self, x: mx.array, tiling: Tiling | None) -> Iterator[mx.array | None]:
        """Run it: None after each unit of work, at last the result.

        Shapes: x (1, H, W, I); the result (1, H', W', O).

        Args:
            x: a picture, or latents.
            tiling: how large maps are cut; None holds all of them whole.
        """
        units = self._encoding(tiling) if self._encodes else self._decoding(tiling)
        current = FeatureMap.copy_of(lend(x)[0])
        for unit in units:
            with Crew(self._gemm) as crew:
                current = unit(_Pass(crew, Convolver(crew, self._plain), Convolver(crew, self._resize)), current)
            yield None
        yield mx.array(current.inside)[None]

    def _encoding(self, tiling: Tiling | None) -> Iterator[Unit]:
        weights, levels = self._weights, self._weights.levels
        # The first levels are the large ones.
        large = 0 if tiling is None else len(levels) - len(levels) // 2
        yield lambda run, x: run.convolve(x, weights.conv_in, half=large > 0)
        for number, level in enumerate(levels):
            half = number < large
            for resnet in level.resnets:
                yield partial(_Pass.resnet, weights=resnet, half=half)
            if (resize := level.resize) is not None:
                yield partial(_Pass.shrink, kernel=resize, half=number + 1 < large)
        yield from self._middle()
        yield lambda run, x: run.finish(x, weights)

    def _decoding(self, tiling: Tiling | None) -> Iterator[Unit]:
        weights, levels = self._weights, self._weights.levels
        small = len(levels) if tiling is None else len(levels) // 2
        yield lambda run, x: run.convolve(x, weights.conv_in)
        yield from self._middle()
        resize: Kernel | None = None
        for number, level in enumerate(levels):
            first, *rest = level.resnets
            if resize is None:
                yield partial(_Pass.resnet, weights=first)
            elif tiling is None or number < small:
                yield partial(_Pass.grow, kernel=resize)
                yield partial(_Pass.resnet, weights=first)
            else:
                yield partial(_Pass.grow_in_strips, kernel=resize, weights=first, tiling=tiling)
            for resnet in rest:
                yield partial(_Pass.resnet, weights=resnet, half=number >= small)
            resize = level.resize
        yield lambda run, x: run.finish(x, weights)

    def _middle(self) -> Iterator[Unit]:
        first, second = self._weights.mid
        yield partial(_Pass.resnet, weights=first)
        if (attention := self._weights.attention) is not None:
            yield partial(_Pass.attend, weights=attention)
        yield partial(_Pass.resnet, weights=second)


@dataclass(frozen=True, slots=True)
class _Pass:
    """The units of work, with the threads that share it."""

    crew: Crew
    convolve: Convolver
    resize: Convolver

    def resnet(self, x: FeatureMap, *, weights: Resnet, half: bool = False) -> FeatureMap:
        """Without a shortcut the result takes the place of `x`."""
        middle = self.convolve(x, weights.conv1, self.norm(weights.norm1, x), half=half)
        onto = x if weights.shortcut is None else project(self.crew, x, weights.shortcut, half=half)
        return self.convolve(middle, weights.conv2, self.norm(weights.norm2, middle), onto=onto)

    def grow(self, x: FeatureMap, *, kernel: Kernel) -> FeatureMap:
        """Shapes: (h, w, C); returns (2h, 2w, C)."""
        return self.resize(x, kernel)

    def shrink(self, x: FeatureMap, *, kernel: Kernel, half: bool) -> FeatureMap:
        """Shapes: (H, W, C); returns (H / 2, W / 2, C)."""
        return self.resize(x, kernel, half=half)

    def grow_in_strips(self, x: FeatureMap, *, kernel: Kernel, weights: Resnet, tiling: Tiling) -> FeatureMap:
        """`grow` and `resnet`, the map between them made twice, strip by strip, and never held.

        Shapes: (h, w, I); returns (2h, 2w, O), held in bfloat16.
        """
        grown, first = self.resize.planes(kernel), self.convolve.planes(weights.conv1)
        strips = chunks(x.height, max(1, tiling.strip_rows(4 * x.width, x.channels)))
        tally = Tally(self.crew)
        for strip in strips:
            piece, own = self._grown_strip(x, strip, grown)
            tally.add(piece, own)
        affine = tally.moments(weights.norm1.groups).affine(weights.norm1.weight, weights.norm1.bias)
        outputs = first.stack.shape[2]
        middle, out = (FeatureMap.empty(2 * x.height, 2 * x.width, outputs, half=True) for _ in range(2))
        for strip in strips:
            piece, own = self._grown_strip(x, strip, grown)
            rows = slice(2 * strip.start, 2 * strip.stop)
            residual = piece if weights.shortcut is None else project(self.crew, piece, weights.shortcut)
            store(residual.inside[own].copy(), out, rows)
            store(self.convolve(piece, first, affine).inside[own].copy(), middle, rows)
        return self.convolve(middle, weights.conv2, self.norm(weights.norm2, middle), onto=out)

    def _grown_strip(self, x: FeatureMap, strip: slice, planes: Planes) -> tuple[FeatureMap, slice]:
        """Some rows twice as large, with a margin of a row or two, and which of them are without it."""
        above, below = min(strip.start, 1), min(x.height - strip.stop, 1)
        piece = self.resize(x.rows(slice(strip.start - above, strip.stop + below)), planes)
        return piece, slice(2 * above, piece.height - 2 * below)

    def norm(self, weights: Norm, x: FeatureMap) -> Affine:
        """What normalising `x` comes to."""
        tally = Tally(self.crew)
        tally.add(x)
        return tally.moments(weights.groups).affine(weights.weight, weights.bias)

    def finish(self, x: FeatureMap, weights: Weights) -> FeatureMap:
        """The last norm and convolution."""
        return self.convolve(x, weights.conv_out, self.norm(weights.norm_out, x))

    def attend(self, x: FeatureMap, *, weights: AttentionWeights) -> FeatureMap:
        """Add to each place what it finds at all others, in place. Scores are held for a few queries at a time."""
        affine, gemm, channels = self.norm(weights.norm, x), self.crew.gemm, x.channels
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
        return x


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
