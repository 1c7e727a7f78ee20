"""The blocks of Z-Image's transformer: attention and feed-forward, scaled and gated by the time.

Attribute names are the checkpoints' tensor names (diffusers' ZImageTransformer2DModel, v0.42.1). This is the form in
which weights are loaded and in which GPUs compute, with weights of any kind; `host_blocks` has the form that is fast on
a CPU. Shapes: one picture at a time, a sequence is (L, D).
"""

from typing import Protocol

import mlx.core as mx
from mlx import nn

from models.device import device
from models.image.layers import attend, rotate, swiglu
from models.image.z_image.config import TransformerConfig

QK_EPS = 1e-5
"""Of the norms of queries and keys, whatever norm_eps says."""


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

    def working_bytes(self, length: int) -> int:
        """The peak of a pass over a sequence of so many tokens. Thread: any."""
        ...


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

    def __init__(self, blocks: list[Block], config: TransformerConfig) -> None:
        self._blocks = blocks
        self._config = config

    def __call__(self, x: mx.array, rotations: mx.array, time: mx.array | None, wanted: int | None = None) -> mx.array:
        """See `Stack`."""
        for block in self._blocks:
            x = block(x, rotations, time)
        return x[:wanted]

    def first_input(self, x: mx.array, time: mx.array) -> mx.array:
        """See `Stack`."""
        return self._blocks[0].attention_input(x, time).astype(mx.float32)

    def working_bytes(self, length: int) -> int:
        """See `Stack`."""
        config = self._config
        itemsize: int = self._blocks[0].attention_norm1.weight.dtype.size
        if device().kind == "cpu":
            # Measured, with what MLX keeps of freed arrays: sequences, and once the scores.
            return itemsize * (36 * length * config.dim + config.num_heads * length**2)
        # The stream before and behind, its norm; queries, keys, values and what they become, or the feed-forward's
        # three. The kernel holds no scores.
        return itemsize * length * (4 * config.dim + max(9 * config.dim, 3 * config.mlp_dim))
