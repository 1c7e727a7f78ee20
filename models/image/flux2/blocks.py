"""The blocks of the FLUX.2 transformer: of two streams, text and picture, and of one.

Attribute names are the checkpoint's tensor names (diffusers' Flux2Transformer2DModel, v0.42.1). This is the form in
which weights are loaded and in which GPUs compute, with weights of any kind; `host_blocks` has what is fast on a CPU.

Shapes: one picture at a time, so there is no batch axis. A sequence is text (L), picture (S), references (R), in this
order; D is the width of the streams.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from models.image.flux2.config import TransformerConfig
from models.image.layers import attend, layer_norm, rotate, swiglu

_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """All that a forward pass needs and that no step changes."""

    text: mx.array
    """(L, D), embedded."""
    references: mx.array | None
    """(R, D), embedded."""
    rotations: mx.array
    """complex64 (L + S + R, 1, head_dim / 2)."""

    def arrays(self) -> list[mx.array]:
        """All that there are."""
        arrays = [self.text, self.rotations]
        return arrays if self.references is None else [*arrays, self.references]


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


def modulated(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Normalised, scaled about 1 and shifted. Shapes: x (N, D), shift and scale (1, D)."""
    return layer_norm(x, eps) * (1 + scale) + shift


def _finite(x: mx.array) -> mx.array:
    """A residual stream may grow beyond what float16 holds."""
    return mx.clip(x, -_LARGEST_HALF, _LARGEST_HALF) if x.dtype == mx.float16 else x
