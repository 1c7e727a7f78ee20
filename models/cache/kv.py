"""The cache of a layer that attends to the tokens before it: all of them, or a sliding window.

Invariants: the buffers hold keys and values in temporal order; `_begin:_end` of them is live; the slices that `update`
returns are contiguous per head, so that a BLAS reads them without a copy.
"""

import copy
from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from models import host
from models.cache.base import SeenOnHost, Segment
from models.host import HostArray

BLOCK_TOKENS = 256
"""Buffers grow by this many tokens."""


class KVCache:
    """Keys and values of one row in one layer. Thread: the MLX thread.

    With a `window`, a query sees itself and the `window - 1` tokens before it; what no later query can see is dropped
    once a block of it has gathered, so that the cost of moving is paid once a block.
    """

    __slots__ = ("_addresses", "_begin", "_buffers", "_end", "_is_shared", "_lent", "offset", "window")

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.offset = 0
        self._buffers: list[mx.array] = []
        self._begin = 0
        self._end = 0
        self._is_shared = False
        # The buffers' memory as numpy sees it, until MLX writes to them.
        self._lent: list[HostArray] = []
        self._addresses: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes held now, the unused rest of the last block included."""
        return sum(array.nbytes for array in self._buffers)

    def arrays(self) -> list[mx.array]:
        """The buffers, to be evaluated together with a step."""
        return list(self._buffers)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append L tokens and return what their queries may look at, oldest first.

        Shapes: keys and values (1, H_kv, L, D); returns two arrays (1, H_kv, S, D), S >= L.
        """
        all_keys, all_values = self._append((keys, values))
        return all_keys, all_values

    def held_on_host(self, keys: HostArray, values: HostArray) -> tuple[HostArray, ...]:
        """Tokens as a cache of this kind holds them. Shapes: (H_kv, L, D); returns arrays (H_kv, L, any)."""
        return keys, values

    def append_on_host(self, *new: HostArray) -> SeenOnHost:
        """`update` in place, without a graph, for what `held_on_host` gave. CPU and float32 only."""
        lent = self._write_on_host(new)
        skipped = self._begin * lent[0].strides[1]
        keys, values = self._addresses
        return SeenOnHost(keys + skipped, values + skipped, self._end - self._begin, lent[0].strides[0])

    def snapshot(self) -> Self:
        """An independent copy of the present state; the buffers are shared until one of the two is written."""
        self._is_shared, self._lent = True, []
        other = copy.copy(self)
        other._buffers = [copy.copy(buffer) for buffer in self._buffers]
        return other

    @property
    def first(self) -> int:
        """The position of the oldest token still held."""
        return self.offset - (self._end - self._begin)

    def segment(self, begin: int, end: int) -> Segment:
        """A copy of the tokens at positions [begin, end); `first <= begin`, `end <= offset`."""
        shift = self._end - self.offset
        return Segment(tuple(self._buffers)).part(begin + shift, end + shift)

    def restore(self, segments: Sequence[Segment]) -> None:
        """Fill an empty cache with the row's first tokens, stored earlier."""
        columns = zip(*(segment.arrays for segment in segments), strict=True)
        self._append([mx.concatenate(list(column), axis=2) for column in columns])

    def trim(self, tokens: int) -> None:
        """Forget the newest tokens again; not more than the last `update` appended, less one."""
        self._end -= tokens
        self.offset -= tokens

    def _write_on_host(self, new: Sequence[HostArray]) -> Sequence[HostArray]:
        """Write L tokens behind the live ones; the buffers' memory. Shapes: (H_kv, L or capacity, any)."""
        length = new[0].shape[1]
        if self.window is not None:
            self._begin = max(self._begin, self._end - self.window + 1)
        if not self._buffers or self._end + length > self._buffers[0].shape[2]:
            self._reserve([mx.array(array[None]) for array in new], length)
        if self._is_shared:
            self._buffers = [buffer + 0 for buffer in self._buffers]
            self._is_shared, self._lent = False, []
        if not self._lent:
            self._lent = [host.lend(buffer)[0] for buffer in self._buffers]
            self._addresses = [lent.ctypes.data for lent in self._lent]
        old_end, end = self._end, self._end + length
        for lent, array in zip(self._lent, new, strict=True):
            lent[:, old_end:end] = array
        self._end = end
        self.offset += length
        return self._lent

    def _append(self, new: Sequence[mx.array]) -> list[mx.array]:
        """Write L tokens behind the live ones; what their queries may look at. Shapes: (1, H_kv, L or S, any)."""
        length = new[0].shape[2]
        if self.window is not None:
            self._begin = max(self._begin, self._end - self.window + 1)
        self._reserve(new, length)
        old_end, begin, end = self._end, self._begin, self._end + length
        self._is_shared, self._lent = False, []
        for buffer, array in zip(self._buffers, new, strict=True):
            buffer[:, :, old_end:end] = array
        self._end = end
        self.offset += length
        return [buffer[:, :, begin:end] for buffer in self._buffers]

    def _reserve(self, like: Sequence[mx.array], length: int) -> None:
        """Make room for `length` tokens behind the live ones."""
        if self._buffers and self._end + length <= self._buffers[0].shape[2]:
            return
        begin, end = self._begin, self._end
        capacity = _blocks(end - begin + length) * BLOCK_TOKENS
        if self.window is not None and begin > 0:
            capacity = max(capacity, (_blocks(self.window) + 1) * BLOCK_TOKENS)
        olds: Sequence[mx.array | None] = self._buffers or [None] * len(like)
        self._buffers = [_moved(old, new, begin, end, capacity) for old, new in zip(olds, like, strict=True)]
        self._is_shared, self._lent = False, []
        self._begin, self._end = 0, end - begin


def held_tokens(tokens: int, window: int | None) -> int:
    """For how many tokens a cache has room once so many have passed. Thread: any."""
    return _blocks(tokens if window is None else min(tokens, (_blocks(window) + 1) * BLOCK_TOKENS)) * BLOCK_TOKENS


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _moved(old: mx.array | None, like: mx.array, begin: int, end: int, capacity: int) -> mx.array:
    """A buffer of `capacity` tokens that begins with the old one's live tokens."""
    batch, heads, _, dim = like.shape
    rest = mx.zeros((batch, heads, capacity - (end - begin), dim), dtype=like.dtype)
    return rest if old is None else mx.concatenate([old[:, :, begin:end], rest], axis=2)
