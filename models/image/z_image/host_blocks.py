"""The blocks of Z-Image's transformer in the form that is fast on a CPU: numpy arrays, a BLAS, a thread for each core.

Owns the weights that it takes from `blocks`, lent by MLX as they lie there; the lists of blocks are empty
afterwards. A norm's weight and the time's modulation behind it are one vector a pass, and the scale of the attention's
scores is in the weight of the queries' norm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn

from models.host import lend
from models.image.gemm import Crew, Gemm, chunks
from models.image.host_layers import (
    ROWS,
    Floats,
    Product,
    Rotations,
    attend,
    attention_bytes,
    head_norm,
    multiply,
    rms_norm,
    score_bound,
    swiglu,
    turn,
    workspace,
)
from models.image.z_image.blocks import QK_EPS, Block
from models.image.z_image.config import TransformerConfig

ALIGNED = 64
"""A wide row begins at a multiple of so many numbers: products into it are a fifth faster."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """The norms' weights, and what the time makes of them: before and behind each half of a block. Each (D,)."""

    before: Floats
    behind: Floats
    before_mlp: Floats
    behind_mlp: Floats


@dataclass(frozen=True, slots=True)
class Weights:
    """One block's; matrices are (out, in)."""

    qkv: tuple[Floats, Floats, Floats]
    out: Floats
    query_norm: Floats
    """With the scores' scale in it."""
    key_norm: Floats
    gate: Floats
    up: Floats
    down: Floats
    norms: Vectors
    modulation: tuple[Floats, Floats] | None
    """Weight (4D, E), bias (4D,)."""

    def vectors(self, gemm: Gemm, time: Floats | None) -> Vectors:
        """Of a pass at this time. Shape: time (1, E), contiguous; None without modulation."""
        norms = self.norms
        if time is None or self.modulation is None:
            return norms
        weight, bias = self.modulation
        modulation = np.empty((1, len(bias)), np.float32)
        gemm.multiply(time, weight, modulation, transpose_b=True)
        scale, gate, scale_mlp, gate_mlp = (modulation[0] + bias).reshape(4, -1)
        return Vectors(
            before=norms.before * (1.0 + scale),
            behind=norms.behind * np.tanh(gate),
            before_mlp=norms.before_mlp * (1.0 + scale_mlp),
            behind_mlp=norms.behind_mlp * np.tanh(gate_mlp),
        )


class HostStack:
    """Blocks that follow one another; see `blocks.Stack`. Thread: the MLX thread, which others help meanwhile."""

    def __init__(self, gemm: Gemm, blocks: list[Block], config: TransformerConfig) -> None:
        """Take the weights out of the blocks; the list is empty then."""
        self._gemm = gemm
        self._config = config
        self._blocks: list[Weights] = []
        while blocks:
            self._blocks.append(_weights(blocks.pop(0), config))

    def __call__(self, x: mx.array, rotations: mx.array, time: mx.array | None, wanted: int | None = None) -> mx.array:
        """See `blocks.Stack`."""
        # A copy, for its strides too: those of a single row can be anything.
        moment = None if time is None else lend(time).copy()
        with Crew(self._gemm) as crew:
            vectors = [self._blocks[0].norms] * len(self._blocks)

            def modulate(_: int, index: int) -> None:
                vectors[index] = self._blocks[index].vectors(self._gemm, moment)

            crew.share(modulate, range(len(self._blocks)))
            turns = lend(rotations.view(mx.float32)).view(np.complex64)
            run = _Pass(crew, self._config, lend(x), turns)
            everything = x.shape[0]
            for index, (weights, own) in enumerate(zip(self._blocks, vectors, strict=True), start=1):
                last = index == len(self._blocks)
                run.block(weights, own, wanted if last and wanted is not None else everything)
        return mx.array(run.x[:wanted])

    def first_input(self, x: mx.array, time: mx.array) -> mx.array:
        """See `blocks.Stack`."""
        hidden = lend(x)
        out = np.empty_like(hidden)
        vectors = self._blocks[0].vectors(self._gemm, lend(time).copy())
        rms_norm(hidden, vectors.before, self._config.norm_eps, out)
        return mx.array(out)

    def working_bytes(self, length: int) -> int:
        """The peak of a pass over a sequence of so many tokens. Thread: any."""
        config = self._config
        # A copy, its norm, what is added to it; with MLX the embedded image, refined, with the caption, and as it ends,
        # and what it keeps of freed arrays (measured); the widest products.
        numbers = length * (8 * config.dim + _widest(config))
        return 4 * numbers + attention_bytes(self._gemm.threads, length, length)


class _Pass:
    """One sequence's way through the blocks."""

    def __init__(self, crew: Crew, config: TransformerConfig, x: Floats, rotations: Rotations) -> None:
        """Begin with `x`, (L, D), which is copied."""
        self._crew, self._config, self._rotations = crew, config, rotations
        self.x, self._normed, self._added, self._wide = workspace(*[x.shape] * 3, (len(x), _widest(config)))
        self.x[:] = x

    def block(self, weights: Weights, vectors: Vectors, wanted: int) -> None:
        """Run a block, of which only the first `wanted` rows are needed afterwards."""
        dim, mlp, eps, x, added = self._config.dim, self._config.mlp_dim, self._config.norm_eps, self.x, self._added
        everything, normed, aligned = len(x), self._normed, _aligned(mlp)
        queries, keys, values = (self._wide[:, n * dim : (n + 1) * dim] for n in range(3))
        gate, up = self._wide[:, :mlp], self._wide[:, aligned : aligned + mlp]
        of_queries, of_keys, of_values = weights.qkv

        def add_attended(rows: slice) -> None:
            rms_norm(added[rows], vectors.behind, eps, added[rows])
            x[rows] += added[rows]
            rms_norm(x[rows], vectors.before_mlp, eps, normed[rows])

        def add(rows: slice) -> None:
            rms_norm(added[rows], vectors.behind_mlp, eps, added[rows])
            x[rows] += added[rows]

        self._by_rows(everything, lambda rows: rms_norm(x[rows], vectors.before, eps, normed[rows]))
        self._multiply(
            # Rows that are not wanted are still looked at.
            Product(normed[:wanted], of_queries, queries[:wanted]),
            Product(normed, of_keys, keys),
            Product(normed, of_values, values),
        )
        self._by_rows(wanted, lambda rows: self._place(queries[rows], weights.query_norm, rows))
        self._by_rows(everything, lambda rows: self._place(keys[rows], weights.key_norm, rows))
        bound = score_bound(weights.query_norm, weights.key_norm) if self._config.qk_norm else np.inf
        attend(self._crew, queries[:wanted], keys, values, self._config.num_heads, bound=bound)
        self._multiply(Product(queries[:wanted], weights.out, added[:wanted]))
        self._by_rows(wanted, add_attended)
        self._multiply(
            Product(normed[:wanted], weights.gate, gate[:wanted]), Product(normed[:wanted], weights.up, up[:wanted])
        )
        self._by_rows(wanted, lambda rows: swiglu(gate[rows], up[rows]))
        self._multiply(Product(gate[:wanted], weights.down, added[:wanted]))
        self._by_rows(wanted, add)

    def _place(self, heads: Floats, norm: Floats, rows: slice) -> None:
        """Normalise queries or keys, and turn them by their positions. Shapes: heads (L, D), norm (d,)."""
        by_head = heads.reshape(len(heads), self._config.num_heads, -1)
        if self._config.qk_norm:
            head_norm(by_head, norm, QK_EPS)
        else:
            by_head *= norm
        turn(heads, self._rotations[rows])

    def _multiply(self, *products: Product) -> None:
        multiply(self._crew, products)

    def _by_rows(self, count: int, work: Callable[[slice], None]) -> None:
        self._crew.share(lambda _, rows: work(rows), chunks(count, ROWS))


def _widest(config: TransformerConfig) -> int:
    """What a row's queries, keys and values take, or its gate and up."""
    return max(3 * config.dim, 2 * _aligned(config.mlp_dim))


def _aligned(width: int) -> int:
    return width + -width % ALIGNED


def _weights(block: Block, config: TransformerConfig) -> Weights:
    """Take everything out of a block."""
    attention, feed_forward = block.attention, block.feed_forward
    scale = np.float32(config.head_dim**-0.5)
    ones = np.ones(config.head_dim, np.float32)
    modulation = block.adaLN_modulation[0] if "adaLN_modulation" in block else None
    return Weights(
        qkv=(_taken(attention.to_q), _taken(attention.to_k), _taken(attention.to_v)),
        out=_taken(attention.to_out[0]),
        query_norm=scale * (_taken(attention.norm_q) if config.qk_norm else ones),
        key_norm=_taken(attention.norm_k) if config.qk_norm else ones,
        gate=_taken(feed_forward.w1),
        up=_taken(feed_forward.w3),
        down=_taken(feed_forward.w2),
        norms=Vectors(
            before=_taken(block.attention_norm1),
            behind=_taken(block.attention_norm2),
            before_mlp=_taken(block.ffn_norm1),
            behind_mlp=_taken(block.ffn_norm2),
        ),
        modulation=None if modulation is None else (lend(modulation.weight), lend(modulation.bias)),
    )


def _taken(layer: nn.Module) -> Floats:
    """A layer's weight as numpy sees it."""
    weight = lend(layer.weight)
    layer.clear()
    return weight
