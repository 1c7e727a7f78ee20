"""Rotary embeddings on MLX: by the tokens' places, or by positions along several axes."""

import mlx.core as mx
import numpy as np

from models.ops import PositionScale, RopeConfig


class Wavelengths:
    """What `mx.fast.rope` is given of each rope, made once. Thread: the executor's."""

    def __init__(self, reach: int = 0) -> None:
        """`reach`: the tokens that a row may have."""
        self._reach = reach
        self._made: dict[RopeConfig, mx.array] = {}

    def rotate(self, x: mx.array, rope: RopeConfig, offset: mx.array | int, axes: mx.array | None = None) -> mx.array:
        """Shapes: x (B, H, L, d), offset (B,) or a number, or axes (B, L, 3) instead; returns (B, H, L, d)."""
        if axes is not None:
            return self._along_axes(x, rope, axes)
        if rope not in self._made:
            with np.errstate(divide="ignore"):
                self._made[rope] = mx.array(1.0 / rope.frequencies(self._reach))
        turned = mx.fast.rope(
            x, rope.dims, traditional=rope.interleaved, base=None, scale=1.0, offset=offset, freqs=self._made[rope]
        )
        if rope.magnitude == 1.0:
            return turned
        if rope.dims == x.shape[-1]:
            return turned * rope.magnitude
        return mx.concatenate([turned[..., : rope.dims] * rope.magnitude, turned[..., rope.dims :]], axis=-1)

    def _along_axes(self, x: mx.array, rope: RopeConfig, axes: mx.array) -> mx.array:
        """Rotated by positions of several axes, each pair by one of them. Shapes: see `rotate`."""
        positions = axes[..., mx.array(rope.axes or (0,))]
        angles = (positions * mx.array(rope.frequencies(self._reach)))[:, None]
        cos, sin = (wave(angles) * rope.magnitude for wave in (mx.cos, mx.sin))
        whole = x[..., : rope.dims].astype(mx.float32)
        if rope.interleaved:
            a, b = whole[..., ::2], whole[..., 1::2]
            turned = mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(whole.shape)
        else:
            a, b = mx.split(whole, 2, axis=-1)
            turned = mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return mx.concatenate([turned.astype(x.dtype), x[..., rope.dims :]], axis=-1)


def position_factors(positions: mx.array, scale: PositionScale) -> mx.array:
    """Shapes: positions (T,); returns float32 (T, 1)."""
    periods = mx.floor((positions + scale.shift).astype(mx.float32) / scale.period)
    return (1 + scale.beta * mx.log(1 + periods))[:, None]
