"""A state space's chunk by products of its tokens with each other, rather than one token after another.

For one row of up to `MOST_TOKENS`; the kernel that goes through the state token by token takes ten times as long, and
gives other last bits. Source: Mamba-2 (arXiv 2405.21060), section 6.
"""

from collections.abc import Sequence

import numpy as np

from models.executors.onnx.graph import Graph
from models.ops import StateSpace

MOST_TOKENS = 128
"""The products of tokens with each other grow with the square."""


class ChunkNodes:
    """What is recorded of a chunk of tokens, whatever the rule. Thread: any."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def left(self, until: str) -> str:
        """What is left of each earlier token at each later one. Shapes: until (G, R, T, 1); (G, R, T, T)."""
        add = self._graph.add
        (gaps,) = add("Sub", [until, self.turned(until)])
        (left,) = add("Exp", add("Min", [gaps, self._graph.constant(np.array(0, np.float32))]))
        return add("Trilu", [left], upper=0)[0]

    def last(self, until: str) -> str:
        """The last token's sum. Shapes: until (G, R, T, 1); (G, R, 1, 1)."""
        return self._graph.add("Slice", [until, *(self.shape(value) for value in (-1, 2**62, 2))])[0]

    def behind(self, read: str, value: str) -> str:
        """A value (G, R, 1, 1), computed only when `read` (G, R, ...) has been.

        The state is written where it was, so nothing may read the old one any more.
        """
        add = self._graph.add
        (sums,) = add("ReduceSum", [read, self.shape(2, 3)], keepdims=1)
        (nothing,) = add("Mul", [sums, self._graph.constant(np.array(0, np.float32))])
        return add("Add", [value, nothing])[0]

    def turned(self, x: str) -> str:
        """The last two axes the other way round."""
        return self._graph.add("Transpose", [x], perm=[0, 1, 3, 2])[0]

    def shaped(self, x: str, *lengths: int) -> str:
        """In another shape."""
        return self._graph.add("Reshape", [x, self.shape(*lengths)])[0]

    def shape(self, *lengths: int) -> str:
        """Whole numbers as a constant."""
        return self._graph.constant(np.array(lengths, np.int64))


class Scan(ChunkNodes):
    """Records into a branch of the graph. Head h is head r of group g here: (G, R, ...). Thread: any."""

    def __init__(self, graph: Graph, spec: StateSpace) -> None:
        super().__init__(graph)
        self._spec = spec

    def record(self, inputs: Sequence[str], decay: str, past: str) -> tuple[str, str]:
        """The outputs and the state behind them; `inputs` are c, b and x.

        Shapes: c and b (T, G, N), x (T, H, P), decay (T, H), past (1, H, P, N); returns as x and past.
        """
        add, spec = self._graph.add, self._spec
        c, b, x = inputs
        width = spec.heads // spec.groups
        (sums,) = add("CumSum", [decay, self._graph.constant(np.array(0, np.int64))])
        until = self.shaped(add("Transpose", [sums], perm=[1, 0])[0], spec.groups, width, -1, 1)
        queries, keys = (self._ahead(part, spec.groups, 1, spec.state_dim) for part in (c, b))
        values = self._ahead(x, spec.groups, width, spec.head_dim)
        state = self.shaped(past, spec.groups, width, spec.head_dim, spec.state_dim)

        (alike,) = add("MatMul", [queries, self.turned(keys)])
        (within,) = add("MatMul", [add("Mul", [alike, self.left(until)])[0], values])
        (seen,) = add("MatMul", [queries, self.turned(state)])
        (before,) = add("Mul", [seen, *add("Exp", [until])])
        whole = self.last(until)
        (share,) = add("Exp", add("Sub", [whole, until]))
        (brought,) = add("MatMul", [self.turned(add("Mul", [values, share])[0]), keys])
        (kept,) = add("Mul", [state, self.behind(before, *add("Exp", [whole]))])

        outputs = self.shaped(add("Add", [within, before])[0], spec.heads, -1, spec.head_dim)
        (made,) = add("Transpose", [outputs], perm=[1, 0, 2])
        return made, self.shaped(add("Add", [kept, brought])[0], 1, *spec.shape)

    def _ahead(self, x: str, groups: int, width: int, dim: int) -> str:
        """Shapes: (T, G * R, d); (G, R, T, d)."""
        return self.shaped(self._graph.add("Transpose", [x], perm=[1, 0, 2])[0], groups, width, -1, dim)
