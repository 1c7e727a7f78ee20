"""The FLUX.2 transformer: blocks of two streams, text and picture, then blocks of one.

Attribute names are the checkpoint's tensor names (diffusers' Flux2Transformer2DModel, v0.42.1).

Shapes: one picture at a time, so there is no batch axis. A sequence is text (L), picture (S), references (R), in this
order; D is the width of the streams, C a token's channels.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from models.device import device
from models.image.flux2.blocks import Conditions, DoubleBlock, Modulations, SingleBlock, modulated
from models.image.flux2.config import TransformerConfig
from models.image.flux2.host_blocks import HostBlocks
from models.image.gemm import host_gemm
from models.image.layers import axis_rotations, grid_positions, silu, timestep_embedding
from models.image.step_cache import StepCache

REFERENCE_STRIDE = 10
"""Between one reference picture's place on the first axis and the next one's; the picture itself is at 0."""

Grid = tuple[int, int]
"""A picture's height and width in tokens."""


class Denoiser(Protocol):
    """What the pipeline wants of a transformer, in whichever form. Thread: the MLX thread."""

    def working_bytes(self, lengths: Sequence[int], *, texts: int) -> int:
        """A step's peak beyond the weights, with what all steps share.

        Args:
            lengths: the tokens of text, picture, and each reference.
            texts: how many texts there are conditions of.

        Thread: any.
        """
        ...

    def condition(
        self, texts: Sequence[mx.array], references: Sequence[tuple[mx.array, Grid]], grid: Grid
    ) -> list[Conditions]:
        """What no step changes, of each text; all else they have in common.

        Args:
            texts: embeddings of one length, (L, text_dim) each.
            references: the tokens of each reference picture, (h * w, C).
            grid: the picture's.
        """
        ...

    def modulations(self, sigma: float) -> Modulations:
        """What the noise level decides; the same for guided and unguided passes."""
        ...

    def __call__(
        self, tokens: mx.array, modulations: Modulations, conditions: Conditions, cache: StepCache | None = None
    ) -> mx.array:
        """Predict noise - picture.

        Args:
            tokens: float32 (S, C).
            modulations: by `modulations`, for the tokens' noise level.
            conditions: by `condition`, for a picture of this size.
            cache: what is remembered of earlier steps with these conditions, if anything is to be.

        Shape: float32 (S, C).
        """
        ...


def rotations(config: TransformerConfig, text_tokens: int, grids: Sequence[Grid]) -> mx.array:
    """The rotary positions of a sequence of text, picture and references (`grids`, the picture's first).

    Axes: which picture, row, column, place in the text. Shape: complex64 (L + S + R, 1, head_dim / 2).
    """
    one = range(1)
    parts = [grid_positions(one, one, one, range(text_tokens))]
    for index, (height, width) in enumerate(grids):
        place = REFERENCE_STRIDE * index
        parts.append(grid_positions(range(place, place + 1), range(height), range(width), one))
    return mx.array(axis_rotations(np.concatenate(parts), config.axes_dims, config.theta)[:, None])


class TimestepEmbedder(nn.Module):
    """Two linear layers behind the sinusoids of a time."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.time_dim, config.dim, bias=False)
        self.linear_2 = nn.Linear(config.dim, config.dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (1, time_dim); returns (1, D)."""
        embedded: mx.array = self.linear_2(silu(self.linear_1(x)))
        return embedded


class TimeEmbedding(nn.Module):
    """The place where checkpoints keep it; a guidance embedder would stand beside it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(config)


class Modulation(nn.Module):
    """A linear layer behind a SiLU."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim, bias=False)

    def __call__(self, time: mx.array) -> mx.array:
        """Shapes: (1, D); returns (1, parts * D)."""
        out: mx.array = self.linear(silu(time))
        return out


class OutputNorm(nn.Module):
    """The modulation before the output: scale first, then shift."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, 2 * config.dim, bias=False)


class Transformer(nn.Module):
    """The whole transformer; a `Denoiser`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.x_embedder = nn.Linear(config.channels, dim, bias=False)
        self.context_embedder = nn.Linear(config.text_dim, dim, bias=False)
        self.time_guidance_embed = TimeEmbedding(config)
        self.double_stream_modulation_img = Modulation(dim, 6)
        self.double_stream_modulation_txt = Modulation(dim, 6)
        self.single_stream_modulation = Modulation(dim, 3)
        self.transformer_blocks = [DoubleBlock(config) for _ in range(config.num_double_layers)]
        self.single_transformer_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.norm_out = OutputNorm(config)
        self.proj_out = nn.Linear(dim, config.channels, bias=False)
        self._host_blocks: HostBlocks | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """What it computes in: the type of its dense weights."""
        if self._host_blocks is not None:
            return mx.float32
        dtype: mx.Dtype = self.single_transformer_blocks[0].attn.norm_q.weight.dtype
        return dtype

    def prepare(self) -> None:
        """Bring the loaded weights to the form that is fast here: on a CPU, unless some are quantised."""
        blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
        weights = cast("list[tuple[str, mx.array]]", tree_flatten([block.parameters() for block in blocks]))
        dense = all(array.dtype == mx.float32 for _, array in weights)
        gemm = host_gemm() if device().kind == "cpu" and dense else None
        if gemm is not None:
            self._host_blocks = HostBlocks(gemm, self.config, self.transformer_blocks, self.single_transformer_blocks)

    def working_bytes(self, lengths: Sequence[int], *, texts: int) -> int:
        """See `Denoiser`."""
        config, (text, picture, *references) = self.config, lengths
        length, itemsize = sum(lengths), self.dtype.size
        shared = itemsize * config.dim * (texts * text + sum(references)) + 4 * length * config.head_dim
        around = 4 * picture * (4 * config.dim + 4 * config.channels)
        if self._host_blocks is not None:
            return shared + around + self._host_blocks.working_bytes(length)
        # The stream, its norm, what goes through one block's widest matrix, and what comes out of that.
        numbers = length * (6 * config.dim + 3 * config.mlp_dim)
        # MLX's CPU backend holds all scores, and their softmax beside them.
        scores = 2 * config.num_heads * length**2 if device().kind == "cpu" else 0
        return shared + around + itemsize * numbers + 4 * scores

    def condition(
        self, texts: Sequence[mx.array], references: Sequence[tuple[mx.array, Grid]], grid: Grid
    ) -> list[Conditions]:
        """See `Denoiser`."""
        tokens = [each for each, _ in references]
        embedded = self.x_embedder(mx.concatenate(tokens).astype(self.dtype)) if tokens else None
        turns = rotations(self.config, texts[0].shape[0], [grid, *(each for _, each in references)])
        return [Conditions(self.context_embedder(text.astype(self.dtype)), embedded, turns) for text in texts]

    def modulations(self, sigma: float) -> Modulations:
        """See `Denoiser`."""
        sinusoids = timestep_embedding(1000.0 * sigma, self.config.time_dim).astype(self.dtype)
        time = self.time_guidance_embed.timestep_embedder(sinusoids)
        return Modulations(
            picture=self.double_stream_modulation_img(time),
            text=self.double_stream_modulation_txt(time),
            single=self.single_stream_modulation(time),
            output=self.norm_out.linear(silu(time)),
        )

    def __call__(
        self, tokens: mx.array, modulations: Modulations, conditions: Conditions, cache: StepCache | None = None
    ) -> mx.array:
        """See `Denoiser`."""
        eps = self.config.eps
        x = self.x_embedder(tokens.astype(self.dtype))
        added = None if cache is None else cache.lookup(_first_input(x, modulations, eps))
        if added is None:
            hidden = self._blocks(x, modulations, conditions)
            if cache is not None:
                cache.keep(hidden - x)
        else:
            hidden = x + added
        scale, shift = mx.split(modulations.output, 2, axis=-1)
        predicted: mx.array = self.proj_out(modulated(hidden, shift, scale, eps))
        return predicted.astype(mx.float32)

    def _blocks(self, own: mx.array, modulations: Modulations, conditions: Conditions) -> mx.array:
        """All blocks. Shapes: own (S, D), the picture's tokens embedded; returns what has become of them."""
        if self._host_blocks is not None:
            return self._host_blocks(own, modulations, conditions)
        text, turns, references = conditions.text, conditions.rotations, conditions.references
        picture = own if references is None else mx.concatenate([own, references])
        for block in self.transformer_blocks:
            picture, text = block(picture, text, modulations, turns)
        x = mx.concatenate([text, picture])
        for single in self.single_transformer_blocks:
            x = single(x, modulations.single, turns)
        return x[text.shape[0] : text.shape[0] + own.shape[0]]


def _first_input(x: mx.array, modulations: Modulations, eps: float) -> mx.array:
    """What the first block's attention would see of the picture. Shapes: x (S, D); returns float32 (S, D)."""
    shift, scale = mx.split(modulations.picture, 6, axis=-1)[:2]
    return modulated(x, shift, scale, eps).astype(mx.float32)
