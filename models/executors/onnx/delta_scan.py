"""A gated delta rule's chunk by products of its tokens with each other, rather than one token after another.

For one row of up to `MOST_TOKENS`, filled up with tokens that neither bring nor take anything. What each token brings
depends on what those before it brought, which is a triangular system; its matrix is inverted by blocks of doubling
size, for powers of the whole would be too large to be summed in float32. The kernel that goes through the state takes
several times as long, and gives other last bits. Source: gated delta networks (arXiv 2412.06464), section 3.3.
"""

from collections.abc import Sequence

import numpy as np

from models.executors.onnx.graph import Graph
from models.executors.onnx.pointwise import PointwiseNodes
from models.executors.onnx.scan import ChunkNodes
from models.ops import DeltaRule

MOST_TOKENS = 64
_SMALLEST = 8
"""Blocks of so many tokens are inverted by their powers, of which the seventh is the last."""
PADS, TOKENS = "at_once.pads", "tokens"
"""Inputs: by how much (T, H, d) is filled up, int64 (6,), which is nothing for other steps; how many tokens, (1,)."""


class DeltaScan(ChunkNodes):
    """Records into a branch of the graph. Value head h is head r of key head g here: (G, R, …). Thread: any."""

    def __init__(self, graph: Graph, pointwise: PointwiseNodes, spec: DeltaRule) -> None:
        super().__init__(graph)
        self._pointwise = pointwise
        self._spec = spec
        self._shared = spec.heads // spec.key_heads

    def record(self, inputs: Sequence[str], gates: Sequence[str], vectors: Sequence[str], past: str) -> tuple[str, str]:
        """The outputs and the state behind them; `inputs` are q, k and v, `gates` a and b, `vectors` a_log and dt_bias.

        Shapes: q and k (T, G, K), v (T, H, V), a and b (T, H), past (1, H, V, K); returns as v and past.
        """
        add, spec = self._graph.add, self._spec
        queries, keys = (self._ahead(part, 1, spec.key_dim) for part in inputs[:2])
        (queries,) = add("Mul", [queries, self._graph.constant(np.array(spec.key_dim**-0.5, np.float32))])
        values = self._ahead(inputs[2], self._shared, spec.value_dim)
        until, rate = self._gates(gates, vectors)
        state = self.shaped(past, spec.key_heads, self._shared, spec.value_dim, spec.key_dim)
        turned = self.turned(state)

        left, reach = self.left(until), add("Exp", [until])[0]
        (alike,) = add("MatMul", [keys, self.turned(keys)])
        (matrix,) = add("Mul", [add("Trilu", [add("Mul", [alike, left])[0], self._number(-1)], upper=0)[0], rate])
        (known,) = add("Mul", [add("MatMul", [keys, turned])[0], reach])
        (wanted,) = add("Mul", [add("Sub", [values, known])[0], rate])
        (brought,) = add("MatMul", [self._inverse(matrix), wanted])

        (seen,) = add("Mul", [add("MatMul", [queries, self.turned(keys)])[0], left])
        (scaled,) = add("Mul", [add("MatMul", [queries, turned])[0], reach])
        (made,) = add("Add", [add("MatMul", [seen, brought])[0], scaled])
        whole = self.last(until)
        (share,) = add("Exp", add("Sub", [whole, until]))
        (news,) = add("MatMul", [self.turned(add("Mul", [brought, share])[0]), keys])
        # Computed only when the old state has been read: the new one is written where it was.
        (kept,) = add("Mul", [state, self.behind(made, *add("Exp", [whole]))])
        return self._flat(made), self.shaped(add("Add", [kept, news])[0], 1, *spec.shape)

    def _gates(self, gates: Sequence[str], vectors: Sequence[str]) -> tuple[str, str]:
        """The sums of the logarithms of decays, and the rates. Shapes: (G, R, T, 1) both."""
        add, (a_log, dt_bias) = self._graph.add, vectors
        steps = self._pointwise.activated(add("Add", [gates[0], dt_bias])[0], "softplus")
        (decay,) = add("Neg", add("Mul", [steps, *add("Exp", [a_log])]))
        columns = [self._ahead(add("Unsqueeze", [part, self.shape(2)])[0], self._shared, 1) for part in (decay,)]
        columns += [self._ahead(add("Unsqueeze", [*add("Sigmoid", [gates[1]]), self.shape(2)])[0], self._shared, 1)]
        return add("CumSum", [columns[0], self._number(2)])[0], columns[1]

    def _inverse(self, matrix: str) -> str:
        """The inverse of 1 + a strictly lower triangular matrix. Shapes: (G, R, T, T) both ways."""
        add, spec = self._graph.add, self._spec
        flat = self.shaped(matrix, spec.heads, -1)
        (own,) = add("Gather", [flat, self._places(_SMALLEST, 1, 0)], axis=1)
        one = self._graph.constant(np.eye(_SMALLEST, dtype=np.float32))
        (second,) = add("MatMul", [own, own])
        (fourth,) = add("MatMul", [second, second])
        (less,) = add("Sub", [one, own])
        (more,) = add("MatMul", [add("Add", [one, second])[0], add("Add", [one, fourth])[0]])
        (blocks,) = add("MatMul", [less, more])
        size = _SMALLEST
        while size < MOST_TOKENS:
            pairs = MOST_TOKENS // size // 2
            first, last = (
                add("Gather", [blocks, self.shape(*range(begin, 2 * pairs, 2))], axis=1)[0] for begin in (0, 1)
            )
            (below,) = add("Gather", [flat, self._places(size, 2, size)], axis=1)
            (mixed,) = add("Neg", add("MatMul", [add("MatMul", [last, below])[0], first]))
            (nothing,) = add("Sub", [first, first])
            rows = [add("Concat", row, axis=3)[0] for row in ([first, nothing], [mixed, last])]
            (blocks,) = add("Concat", rows, axis=2)
            size *= 2
        return self.shaped(blocks, spec.key_heads, self._shared, MOST_TOKENS, MOST_TOKENS)

    def _places(self, size: int, step: int, below: int) -> str:
        """Where blocks on the diagonal, or so far below it, lie in a flat matrix: one for every `step` blocks."""
        begins = np.arange(0, MOST_TOKENS, step * size)[:, None, None]
        rows, columns = np.arange(size)[:, None] + below, np.arange(size)
        return self._graph.constant(((begins + rows) * MOST_TOKENS + begins + columns).astype(np.int64))

    def _ahead(self, x: str, width: int, dim: int) -> str:
        """Filled up. Shapes: (T, G * width, dim); (G, width, MOST_TOKENS, dim)."""
        (filled,) = self._graph.add("Pad", [x, PADS])
        (turned,) = self._graph.add("Transpose", [filled], perm=[1, 0, 2])
        return self.shaped(turned, self._spec.key_heads, width, -1, dim)

    def _flat(self, x: str) -> str:
        """The tokens that there are. Shapes: (G, R, MOST_TOKENS, V); (T, H, V)."""
        heads = self.shaped(x, self._spec.heads, -1, self._spec.value_dim)
        (turned,) = self._graph.add("Transpose", [heads], perm=[1, 0, 2])
        return self._graph.add("Slice", [turned, self.shape(0), TOKENS, self.shape(0)])[0]

    def _number(self, value: int) -> str:
        return self._graph.constant(np.array(value, np.int64))
