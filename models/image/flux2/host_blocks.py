"""The blocks of the FLUX.2 transformer in the form that is fast on a CPU: numpy arrays, a BLAS, a thread for each core.

Owns the weights that it takes from `blocks`, lent by MLX as they lie there; the blocks are empty
afterwards. One array holds the whole sequence from the first block to the last, another what a block's widest matrix
makes of it. The last block computes only what the picture's own tokens become.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn

from models.host import lend
from models.image.flux2.blocks import Conditions, DoubleBlock, Modulations, SingleBlock
from models.image.flux2.config import TransformerConfig
from models.image.gemm import Crew, Gemm, chunks
from models.image.host_layers import (
    ROWS,
    Floats,
    Product,
    Rotations,
    attend,
    attention_bytes,
    head_norm,
    layer_norm,
    multiply,
    score_bound,
    swiglu,
    turn,
    workspace,
)


@dataclass(frozen=True, slots=True)
class StreamWeights:
    """What a block of two streams does to one of them; matrices are (out, in)."""

    qkv: tuple[Floats, Floats, Floats]
    out: Floats
    query_norm: Floats
    """With the scores' scale in it."""
    key_norm: Floats
    mlp_in: Floats
    mlp_out: Floats


@dataclass(frozen=True, slots=True)
class SingleWeights:
    """A block of one stream; matrices are (out, in)."""

    inputs: Floats
    """(3D + 2M, D): queries, keys, values, gate, up."""
    out: Floats
    """(D, D + M): of what attention found, and of the MLP."""
    query_norm: Floats
    key_norm: Floats


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of the sequence, and how the noise level shifts, scales and gates them; each of the three (D,)."""

    rows: slice
    modulation: Sequence[Floats]


class HostBlocks:
    """All blocks. Thread: the MLX thread, which others help meanwhile."""

    def __init__(
        self, gemm: Gemm, config: TransformerConfig, doubles: list[DoubleBlock], singles: list[SingleBlock]
    ) -> None:
        """Take the weights out of the blocks; both lists are empty then."""
        self._gemm = gemm
        self._config = config
        scale = config.head_dim**-0.5
        self._doubles: list[tuple[StreamWeights, StreamWeights]] = []
        while doubles:
            self._doubles.append(_double(doubles.pop(0), scale))
        self._singles: list[SingleWeights] = []
        while singles:
            self._singles.append(_single(singles.pop(0), scale))

    def working_bytes(self, length: int) -> int:
        """The peak of a pass through a sequence of so many tokens. Thread: any."""
        config = self._config
        numbers = length * (3 * config.dim + 3 * config.dim + 2 * config.mlp_dim)
        return 4 * numbers + attention_bytes(self._gemm.threads, length, length)

    def __call__(self, own: mx.array, modulations: Modulations, conditions: Conditions) -> mx.array:
        """Shapes: own (S, D), the picture's tokens embedded; returns what has become of them."""
        text = conditions.text.shape[0]
        picture = slice(text, text + own.shape[0])
        references = [] if conditions.references is None else [conditions.references]
        parts = [lend(part) for part in (conditions.text, own, *references)]
        rotations = lend(conditions.rotations.view(mx.float32)).view(np.complex64)
        of_text, of_picture, (of_both,) = (
            _triples(each, self._config.dim) for each in (modulations.text, modulations.picture, modulations.single)
        )
        with Crew(self._gemm) as crew:
            run = _Pass(crew, self._config, parts, rotations)
            for weights in self._doubles:
                run.double(weights, text, of_text, of_picture)
            for index, single in enumerate(self._singles, start=1):
                run.single(single, of_both, picture if index == len(self._singles) else slice(0, len(run.x)))
        return mx.array(run.x[picture])


class _Pass:
    """One sequence's way through the blocks."""

    def __init__(self, crew: Crew, config: TransformerConfig, parts: Sequence[Floats], rotations: Rotations) -> None:
        """Begin with the parts of the sequence, (n, D) each."""
        self._crew, self._config, self._rotations = crew, config, rotations
        length, dim = len(rotations), config.dim
        self.x, self._normed, self._added, self._wide = workspace(
            *[(length, dim)] * 3, (length, 3 * dim + 2 * config.mlp_dim)
        )
        np.concatenate(parts, out=self.x)

    def double(
        self,
        weights: tuple[StreamWeights, StreamWeights],
        text: int,
        of_text: Sequence[Sequence[Floats]],
        of_picture: Sequence[Sequence[Floats]],
    ) -> None:
        """A block of two streams. The sequence's first `text` rows are one of them."""
        dim, mlp = self._config.dim, self._config.mlp_dim
        streams = (slice(0, text), slice(text, len(self.x)))
        attention, feed_forward = (
            [_Part(rows, modulation) for rows, modulation in zip(streams, pair, strict=True)]
            for pair in zip(of_text, of_picture, strict=True)
        )
        qkv, each = self._wide[:, : 3 * dim], tuple(zip(streams, weights, strict=True))
        self._normalise(attention)
        multiply(
            self._crew,
            [
                Product(self._normed[rows], matrix, qkv[rows, n * dim : (n + 1) * dim])
                for rows, stream in each
                for n, matrix in enumerate(stream.qkv)
            ],
        )
        for rows, stream in each:
            self._place(rows, stream.query_norm, stream.key_norm)
        bound = max(score_bound(a.query_norm, b.key_norm) for a in weights for b in weights)
        self._attend(slice(0, len(self.x)), bound)
        multiply(self._crew, [Product(qkv[rows, :dim], stream.out, self._added[rows]) for rows, stream in each])
        self._add(attention)
        self._normalise(feed_forward)
        inner = self._wide[:, : 2 * mlp]
        multiply(self._crew, [Product(self._normed[rows], stream.mlp_in, inner[rows]) for rows, stream in each])
        self._by_rows(slice(0, len(self.x)), lambda part: swiglu(inner[part, :mlp], inner[part, mlp:]))
        multiply(self._crew, [Product(inner[rows, :mlp], stream.mlp_out, self._added[rows]) for rows, stream in each])
        self._add(feed_forward)

    def single(self, weights: SingleWeights, modulation: Sequence[Floats], wanted: slice) -> None:
        """A block of one stream, of which only the rows `wanted` are needed afterwards."""
        dim, mlp, wide = self._config.dim, self._config.mlp_dim, self._wide
        everything = slice(0, len(self.x))
        self._normalise([_Part(everything, modulation)])
        normed, inputs = self._normed, weights.inputs
        if wanted == everything:
            products = [Product(normed, inputs, wide)]
        else:
            # The others are only looked at: their keys and values are enough.
            products = [
                Product(normed, inputs[dim : 3 * dim], wide[:, dim : 3 * dim]),
                Product(normed[wanted], inputs[:dim], wide[wanted, :dim]),
                Product(normed[wanted], inputs[3 * dim :], wide[wanted, 3 * dim :]),
            ]
        multiply(self._crew, products)
        self._place(everything, weights.query_norm, weights.key_norm)
        gate, up = wide[:, 3 * dim : 3 * dim + mlp], wide[:, 3 * dim + mlp :]
        self._by_rows(wanted, lambda part: swiglu(gate[part], up[part]))
        self._attend(wanted, score_bound(weights.query_norm, weights.key_norm))
        more = (gate[wanted], weights.out[:, dim:])
        multiply(self._crew, [Product(wide[wanted, :dim], weights.out[:, :dim], self._added[wanted], more)])
        self._add([_Part(wanted, modulation)])

    def _normalise(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            shift, scale = part.modulation[0], 1.0 + part.modulation[1]
            self._by_rows(part.rows, self._normaliser(scale, shift))

    def _normaliser(self, scale: Floats, shift: Floats) -> Callable[[slice], None]:
        return lambda rows: layer_norm(self.x[rows], scale, shift, self._config.eps, self._normed[rows])

    def _add(self, parts: Sequence[_Part]) -> None:
        """Add what a block has found, gated, to the sequence."""
        for part in parts:
            self._by_rows(part.rows, self._adder(part.modulation[2]))

    def _adder(self, gate: Floats) -> Callable[[slice], None]:
        def add(rows: slice) -> None:
            self._added[rows] *= gate
            self.x[rows] += self._added[rows]

        return add

    def _place(self, rows: slice, query_norm: Floats, key_norm: Floats) -> None:
        """Normalise queries and keys of these rows, and turn them by their positions."""
        dim, heads = self._config.dim, self._config.num_heads

        def place(part: slice) -> None:
            for n, norm in enumerate((query_norm, key_norm)):
                x = self._wide[part, n * dim : (n + 1) * dim]
                head_norm(x.reshape(len(x), heads, -1), norm, self._config.eps)
                turn(x, self._rotations[part])

        self._by_rows(rows, place)

    def _attend(self, wanted: slice, bound: float) -> None:
        dim = self._config.dim
        queries, keys, values = (self._wide[:, n * dim : (n + 1) * dim] for n in range(3))
        attend(self._crew, queries[wanted], keys, values, self._config.num_heads, bound=bound)

    def _by_rows(self, rows: slice, work: Callable[[slice], None]) -> None:
        parts = chunks(rows.stop - rows.start, ROWS)
        self._crew.share(
            lambda _, part: work(part), [slice(rows.start + part.start, rows.start + part.stop) for part in parts]
        )


def _triples(modulation: mx.array, dim: int) -> list[list[Floats]]:
    """Shift, scale and gate, as often as they are there. Shapes: (1, 3 * n * D); each (D,)."""
    return [list(triple) for triple in lend(modulation).reshape(-1, 3, dim)]


def _double(block: DoubleBlock, scale: float) -> tuple[StreamWeights, StreamWeights]:
    """Take everything out of a block: the text's, then the picture's."""
    attention = block.attn
    return (
        StreamWeights(
            qkv=(_taken(attention.add_q_proj), _taken(attention.add_k_proj), _taken(attention.add_v_proj)),
            out=_taken(attention.to_add_out),
            query_norm=_taken(attention.norm_added_q) * np.float32(scale),
            key_norm=_taken(attention.norm_added_k),
            mlp_in=_taken(block.ff_context.linear_in),
            mlp_out=_taken(block.ff_context.linear_out),
        ),
        StreamWeights(
            qkv=(_taken(attention.to_q), _taken(attention.to_k), _taken(attention.to_v)),
            out=_taken(attention.to_out[0]),
            query_norm=_taken(attention.norm_q) * np.float32(scale),
            key_norm=_taken(attention.norm_k),
            mlp_in=_taken(block.ff.linear_in),
            mlp_out=_taken(block.ff.linear_out),
        ),
    )


def _single(block: SingleBlock, scale: float) -> SingleWeights:
    attention = block.attn
    return SingleWeights(
        inputs=_taken(attention.to_qkv_mlp_proj),
        out=_taken(attention.to_out),
        query_norm=_taken(attention.norm_q) * np.float32(scale),
        key_norm=_taken(attention.norm_k),
    )


def _taken(layer: nn.Module) -> Floats:
    """A layer's weight as numpy sees it."""
    weight = lend(layer.weight)
    layer.clear()
    return weight
