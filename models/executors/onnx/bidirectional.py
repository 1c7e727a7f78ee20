"""Attention of encoders: MultiHeadAttention over whole texts, all padded to one length.

What a query must not see, padding or what is beyond a window, and the bias by relative position come in as inputs.
Where nothing is between the products that make queries, keys and values and what is made of them, all is one node.
"""

from dataclasses import dataclass, field

import numpy as np

from models.executors.onnx.graph import CONTRIB, Graph, TensorType
from models.ops import Attention, RelativeBias, RopeConfig

FLOAT, INT32, BOOL = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.bool_)

VISIBLE, UNPADDED = "visible", "unpadded"
"""Which keys are tokens, (B, S); and whether all are, the texts being longer than `PADDED`."""
PADDED = 256
"""A text longer than this fills a pass well enough by itself, and is not padded."""
LONG = 512
"""A model for texts longer than this does not hold the scores of those that are not padded."""


@dataclass(slots=True)
class BidirectionalNodes:
    """Records attention without state. Thread: any."""

    graph: Graph
    long: bool = False
    """Texts may be longer than `LONG`."""
    ropes: list[RopeConfig] = field(default_factory=list)
    scores: dict[str, tuple[int | None, RelativeBias | None]] = field(default_factory=dict)
    """Inputs (1, 1 or H, S, S) that are added to the scores: a window, and a bias."""

    def record(self, parts: list[str], spec: Attention, bias: str = "") -> str:
        """The attention of a layer, a bias (3 * H * d,) added to its inputs if one is named.

        Shapes: queries (B, S, H * d), keys and values (B, S, K * d); the result's name, as the queries.
        """
        rows = list(parts)
        if spec.rope is not None:
            heads = (spec.heads, spec.kv_heads)
            rows[:2] = [
                self._rotated(part, count, spec.head_dim, spec.rope)
                for part, count in zip(rows[:2], heads, strict=True)
            ]
        if spec.kv_heads < spec.heads:
            rows[1:] = [self._shared(part, spec) for part in rows[1:]]
        return self._looked_over(rows, bias, spec)

    def record_of_input(self, x: str, weight: str, bias: str, spec: Attention) -> str:
        """The same from the layer's input, where it `takes_input`.

        Shapes: x (B, S, D), weight (D, 3 * H * d), bias (3 * H * d,) or no name; the result's name, (B, S, H * d).
        """
        added = self._added(spec)
        return self._looked("Attention", [x, weight, bias, self._visible(), *(["", added] if added else [])], spec)

    def takes_input(self, spec: Attention) -> bool:
        """Whether `record_of_input` can make a layer's attention. Its node always holds the scores."""
        return spec.rope is None and spec.kv_heads == spec.heads and not self.long

    def _looked_over(self, rows: list[str], bias: str, spec: Attention) -> str:
        """MultiHeadAttention; without a mask and anything added it never holds all scores."""
        name, added = "MultiHeadAttention", self._added(spec)
        if added or not self.long:
            return self._looked(name, [*rows, bias, self._visible(), *([added] if added else [])], spec)
        graph, visible = self.graph, self._visible()
        graph.inputs[UNPADDED] = TensorType(BOOL, ())
        unpadded = graph.branch(lambda: self._looked(name, [*rows, bias], spec))
        padded = graph.branch(lambda: self._looked(name, [*rows, bias, visible], spec))
        return graph.choose(UNPADDED, unpadded, padded)

    def _looked(self, op: str, inputs: list[str], spec: Attention) -> str:
        return self.graph.add(op, inputs, domain=CONTRIB, num_heads=spec.heads, scale=float(spec.scale))[0]

    def _visible(self) -> str:
        self.graph.inputs[VISIBLE] = TensorType(INT32, ("B", "S"))
        return VISIBLE

    def _shared(self, x: str, spec: Attention) -> str:
        """Each head of keys or values as often as heads of queries share it. Shapes: (B, S, K * d); (B, S, H * d)."""
        graph = self.graph
        (heads,) = graph.add("Reshape", [x, graph.constant(np.array([0, 0, spec.kv_heads, spec.head_dim], np.int64))])
        places = np.repeat(np.arange(spec.kv_heads), spec.heads // spec.kv_heads)
        (spread,) = graph.add("Gather", [heads, graph.constant(places)], axis=2)
        return graph.add("Reshape", [spread, graph.constant(np.array([0, 0, -1], np.int64))])[0]

    def _rotated(self, x: str, heads: int, dim: int, rope: RopeConfig) -> str:
        """Shapes: (B, S, heads * dim) both ways."""
        if rope not in self.ropes:
            self.ropes.append(rope)
        index = self.ropes.index(rope)
        tables = [f"cos.{index}", f"sin.{index}"]
        for name in tables:
            self.graph.inputs[name] = TensorType(FLOAT, ("positions", rope.dims // 2))
        return self.graph.add(
            "RotaryEmbedding",
            [x, self.graph.constant(np.zeros(1, np.int64)), *tables],
            domain=CONTRIB,
            num_heads=heads,
            rotary_embedding_dim=0 if rope.dims == dim else rope.dims,
            interleaved=int(rope.interleaved),
        )[0]

    def _added(self, spec: Attention) -> str:
        """The name of what is added to the scores; empty where nothing is."""
        wanted = (spec.window, spec.relative)
        if wanted == (None, None):
            return ""
        name = next((known for known, made in self.scores.items() if made == wanted), f"scores.{len(self.scores)}")
        self.scores[name] = wanted
        heads = 1 if spec.relative is None else spec.heads
        self.graph.inputs[name] = TensorType(FLOAT, (1, heads, "S", "S"))
        return name
