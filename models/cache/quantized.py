"""The cache of a layer whose keys and values are held in 8 or 4 bits.

Attention sees them dequantised, those of the present tokens too: what a query sees then does not depend on how its row
was cut into steps. Every token is quantised by itself, so segments stay packed and lose nothing more.
"""

import mlx.core as mx

from models.cache.kv import KVCache

GROUP_SIZE = 32
"""Values that share a scale and an offset, as in the types of llama.cpp whose names these have."""


class QuantizedKVCache(KVCache):
    """Packed keys and values of one row in one layer; see `KVCache`. Thread: the MLX thread.

    Its six arrays are the keys' packed values, scales and offsets, then the values'.
    """

    __slots__ = ("_bits", "_on_cpu")

    def __init__(self, bits: int, window: int | None = None) -> None:
        super().__init__(window)
        self._bits = bits
        self._on_cpu = mx.default_device() == mx.Device(mx.cpu)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append L tokens and return what their queries may look at, oldest first.

        Shapes: keys and values (1, H_kv, L, D), D a multiple of 32; returns two arrays (1, H_kv, S, D), S >= L.
        """
        seen = self._append([*self._packed(keys), *self._packed(values)])
        unpack = _unpack_on_cpu if self._on_cpu else _unpack
        seen_keys, seen_values = (unpack(*part, bits=self._bits) for part in (seen[:3], seen[3:]))
        return seen_keys, seen_values

    def _packed(self, values: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.quantize(values, group_size=GROUP_SIZE, bits=self._bits))


def _unpack(packed: mx.array, scales: mx.array, offsets: mx.array, *, bits: int) -> mx.array:
    """Shapes: packed (..., D * bits / 32), scales and offsets (..., D / 32); returns (..., D)."""
    return mx.dequantize(packed, scales, offsets, group_size=GROUP_SIZE, bits=bits)


def _unpack_on_cpu(packed: mx.array, scales: mx.array, offsets: mx.array, *, bits: int) -> mx.array:
    """The same by bytes: MLX's CPU backend would take 32-bit words apart in twice the time (measured, 0.32)."""
    groups = scales.shape
    steps = packed.view(mx.uint8)
    if bits == 4:
        # The lower half of a byte is the earlier value.
        steps = mx.stack([steps & 15, steps >> 4], axis=-1)
    steps = steps.reshape(*groups, GROUP_SIZE).astype(scales.dtype)
    values = steps * scales[..., None] + offsets[..., None]
    return values.reshape(*groups[:-1], groups[-1] * GROUP_SIZE)
