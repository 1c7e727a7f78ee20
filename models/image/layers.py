"""Parts that the families' transformers share: rotary positions over several axes, attention, time embedding, norms.

Shapes: one picture at a time, so there is no batch axis. A sequence is (L, D), by heads (L, H, d). Everything here is
computed by MLX and runs on every device; `models.image.host_layers` has the forms that are fast on a CPU.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt


def timestep_embedding(t: float, dims: int, max_period: float = 10000.0) -> mx.array:
    """Sinusoids of a time: all cosines, then all sines.

    Args:
        t: the model's time, already times 1000.
        dims: even.
        max_period: the longest wave.

    Shape: float32 (1, dims). Source: diffusers' `Timesteps` with `flip_sin_to_cos` and no downscale shift.
    """
    half = dims // 2
    frequencies = np.exp(-math.log(max_period) * np.arange(half, dtype=np.float32) / half)
    angles = np.float32(t) * frequencies.astype(np.float32)
    return mx.array(np.concatenate([np.cos(angles), np.sin(angles)])[None])


def axis_rotations(
    positions: npt.NDArray[np.integer], axes_dims: Sequence[int], theta: float
) -> npt.NDArray[np.complex64]:
    """exp(i * position * frequency) of every pair of a head, the axes one after another. Thread: any.

    Args:
        positions: (L, A), a column an axis.
        axes_dims: how many of a head's dimensions turn with each axis; even, A of them.
        theta: the base of the frequencies.

    Shape: (L, sum(axes_dims) / 2).
    """
    parts = []
    for column, dims in zip(positions.T, axes_dims, strict=True):
        frequencies = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
        angles = (column.astype(np.float64)[:, None] * frequencies).astype(np.float32)
        parts.append(np.cos(angles) + 1j * np.sin(angles))
    return np.concatenate(parts, axis=1).astype(np.complex64)


def grid_positions(*axes: range) -> npt.NDArray[np.int32]:
    """The points of a grid, the last axis fastest. Shape: (product of the lengths, number of axes). Thread: any."""
    grid = np.meshgrid(*(np.asarray(axis, dtype=np.int32) for axis in axes), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in grid], axis=1)


def rotate(x: mx.array, rotations: mx.array) -> mx.array:
    """Turn interleaved pairs (re, im, re, im, ...), in float32.

    Shapes: x (L, H, d), rotations complex64 (L, 1, d / 2); returns (L, H, d) of x's type.
    """
    pairs = mx.contiguous(x.astype(mx.float32)).view(mx.complex64)
    return (pairs * rotations).view(mx.float32).astype(x.dtype)


def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Everyone looks at everyone. Shapes: each (L, H, d); returns (L, H * d)."""
    q, k, v = (x.swapaxes(0, 1)[None] for x in (queries, keys, values))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=queries.shape[-1] ** -0.5)
    return out[0].swapaxes(0, 1).reshape(queries.shape[0], -1)


def layer_norm(x: mx.array, eps: float = 1e-6) -> mx.array:
    """Mean 0 and variance 1, without weights. Shape: (..., D), kept."""
    return mx.fast.layer_norm(x, None, None, eps)


def silu(x: mx.array) -> mx.array:
    """The sigmoid linear unit. Shape: any, kept."""
    return x * mx.sigmoid(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up. Shapes: alike, kept."""
    return silu(gate) * up
