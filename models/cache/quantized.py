"""The cache of a layer whose keys and values are held in 8 or 4 bits.

Attention sees them dequantised, those of the present tokens too: what a query sees then does not depend on how its row
was cut into steps. Every token is quantised by itself, so segments stay packed and lose nothing more.
"""

import mlx.core as mx
import numpy as np

from models import host
from models.cache.base import SeenOnHost
from models.cache.kv import KVCache
from models.host import HostArray

GROUP_SIZE = 32
"""Values that share a scale and an offset, as in the types of llama.cpp whose names these have."""

# The two values of each byte, one behind the other: the lower half is the earlier one.
_NIBBLES = np.array([byte % 16 + 1j * (byte // 16) for byte in range(256)], np.complex64)


class QuantizedKVCache(KVCache):
    """Packed keys and values of one row in one layer; see `KVCache`. Thread: the MLX thread.

    Its six arrays are the keys' packed values, scales and offsets, then the values'.
    """

    __slots__ = ("_bits",)

    def __init__(self, bits: int, window: int | None = None) -> None:
        super().__init__(window)
        self._bits = bits

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append L tokens and return what their queries may look at, oldest first.

        Shapes: keys and values (1, H_kv, L, D), D a multiple of 32; returns two arrays (1, H_kv, S, D), S >= L.
        """
        seen = self._append([*self._packed(keys), *self._packed(values)])
        seen_keys, seen_values = (self._unpacked(*part) for part in (seen[:3], seen[3:]))
        return seen_keys, seen_values

    def held_on_host(self, keys: HostArray, values: HostArray) -> tuple[HostArray, ...]:
        """Tokens as a cache of this kind holds them. Shapes: (H_kv, L, D); returns six arrays (H_kv, L, any)."""
        parts = self._packed(mx.array(np.stack([keys, values])))
        mx.eval(parts)
        packed, scales, offsets = (host.lend(part) for part in parts)
        return packed[0], scales[0], offsets[0], packed[1], scales[1], offsets[1]

    def append_on_host(self, *new: HostArray) -> SeenOnHost:
        """`update` without a graph, for what `held_on_host` gave. CPU and float32 only."""
        seen = [lent[:, self._begin : self._end] for lent in self._write_on_host(new)]
        keys, values = (_unpacked_on_host(*part, bits=self._bits) for part in (seen[:3], seen[3:]))
        return SeenOnHost(keys.ctypes.data, values.ctypes.data, keys.shape[1], keys.strides[0], (keys, values))

    def _packed(self, values: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.quantize(values, group_size=GROUP_SIZE, bits=self._bits))

    def _unpacked(self, packed: mx.array, scales: mx.array, offsets: mx.array) -> mx.array:
        """Shapes: packed (..., D * bits / 32), scales and offsets (..., D / 32); returns (..., D)."""
        return mx.dequantize(packed, scales, offsets, group_size=GROUP_SIZE, bits=self._bits)


def _unpacked_on_host(packed: HostArray, scales: HostArray, offsets: HostArray, *, bits: int) -> HostArray:
    """Shapes: packed (H_kv, S, D * bits / 32), scales and offsets (H_kv, S, D / 32); returns (H_kv, S, D)."""
    heads, tokens, groups = scales.shape
    values = np.empty((heads, tokens, groups, GROUP_SIZE), np.float32)
    steps = packed.view(np.uint8).reshape(heads, tokens, groups, -1)
    if bits == 8:
        values[...] = steps
    else:
        np.take(_NIBBLES, steps, out=values.view(np.complex64), mode="clip")
    values *= scales[..., None]
    values += offsets[..., None]
    return values.reshape(heads, tokens, -1)
