"""A decoder's layers on numpy arrays, for steps of one token a row: what is fast on a CPU with a BLAS.

A node of MLX's graph costs microseconds and its element-wise kernels are slow. Here a step is products of the BLAS and
numpy's kernels, in place, on memory that MLX's arrays lend; keys and values are written where the cache holds them. A
row's attention is its own, so nothing but the shapes of the large products depends on its company.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.cache import KVCache
from models.gemm import Addresses, Gemm, Matrix, ProductBatch
from models.llm.base import Row
from models.nn.decoder import DecoderConfig

Rotations = npt.NDArray[np.complex64]


@dataclass(frozen=True, slots=True)
class HostLayer:
    """`models.nn.fused.FusedLayer`, lent to numpy and never written; matrices are (out, in)."""

    qkv: Matrix
    qkv_bias: Matrix | None
    qk_norm: Matrix | None
    """(H + K, d)"""
    output: Matrix
    output_bias: Matrix | None
    gate_up: Matrix
    gate_up_bias: Matrix | None
    down: Matrix
    down_bias: Matrix | None


class HostStep:
    """Runs steps of one token a row. Thread: the MLX thread."""

    def __init__(self, config: DecoderConfig, gemm: Gemm, layers: Sequence[HostLayer], head: Matrix) -> None:
        """Shapes: head (V, D)."""
        self._config = config
        self._gemm = gemm
        self._layers = layers
        self._head = head
        self._epsilon = np.float32(config.rms_norm_eps * config.hidden_size)
        self._head_epsilon = np.float32(config.rms_norm_eps * config.head_dim)

    @staticmethod
    def takes(rows: Sequence[Row]) -> bool:
        """Whether a step is of the kind that is run here: a token a row, plain caches."""
        return all(row.length == 1 and type(row.cache[0]) is KVCache for row in rows)

    def run(self, x: Matrix, rotations: Rotations, rows: Sequence[Row]) -> Matrix:
        """From embeddings to the residual behind the last layer, scaled to a sum of squares of 1.

        Shapes: x (T, D), rotations (T, 1, d / 2); returns (T, D).
        """
        x = self._enough(x)
        config, count, width = self._config, len(x), self._config.intermediate_size
        unit = np.empty_like(x)
        qkv = np.empty((count, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim), np.float32)
        attended = np.zeros((count, config.num_heads * config.head_dim), np.float32)
        gate_up = np.empty((count, 2 * width), np.float32)
        caches = zip(*(row.cache for row in rows), strict=True)
        looks: list[_Looks] = []
        for layer, layer_caches in zip(self._layers, caches, strict=True):
            self._unit(x, unit)
            self._product(unit, layer.qkv, layer.qkv_bias, qkv)
            own = slice(len(rows))
            self._attention(qkv[own], layer.qk_norm, rotations, layer_caches, looks=looks, out=attended[own])
            self._plus_product(attended, layer.output, layer.output_bias, x)
            self._unit(x, unit)
            self._product(unit, layer.gate_up, layer.gate_up_bias, gate_up)
            _swiglu(gate_up[:, :width], gate_up[:, width:])
            self._plus_product(gate_up[:, :width], layer.down, layer.down_bias, x)
        self._unit(x, unit)
        return unit[: len(rows)]

    def logits(self, hidden: Matrix) -> Matrix:
        """Shapes: hidden (N, D); returns (N, V)."""
        x = self._enough(hidden)
        out = np.empty((len(x), len(self._head)), np.float32)
        self._product(x, self._head, None, out)
        return out[: len(hidden)]

    def _enough(self, x: Matrix) -> Matrix:
        """The rows, repeated where the BLAS is faster with more. Shapes: (T, D) to (at least T, D)."""
        least = self._gemm.least_rows
        return x if len(x) >= least else np.repeat(x, least, axis=0)

    def _product(self, x: Matrix, matrix: Matrix, bias: Matrix | None, out: Matrix) -> None:
        self._gemm.multiply(x, matrix, out, transpose_b=True)
        if bias is not None:
            out += bias

    def _plus_product(self, x: Matrix, matrix: Matrix, bias: Matrix | None, out: Matrix) -> None:
        self._gemm.multiply(x, matrix, out, accumulate=True, transpose_b=True)
        if bias is not None:
            out += bias

    def _unit(self, x: Matrix, out: Matrix) -> None:
        """Scale to a sum of squares of 1. Shapes: both (T, D)."""
        np.multiply(x, 1.0 / np.sqrt(np.vecdot(x, x) + self._epsilon)[:, None], out=out)

    def _attention(
        self,
        qkv: Matrix,
        norm: Matrix | None,
        rotations: Rotations,
        caches: Sequence[KVCache],
        *,
        looks: "list[_Looks]",
        out: Matrix,
    ) -> None:
        """Each row's softmax attention. Shapes: qkv (T, (H + 2K) * d), is turned in place; out (T, H * d)."""
        config = self._config
        heads, groups = config.num_heads, config.num_kv_heads
        parts = qkv.reshape(len(qkv), heads + 2 * groups, config.head_dim)
        turned = parts[:, : heads + groups]
        if norm is not None:
            turned /= np.sqrt(np.vecdot(turned, turned) + self._head_epsilon)[:, :, None]
            turned *= norm
        pairs = turned.view(np.complex64)
        pairs *= rotations
        new = zip(caches, parts[:, heads : heads + groups], parts[:, heads + groups :], strict=True)
        spans = [cache.append_on_host(key, value) for cache, key, value in new]
        keys, values, lengths, strides = zip(*spans, strict=True)
        if not looks or looks[-1].lengths != lengths:
            looks.append(_Looks(self._gemm, config, lengths))
        steps = np.arange(groups, dtype=np.uint64) * np.array(strides, np.uint64)[:, None]
        starts = np.array([keys, values], np.uint64)[:, :, None] + steps
        looks[-1].look(qkv, starts[0], starts[1], out)


class _Looks:
    """Attention of rows that see so many keys; the layers of a step whose windows are alike share one."""

    def __init__(self, gemm: Gemm, config: DecoderConfig, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self._dim, heads, groups = config.head_dim, config.num_heads, config.num_kv_heads
        group = heads // groups
        self._of_head = np.repeat(lengths, heads)
        bounds = np.cumsum(self._of_head)
        self._starts = bounds - self._of_head
        self._scores = np.empty(bounds[-1], np.float32)
        at_row = np.arange(len(lengths), dtype=np.uint64)[:, None] * np.uint64(4 * self._dim)
        at_group = np.arange(groups, dtype=np.uint64) * np.uint64(4 * self._dim * group)
        self._at_queries = at_row * np.uint64(heads + 2 * groups) + at_group
        self._at_out = at_row * np.uint64(heads) + at_group
        self._at_scores = (self._starts[::group] * 4 + self._scores.ctypes.data).astype(np.uint64)
        self._score = ProductBatch(gemm, [(group, n, self._dim) for n in lengths], groups, transpose_b=True)
        self._gather = ProductBatch(gemm, [(group, self._dim, n) for n in lengths], groups, transpose_b=False)

    def look(self, queries: Matrix, keys: Addresses, values: Addresses, out: Matrix) -> None:
        """Shapes: queries (T, (H + 2K) * d), keys and values (T, K), out (T, H * d); contiguous."""
        scores = self._scores
        self._score.multiply(self._at_queries + np.uint64(queries.ctypes.data), keys, self._at_scores)
        scores -= np.repeat(np.maximum.reduceat(scores, self._starts), self._of_head)
        np.exp(scores, out=scores)
        self._gather.multiply(self._at_scores, values, self._at_out + np.uint64(out.ctypes.data))
        by_head = out.reshape(-1, self._dim)
        by_head /= np.add.reduceat(scores, self._starts)[:, None]


def _swiglu(gate: Matrix, up: Matrix) -> None:
    """Gate = silu(gate) * up, with silu(g) = h + h * tanh(h), h = g / 2. Shapes: both (T, F)."""
    gate *= np.float32(0.5)
    scale = np.tanh(gate)
    scale += np.float32(1.0)
    gate *= scale
    gate *= up
