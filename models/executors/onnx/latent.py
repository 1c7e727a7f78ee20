"""Latent attention's nodes: one head of keys that are values too, and what the heads make of it.

Each head's own matrices go to the queries and to the outputs, not to the latents (they are absorbed), so a token's
state is one latent and one rotated key whatever the number of heads.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.graph import Graph
from models.ops import Attention, LatentAttention, LatentUp


class LatentNodes:
    """Records latent attention. Thread: any."""

    def __init__(self, graph: Graph, attention: AttentionNodes) -> None:
        self._graph = graph
        self._attention = attention

    def record(self, q: str, latent: str, up: LatentUp, layer: int, spec: LatentAttention) -> str:
        """The name of the result (T, H * v). Shapes: q (T, H * (n + r)), latent (T, rank + r)."""
        heads, width = spec.heads, spec.rank + spec.rope_dim
        still, turned = self.parts(q, (up.key_dim, spec.rope_dim), heads)
        absorbed = self._by_head(still, heads, up.key_dim, f"{up.name}.keys")
        queries = self.joined([absorbed, turned], heads, heads * width)
        (together,) = self._graph.add("Concat", [queries, latent, latent], axis=1)
        looked = self._attention.record(together, layer, Attention(heads, 1, width, spec.scale))
        seen, _ = self.parts(looked, (spec.rank, spec.rope_dim), heads)
        return self._by_head(seen, heads, spec.rank, f"{up.name}.values")

    def parts(self, x: str, sizes: Sequence[int], heads: int) -> list[str]:
        """Parts of each head. Shapes: x (T, heads * sum of sizes); (T, heads * size) each."""
        graph = self._graph
        (divided,) = graph.add("Reshape", [x, self._shape(-1, heads, sum(sizes))])
        lengths = graph.constant(np.array(sizes, np.int64))
        parts = graph.add("Split", [divided, lengths], outputs=len(sizes), axis=2)
        return [
            graph.add("Reshape", [part, self._shape(-1, heads * size)])[0]
            for part, size in zip(parts, sizes, strict=True)
        ]

    def joined(self, parts: Sequence[str], heads: int, width: int) -> str:
        """The other way round. Shapes: (T, heads * size) each; (T, width)."""
        graph = self._graph
        # 0 keeps the tokens, -1 is what is left for a head.
        divided = [graph.add("Reshape", [part, self._shape(0, heads, -1)])[0] for part in parts]
        (together,) = graph.add("Concat", divided, axis=2)
        return graph.add("Reshape", [together, self._shape(-1, width)])[0]

    def _by_head(self, x: str, heads: int, width: int, matrices: str) -> str:
        """Each head times a matrix of its own. Shapes: x (T, H * width), matrices (H, width, n); (T, H * n)."""
        graph = self._graph
        (divided,) = graph.add("Reshape", [x, self._shape(-1, heads, width)])
        (ahead,) = graph.add("Transpose", [divided], perm=[1, 0, 2])
        # One row more: a single one would be summed in another order than several are.
        (more,) = graph.add("Pad", [ahead, self._shape(0, 0, 0, 0, 1, 0)])
        (made,) = graph.add("MatMul", [more, matrices])
        (own,) = graph.add("Slice", [made, *(self._shape(value) for value in (0, -1, 1))])
        (back,) = graph.add("Transpose", [own], perm=[1, 0, 2])
        return graph.add("Reshape", [back, graph.add("Concat", [self._tokens(x), self._shape(-1)], axis=0)[0]])[0]

    def _tokens(self, x: str) -> str:
        return self._graph.add("Shape", [x], start=0, end=1)[0]

    def _shape(self, *lengths: int) -> str:
        return self._graph.constant(np.array(lengths, np.int64))


def latent_nbytes(up: LatentUp) -> Iterator[tuple[str, int]]:
    """The arrays that the graph is given of it, and their bytes."""
    yield f"{up.name}.keys", 4 * up.heads * up.key_dim * up.rank
    yield f"{up.name}.values", 4 * up.heads * up.rank * up.value_dim
