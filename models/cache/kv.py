"""The cache of a layer that attends to the tokens before it: all of them, or a sliding window.

Invariants: the buffers hold keys and values in temporal order; `_begin:_end` of them is live; the slices that `update`
returns are contiguous per head, so that a BLAS reads them without a copy.
"""

import copy
from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from models.cache.base import Segment

BLOCK_TOKENS = 256
"""Buffers grow by this many tokens."""


class KVCache:
    """Keys and values of one row in one layer. Thread: the MLX thread.

    With a `window`, a query sees itself and the `window - 1` tokens before it; what no later query can see is dropped
    once a block of it has gathered, so that the cost of moving is paid once a block.
    """

    __slots__ = ("_begin", "_end", "_keys", "_values", "offset", "window")

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self._begin = 0
        self._end = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now, the unused rest of the last block included."""
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[mx.array]:
        """The buffers, to be evaluated together with a step."""
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append L tokens and return what their queries may look at, oldest first.

        Shapes: keys and values (1, H_kv, L, D); returns two arrays (1, H_kv, S, D), S >= L.
        """
        length = keys.shape[2]
        if self.window is not None:
            self._begin = max(self._begin, self._end - self.window + 1)
        all_keys, all_values = self._reserve(keys, values)
        begin, end = self._begin, self._end + length
        all_keys[:, :, self._end : end] = keys
        all_values[:, :, self._end : end] = values
        self._end = end
        self.offset += length
        return all_keys[:, :, begin:end], all_values[:, :, begin:end]

    def snapshot(self) -> Self:
        """An independent copy of the present state; the buffers are shared until one of the two is written."""
        other = copy.copy(self)
        other._keys, other._values = copy.copy(self._keys), copy.copy(self._values)
        return other

    @property
    def first(self) -> int:
        """The position of the oldest token still held."""
        return self.offset - (self._end - self._begin)

    def segment(self, begin: int, end: int) -> Segment:
        """A copy of the tokens at positions [begin, end); `first <= begin`, `end <= offset`."""
        keys, values = self.arrays()
        shift = self._end - self.offset
        return Segment(keys, values).part(begin + shift, end + shift)

    def restore(self, segments: Sequence[Segment]) -> None:
        """Fill an empty cache with the row's first tokens, stored earlier."""
        keys = mx.concatenate([segment.keys for segment in segments], axis=2)
        values = mx.concatenate([segment.values for segment in segments], axis=2)
        self.update(keys, values)

    def trim(self, tokens: int) -> None:
        """Forget the newest tokens again; not more than the last `update` appended, less one."""
        self._end -= tokens
        self.offset -= tokens

    def _reserve(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Make room for the tokens of `keys` behind the live ones; the buffers, ready to be written."""
        length = keys.shape[2]
        if self._keys is not None and self._values is not None and self._end + length <= self._keys.shape[2]:
            return self._keys, self._values
        begin, end = self._begin, self._end
        capacity = _blocks(end - begin + length) * BLOCK_TOKENS
        if self.window is not None and begin > 0:
            capacity = max(capacity, (_blocks(self.window) + 1) * BLOCK_TOKENS)
        self._keys = _moved(self._keys, keys, begin, end, capacity)
        self._values = _moved(self._values, values, begin, end, capacity)
        self._begin, self._end = 0, end - begin
        return self._keys, self._values


def cache_nbytes(tokens: int, *, window: int | None, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """What a `KVCache` of that many tokens holds, in bytes. Thread: any."""
    live = tokens if window is None else min(tokens, (_blocks(window) + 1) * BLOCK_TOKENS)
    return 2 * kv_heads * _blocks(live) * BLOCK_TOKENS * head_dim * itemsize


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _moved(old: mx.array | None, like: mx.array, begin: int, end: int, capacity: int) -> mx.array:
    """A buffer of `capacity` tokens that begins with the old one's live tokens."""
    batch, heads, _, dim = like.shape
    rest = mx.zeros((batch, heads, capacity - (end - begin), dim), dtype=like.dtype)
    return rest if old is None else mx.concatenate([old[:, :, begin:end], rest], axis=2)
