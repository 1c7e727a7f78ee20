"""Softmax attention of a whole step on numpy arrays: all rows' products in two calls of the BLAS.

A row that runs one token has a product for each key-value head and all its group's queries; its scores lie transposed,
for a BLAS is twice as fast with the keys as the first operand. A longer row has a product for each query head. Keys and
values are read where the cache holds them, and nothing of one row enters the sums of another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from models.cache import KVCache, LayerCache, SeenOnHost
from models.gemm import Addresses, Gemm, Matrix, ProductBatch, Products
from models.llm.base import Row
from models.nn.decoder import DecoderConfig, causal_mask


class HostAttention:
    """The attention of one step's rows, layer after layer. Thread: the MLX thread."""

    def __init__(self, gemm: Gemm, config: DecoderConfig, rows: Sequence[Row]) -> None:
        self._gemm = gemm
        self._config = config
        self._rows = rows
        self._spans = _spans([row.length for row in rows])
        self._plans: dict[tuple[int | None, tuple[int, ...]], _Plan] = {}

    def attend(self, layer: int, qkv: Matrix, out: Matrix) -> None:
        """Append the tokens' keys and values to the layer's caches, which are of one kind, and look.

        Shapes: qkv (T, (H + 2K) * d), rotated, q scaled; out (T, H * d).
        """
        config = self._config
        parts = qkv.reshape(len(qkv), -1, config.head_dim)
        keys, values = np.split(parts[:, config.num_heads :].swapaxes(0, 1), 2)
        caches = [_on_host(row.cache[layer]) for row in self._rows]
        held = caches[0].held_on_host(keys, values)
        seen = [
            cache.append_on_host(*(part[:, span] for part in held))
            for cache, span in zip(caches, self._spans, strict=True)
        ]
        window, tokens = config.window(layer), tuple(each.tokens for each in seen)
        if (plan := self._plans.get((window, tokens))) is None:
            plan = self._plans[window, tokens] = _Plan(self._gemm, config, self._rows, tokens, window)
        plan.attend(seen, qkv, out)


class _Plan:
    """How rows that see so many tokens look at them; layers that are alike share one, and its memory."""

    def __init__(
        self, gemm: Gemm, config: DecoderConfig, rows: Sequence[Row], tokens: Sequence[int], window: int | None
    ) -> None:
        self._config = config
        spans = _spans([row.length for row in rows])
        sizes = [config.num_heads * row.length * seen for row, seen in zip(rows, tokens, strict=True)]
        # Those of rows with one token lie together: few calls for all of them.
        single = [index for index, row in enumerate(rows) if row.length == 1]
        longer = [index for index, row in enumerate(rows) if row.length > 1]
        ends = dict(zip([*single, *longer], np.cumsum([sizes[index] for index in [*single, *longer]]), strict=True))
        starts = [int(ends[index]) - sizes[index] for index in range(len(rows))]
        scores = np.empty(sum(sizes), np.float32)
        looks = [_look(config, spans[n], tokens[n], starts[n]) for n in range(len(rows))]
        self._of_row = np.repeat(np.arange(len(rows)), [look.score.count for look in looks])
        self._head = np.concatenate([look.kv_heads for look in looks]).astype(np.uint64)
        self._at_queries = _in_bytes(look.queries for look in looks)
        self._at_scores = _in_bytes(look.scores for look in looks) + np.uint64(scores.ctypes.data)
        self._at_out = _in_bytes(look.out for look in looks)
        self._keys_first = np.repeat([row.length == 1 for row in rows], [look.score.count for look in looks])
        self._score = ProductBatch(gemm, [look.score for look in looks])
        self._gather = ProductBatch(gemm, [look.gather for look in looks])
        self._single = _SingleScores(scores, config, [tokens[index] for index in single])
        self._single_tokens = [spans[index].start for index in single]
        self._longer = [
            (spans[n], scores[starts[n] : starts[n] + sizes[n]].reshape(config.num_heads, -1, tokens[n]))
            for n in longer
        ]
        self._masks = [_mask(rows[n], tokens[n], window) for n in longer]

    def attend(self, seen: Sequence[SeenOnHost], qkv: Matrix, out: Matrix) -> None:
        strides = np.array([each.stride for each in seen], np.uint64)[self._of_row] * self._head
        keys = np.array([each.keys for each in seen], np.uint64)[self._of_row] + strides
        values = np.array([each.values for each in seen], np.uint64)[self._of_row] + strides
        queries = self._at_queries + np.uint64(qkv.ctypes.data)
        first, second = np.where(self._keys_first, keys, queries), np.where(self._keys_first, queries, keys)
        self._score.multiply(first, second, self._at_scores)
        single_sums = self._single.exponentiate()
        sums = [_exponentiate(scores, mask) for (_, scores), mask in zip(self._longer, self._masks, strict=True)]
        self._gather.multiply(self._at_scores, values, self._at_out + np.uint64(out.ctypes.data))
        by_head = out.reshape(len(out), self._config.num_heads, -1)
        by_head[self._single_tokens] /= single_sums[:, :, None]
        for (span, _), total in zip(self._longer, sums, strict=True):
            by_head[span] /= total.T[:, :, None]


@dataclass(frozen=True, slots=True)
class _Look:
    """One row's products; where their operands begin, in elements, and the key-value head of each."""

    score: Products
    gather: Products
    kv_heads: Addresses
    queries: Addresses
    scores: Addresses
    out: Addresses


def _look(config: DecoderConfig, span: slice, seen: int, start: int) -> _Look:
    """The products of the row with these tokens; its scores begin at `start`."""
    heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
    width, group, length = heads + 2 * groups, heads // groups, span.stop - span.start
    count = groups if length == 1 else heads
    own = np.arange(count, dtype=np.uint64)
    if length == 1:
        head, size = own * np.uint64(group), seen * group
        score = Products(count, seen, group, dim, dim, dim, group, transpose_b=True)
        gather = Products(count, group, dim, seen, group, dim, dim, transpose_a=True)
    else:
        head, size = own, length * seen
        score = Products(count, length, seen, dim, width * dim, dim, seen, transpose_b=True)
        gather = Products(count, length, dim, seen, seen, dim, heads * dim)
    return _Look(
        score=score,
        gather=gather,
        kv_heads=head // np.uint64(group),
        queries=(head + np.uint64(span.start * width)) * np.uint64(dim),
        scores=own * np.uint64(size) + np.uint64(start),
        out=(head + np.uint64(span.start * heads)) * np.uint64(dim),
    )


class _SingleScores:
    """The scores of all rows with one token: for each of their key-value heads a matrix (S, group)."""

    def __init__(self, scores: Matrix, config: DecoderConfig, tokens: Sequence[int]) -> None:
        """They are the first of `scores` (flat)."""
        self._heads = config.num_heads
        self._lengths = np.repeat(np.array(tokens, np.intp), config.num_kv_heads)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._scores = scores[: config.num_heads * sum(tokens)].reshape(-1, config.num_heads // config.num_kv_heads)

    def exponentiate(self) -> Matrix:
        """In place, the greatest becoming 1; their sums. Shapes: returns (rows, H)."""
        if not self._scores.size:
            return np.empty((0, self._heads), np.float32)
        self._scores -= np.repeat(np.maximum.reduceat(self._scores, self._starts), self._lengths, axis=0)
        np.exp(self._scores, out=self._scores)
        return np.add.reduceat(self._scores, self._starts).reshape(-1, self._heads)


def _exponentiate(scores: Matrix, mask: Matrix) -> Matrix:
    """In place, the greatest becoming 1; their sums. Shapes: scores (H, L, S), mask (L, any) of the last; (H, L)."""
    scores[:, :, scores.shape[2] - mask.shape[1] :] += mask
    scores -= scores.max(axis=2, keepdims=True)
    np.exp(scores, out=scores)
    sums: Matrix = scores.sum(axis=2)
    return sums


def _mask(row: Row, seen: int, window: int | None) -> Matrix:
    """To be added to the scores of the newest tokens that it is as wide as. Shapes: float32 (L, L or S)."""
    everything_before = row.hidden_from is None and (window is None or seen <= window)
    may_look = np.array(causal_mask(row.length, seen, window, row.hidden_from))
    if everything_before:
        may_look = may_look[:, seen - row.length :]
    return np.where(may_look, np.float32(0), np.float32(-np.inf))


def _on_host(cache: LayerCache) -> KVCache:
    assert isinstance(cache, KVCache)
    return cache


def _in_bytes(parts: Iterable[Addresses]) -> Addresses:
    return np.concatenate(list(parts)) * np.uint64(4)


def _spans(lengths: Sequence[int]) -> list[slice]:
    """Each row's tokens among all."""
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
