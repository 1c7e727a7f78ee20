"""The FLUX.2 transformer: blocks of two streams, text and picture, then blocks of one.

Attribute names are the checkpoint's tensor names (diffusers' Flux2Transformer2DModel, v0.42.1). This is the form in
which weights are loaded and in which GPUs compute, with weights of any kind; `fused` has what is fast on a CPU.

Shapes: one picture at a time, so there is no batch axis. A sequence is text (L), picture (S), references (R), in this
order; D is the width of the streams, C a token's channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx import nn

from models.backend import device
from models.image.flux2.config import TransformerConfig
from models.image.flux2.memory import denoising_bytes
from models.image.layers import (
    attend,
    axis_rotations,
    grid_positions,
    layer_norm,
    rotate,
    silu,
    swiglu,
    timestep_embedding,
)
from models.image.step_cache import StepCache

REFERENCE_STRIDE = 10
"""Between one reference picture's place on the first axis and the next one's; the picture itself is at 0."""

_LARGEST_HALF = 65504.0

Grid = tuple[int, int]
"""A picture's height and width in tokens."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """All that a forward pass needs and that no step changes."""

    text: mx.array
    """(L, D), embedded."""
    references: mx.array | None
    """(R, D), embedded."""
    rotations: mx.array
    """complex64 (L + S + R, 1, head_dim / 2)."""


@dataclass(frozen=True, slots=True)
class Modulations:
    """What a noise level does to every block. Shapes: (1, n * D), or less where a part is taken."""

    picture: mx.array
    """Shift, scale and gate of attention, then of the MLP, in the blocks of two streams."""
    text: mx.array
    """The same for the text's stream."""
    single: mx.array
    """Shift, scale and gate in the blocks of one stream."""
    output: mx.array
    """Scale and shift before the output."""


class Denoiser(Protocol):
    """What the pipeline wants of a transformer, in whichever form. Thread: the MLX thread."""

    def working_bytes(self, lengths: Sequence[int]) -> int:
        """A step's peak beyond the weights, by the tokens of text, picture and references. Thread: any."""
        ...

    def condition(self, text: mx.array, references: Sequence[tuple[mx.array, Grid]], grid: Grid) -> Conditions:
        """What no step changes. Shapes: text (L, text_dim), each reference (h * w, C)."""
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


class FeedForward(nn.Module):
    """SwiGLU, gate first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear_in = nn.Linear(config.dim, 2 * config.mlp_dim, bias=False)
        self.linear_out = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: (N, D), kept."""
        gate, up = mx.split(self.linear_in(x), 2, axis=-1)
        out: mx.array = self.linear_out(swiglu(gate, up))
        return out


class JointAttention(nn.Module):
    """Attention of text and picture together, each with its own projections."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._head_dim = config.head_dim
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            self[name] = nn.Linear(config.dim, config.dim, bias=False)
        # In torch a list, because of the dropout that follows.
        self.to_out = [nn.Linear(config.dim, config.dim, bias=False)]
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            self[name] = nn.RMSNorm(config.head_dim, eps=config.eps)

    def __call__(self, picture: mx.array, text: mx.array, turns: mx.array) -> tuple[mx.array, mx.array]:
        """Shapes: picture (S + R, D), text (L, D); returns the two again."""
        queries = self._joined(self.norm_added_q(self._heads(self.add_q_proj(text))), self.norm_q, self.to_q, picture)
        keys = self._joined(self.norm_added_k(self._heads(self.add_k_proj(text))), self.norm_k, self.to_k, picture)
        values = mx.concatenate([self._heads(self.add_v_proj(text)), self._heads(self.to_v(picture))])
        attended = attend(rotate(queries, turns), rotate(keys, turns), values)
        length = text.shape[0]
        return self.to_out[0](attended[length:]), self.to_add_out(attended[:length])

    def _joined(self, text: mx.array, norm: nn.Module, projection: nn.Module, picture: mx.array) -> mx.array:
        return mx.concatenate([text, norm(self._heads(projection(picture)))])

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(x.shape[0], -1, self._head_dim)


class DoubleBlock(nn.Module):
    """Two streams that meet in attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._eps = config.eps
        self.attn = JointAttention(config)
        self.ff = FeedForward(config)
        self.ff_context = FeedForward(config)

    def __call__(
        self, picture: mx.array, text: mx.array, modulations: Modulations, turns: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Shapes: picture (S + R, D), text (L, D); returns the two again."""
        eps = self._eps
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mx.split(modulations.picture, 6, axis=-1)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = mx.split(modulations.text, 6, axis=-1)
        attended, t_attended = self.attn(
            modulated(picture, shift, scale, eps), modulated(text, t_shift, t_scale, eps), turns
        )
        picture = picture + gate * attended
        picture = picture + mlp_gate * self.ff(modulated(picture, mlp_shift, mlp_scale, eps))
        text = text + t_gate * t_attended
        text = text + t_mlp_gate * self.ff_context(modulated(text, t_mlp_shift, t_mlp_scale, eps))
        return picture, _finite(text)


class ParallelAttention(nn.Module):
    """Attention and MLP side by side: one matrix before both, one behind both."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._config = config
        self.to_qkv_mlp_proj = nn.Linear(config.dim, 3 * config.dim + 2 * config.mlp_dim, bias=False)
        self.to_out = nn.Linear(config.dim + config.mlp_dim, config.dim, bias=False)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.head_dim, eps=config.eps)

    def __call__(self, x: mx.array, turns: mx.array) -> mx.array:
        """Shapes: (N, D), kept."""
        dim, mlp = self._config.dim, self._config.mlp_dim
        parts = mx.split(self.to_qkv_mlp_proj(x), [dim, 2 * dim, 3 * dim, 3 * dim + mlp], axis=-1)
        queries, keys, values = (part.reshape(x.shape[0], -1, self._config.head_dim) for part in parts[:3])
        attended = attend(rotate(self.norm_q(queries), turns), rotate(self.norm_k(keys), turns), values)
        out: mx.array = self.to_out(mx.concatenate([attended, swiglu(parts[3], parts[4])], axis=-1))
        return out


class SingleBlock(nn.Module):
    """One stream of text and picture."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._eps = config.eps
        self.attn = ParallelAttention(config)

    def __call__(self, x: mx.array, modulation: mx.array, turns: mx.array) -> mx.array:
        """Shapes: (N, D), kept."""
        shift, scale, gate = mx.split(modulation, 3, axis=-1)
        return _finite(x + gate * self.attn(modulated(x, shift, scale, self._eps), turns))


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

    @property
    def dtype(self) -> mx.Dtype:
        """What it computes in: the type of its dense weights."""
        dtype: mx.Dtype = self.single_transformer_blocks[0].attn.norm_q.weight.dtype
        return dtype

    def working_bytes(self, lengths: Sequence[int]) -> int:
        """See `Denoiser`."""
        scores = sum(lengths) ** 2 * 2 * self.config.num_heads if device().kind == "cpu" else 0
        return denoising_bytes(self.config, lengths, itemsize=self.dtype.size, scores_at_once=scores)

    def condition(self, text: mx.array, references: Sequence[tuple[mx.array, Grid]], grid: Grid) -> Conditions:
        """See `Denoiser`."""
        grids = [grid, *(each for _, each in references)]
        tokens = [each for each, _ in references]
        embedded = self.x_embedder(mx.concatenate(tokens).astype(self.dtype)) if tokens else None
        return Conditions(
            text=self.context_embedder(text.astype(self.dtype)),
            references=embedded,
            rotations=rotations(self.config, text.shape[0], grids),
        )

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


def modulated(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Normalised, scaled about 1 and shifted. Shapes: x (N, D), shift and scale (1, D)."""
    return layer_norm(x, eps) * (1 + scale) + shift


def _finite(x: mx.array) -> mx.array:
    """A residual stream may grow beyond what float16 holds."""
    return mx.clip(x, -_LARGEST_HALF, _LARGEST_HALF) if x.dtype == mx.float16 else x
