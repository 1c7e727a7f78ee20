"""Z-Image's transformer: image and caption tokens in one stream, its blocks scaled and gated by the time.

Attribute names are the checkpoints' tensor names. This is the form in which weights are loaded and GPUs compute;
`host_blocks` has the form of the blocks that is fast on a CPU. Shapes: one picture at a time, a sequence is (L, D).

Source: diffusers' `ZImageTransformer2DModel` (v0.42.1), its basic mode at batch 1, where padding is attended to.
"""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx import nn

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
from models.image.z_image.config import PATCH, TransformerConfig

SEQUENCE_MULTIPLE = 32
"""Image and caption are each filled up to a multiple of it with learned tokens."""

_PATCHES = f"{PATCH}-1"

QK_EPS = 1e-5
"""Of the norms of queries and keys, whatever norm_eps says."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What of a forward pass stays the same in all steps with one caption and one size."""

    caption: mx.array
    """Embedded, filled up and refined: (M, D), M a multiple of 32."""
    image_rotations: mx.array
    """complex64 (N, 1, d / 2), N a multiple of 32."""
    rotations: mx.array
    """Of image and caption: complex64 (N + M, 1, d / 2)."""


class Stack(Protocol):
    """Blocks that follow one another, in either form."""

    def __call__(self, x: mx.array, rotations: mx.array, time: mx.array | None, wanted: int | None = None) -> mx.array:
        """Run them all.

        Args:
            x: (L, D).
            rotations: (L, 1, d / 2).
            time: (1, E); None without modulation.
            wanted: so many of the first rows are needed; None: all.

        Shape: (wanted, D).
        """
        ...

    def first_input(self, x: mx.array, time: mx.array) -> mx.array:
        """What the first block's attention would see. Shapes: x (L, D), time (1, E); returns float32 (L, D)."""
        ...


@dataclass(frozen=True, slots=True)
class Stacks:
    """All blocks of the transformer."""

    noise: Stack
    context: Stack
    joint: Stack


class Attention(nn.Module):
    """Everyone looks at everyone."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._heads, dim = config.num_heads, config.dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = [nn.Linear(dim, dim, bias=False)]
        if config.qk_norm:
            self.norm_q = nn.RMSNorm(config.head_dim, eps=QK_EPS)
            self.norm_k = nn.RMSNorm(config.head_dim, eps=QK_EPS)

    def __call__(self, x: mx.array, rotations: mx.array) -> mx.array:
        """Shapes: x (L, D), rotations (L, 1, d / 2); returns (L, D)."""
        queries, keys, values = (
            linear(x).reshape(x.shape[0], self._heads, -1) for linear in (self.to_q, self.to_k, self.to_v)
        )
        if "norm_q" in self:
            queries, keys = self.norm_q(queries), self.norm_k(keys)
        out: mx.array = self.to_out[0](attend(rotate(queries, rotations), rotate(keys, rotations), values))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.w2 = nn.Linear(config.mlp_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.mlp_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Shape: (L, D), kept."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; with `modulated`, the time scales what goes in and out."""

    def __init__(self, config: TransformerConfig, *, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm1 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if modulated:
            self.adaLN_modulation = [nn.Linear(config.time_dim, 4 * config.dim)]

    def __call__(self, x: mx.array, rotations: mx.array, time: mx.array | None) -> mx.array:
        """Shapes: x (L, D), rotations (L, 1, d / 2), time (1, E), None without modulation; returns (L, D)."""
        scale_in, gate_in, scale_mlp, gate_mlp = self.modulation(time)
        attended = self.attention(self.attention_norm1(x) * scale_in, rotations)
        x = x + gate_in * self.attention_norm2(attended)
        out: mx.array = x + gate_mlp * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale_mlp))
        return out

    def attention_input(self, x: mx.array, time: mx.array) -> mx.array:
        """What the attention sees. Shapes: x (L, D), time (1, E); returns (L, D)."""
        out: mx.array = self.attention_norm1(x) * self.modulation(time)[0]
        return out

    def modulation(self, time: mx.array | None) -> tuple[mx.array | float, ...]:
        """Scale and gate of the attention, scale and gate of the feed-forward. Shapes: time (1, E); each (1, D)."""
        if time is None:
            return 1.0, 1.0, 1.0, 1.0
        scale_in, gate_in, scale_mlp, gate_mlp = mx.split(self.adaLN_modulation[0](time), 4, axis=-1)
        return 1.0 + scale_in, mx.tanh(gate_in), 1.0 + scale_mlp, mx.tanh(gate_mlp)


class PlainStack:
    """Blocks as they were loaded; see `Stack`."""

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = blocks

    def __call__(self, x: mx.array, rotations: mx.array, time: mx.array | None, wanted: int | None = None) -> mx.array:
        """See `Stack`."""
        for block in self._blocks:
            x = block(x, rotations, time)
        return x[:wanted]

    def first_input(self, x: mx.array, time: mx.array) -> mx.array:
        """See `Stack`."""
        return self._blocks[0].attention_input(x, time).astype(mx.float32)


class TimeEmbedder(nn.Module):
    """A small network on the sinusoids of the time."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.mlp = [nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, config.time_dim)]

    def __call__(self, t: float) -> mx.array:
        """Shape: (1, E), in the weights' type."""
        first, _, second = self.mlp
        out: mx.array = second(silu(first(timestep_embedding(t, 256).astype(first.bias.dtype))))
        return out


class FinalLayer(nn.Module):
    """A norm that the time scales, and the way back to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, PATCH * PATCH * config.channels)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(config.time_dim, config.dim)]

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """Shapes: x (L, D), time (1, E); returns (L, 4 * C)."""
        return self.linear(layer_norm(x) * (1.0 + self.adaLN_modulation[1](silu(time))))


class Transformer(nn.Module):
    """The whole model. Thread: the MLX thread."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._config = config
        dim = config.dim
        self.all_x_embedder = {_PATCHES: nn.Linear(PATCH * PATCH * config.channels, dim)}
        self.all_final_layer = {_PATCHES: FinalLayer(config)}
        self.t_embedder = TimeEmbedder(config)
        self.cap_embedder = [nn.RMSNorm(config.caption_dim, eps=config.norm_eps), nn.Linear(config.caption_dim, dim)]
        self.x_pad_token = mx.zeros((1, dim))
        self.cap_pad_token = mx.zeros((1, dim))
        refiners = range(config.num_refiner_layers)
        self.noise_refiner = [Block(config, modulated=True) for _ in refiners]
        self.context_refiner = [Block(config, modulated=False) for _ in refiners]
        self.layers = [Block(config, modulated=True) for _ in range(config.num_layers)]
        self.stacks = Stacks(*map(PlainStack, (self.noise_refiner, self.context_refiner, self.layers)))

    @property
    def config(self) -> TransformerConfig:
        """What it was built from. Thread: any."""
        return self._config

    def prepare(self, caption: mx.array, height: int, width: int) -> Conditioning:
        """Do what need not be done again in each step.

        Args:
            caption: the prompt's embeddings, (T, caption_dim).
            height: of the latents; even.
            width: of the latents; even.
        """
        norm, embed = self.cap_embedder
        x = _filled(embed(norm(caption)), self.cap_pad_token)
        length = x.shape[0]
        caption_positions = grid_positions(range(1, length + 1), range(1), range(1))
        image_positions = grid_positions(range(length + 1, length + 2), range(height // PATCH), range(width // PATCH))
        filling = np.zeros((-len(image_positions) % SEQUENCE_MULTIPLE, 3), dtype=np.int32)
        ours = self._rotations(np.concatenate([image_positions, filling]))
        theirs = self._rotations(caption_positions)
        x = self.stacks.context(x, theirs, None)
        return Conditioning(x, ours, mx.concatenate([ours, theirs]))

    def __call__(self, latents: mx.array, t: float, known: Conditioning, cache: StepCache | None = None) -> mx.array:
        """The predicted picture - noise, the negative of what a flow-matching step takes.

        Args:
            latents: float32 (h, w, C).
            t: the model's time, 1 - sigma.
            known: by `prepare`, for latents of this size.
            cache: what is remembered of earlier steps, if anything is to be.

        Shape: (h, w, C), in the weights' type.
        """
        time = self.t_embedder(t * self._config.time_scale)
        x = self.embed(latents, time.dtype)
        added = None if cache is None else cache.lookup(self.stacks.noise.first_input(x, time))
        if added is None:
            hidden = self.joint(self.refine(x, time, known), time, known, wanted=x.shape[0])
            if cache is not None:
                cache.keep(hidden - x)
        else:
            hidden = x + added
        return unpatchify(self.all_final_layer[_PATCHES](hidden, time), latents.shape[0], latents.shape[1])

    def embed(self, latents: mx.array, dtype: mx.Dtype) -> mx.array:
        """The image's tokens. Shapes: (h, w, C); returns (h * w / 4, D)."""
        tokens: mx.array = self.all_x_embedder[_PATCHES](patchify(latents).astype(dtype))
        return tokens

    def refine(self, x: mx.array, time: mx.array, known: Conditioning) -> mx.array:
        """The image's tokens among themselves, filled up. Shapes: x (h * w / 4, D), time (1, E); returns (N, D)."""
        return self.stacks.noise(_filled(x, self.x_pad_token), known.image_rotations, time)

    def joint(self, x: mx.array, time: mx.array, known: Conditioning, wanted: int | None = None) -> mx.array:
        """Image and caption together. Shapes: x (N, D), time (1, E); returns (N + M, D), or the first rows of it."""
        return self.stacks.joint(mx.concatenate([x, known.caption]), known.rotations, time, wanted)

    def _rotations(self, positions: np.ndarray) -> mx.array:
        return mx.array(axis_rotations(positions, self._config.axes_dims, self._config.theta)[:, None])


def patchify(latents: mx.array) -> mx.array:
    """Tokens row by row, each a patch's rows, columns, channels. Shapes: (h, w, C); returns (h * w / 4, 4 * C)."""
    height, width, channels = latents.shape
    patches = latents.reshape(height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.swapaxes(1, 2).reshape(-1, PATCH * PATCH * channels)


def unpatchify(tokens: mx.array, height: int, width: int) -> mx.array:
    """The inverse of `patchify`."""
    patches = tokens.reshape(height // PATCH, width // PATCH, PATCH, PATCH, -1)
    return patches.swapaxes(1, 2).reshape(height, width, -1)


def _filled(x: mx.array, token: mx.array) -> mx.array:
    """With copies of `token` behind it up to the next multiple of 32 rows. Shapes: x (L, D), token (1, D)."""
    missing = -x.shape[0] % SEQUENCE_MULTIPLE
    return mx.concatenate([x, mx.broadcast_to(token, (missing, x.shape[1]))]) if missing else x
