"""Records a vision tower's forward pass: the `TowerOps` whose values are names.

A pass's tokens are flat (T, …). Attention without groups has neither mask nor bias, for which ONNX Runtime never holds
all scores; with groups its rows are padded to the longest and masked.
"""

from dataclasses import dataclass

import numpy as np

from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.graph import CONTRIB, Graph, TensorType
from models.executors.onnx.products import ProductNodes
from models.executors.onnx.recorder import FLOAT, Recorder
from models.executors.onnx.values import Biased, Slice, Value, named
from models.ops import Attention, Embedding, Vector

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)


@dataclass(frozen=True, slots=True)
class Turned:
    """The inputs that angles of that name become. Shapes: float32 (T, d / 2) each."""

    cos: str
    sin: str


@dataclass(frozen=True, slots=True)
class Grouped:
    """The inputs that groups of that name become; see `models.executors.groups`."""

    pad: str
    unpad: str
    visible: str
    rows: str
    """The shape (G, S, -1)."""


class TowerRecorder(Recorder):
    """Implements `TowerOps[Value]`; the graph's inputs are what `OnnxPictureEncoder` fills. Thread: any."""

    def __init__(self, graph: Graph, products: ProductNodes, attention: AttentionNodes) -> None:
        """Record into `graph`; the attention is that of layers with a state, of which a tower has none."""
        super().__init__(graph, products, attention)
        self.angles: dict[str, Turned] = {}
        self.groups: dict[str, Grouped] = {}
        self.tables: dict[str, tuple[Embedding, str]] = {}
        """Inputs that are looked up on the host: in which table, by which name's rows."""

    def given(self, name: str, width: int) -> Value:
        """See `TowerOps.given`."""
        self._graph.inputs[name] = TensorType(FLOAT, (f"{name}.T", width))
        return named(width, name)

    def look_up(self, table: Embedding, name: str) -> Value:
        """See `TowerOps.look_up`: looked up on the host."""
        looked = f"{table.name}.{name}"
        self.tables[looked] = (table, name)
        return self.given(looked, table.width)

    def take(self, x: Value, name: str) -> Value:
        """See `TowerOps.take`."""
        self._graph.inputs[name] = TensorType(INT64, (f"{name}.N",))
        return self.pick(x, name)

    def turn(self, x: Value, heads: int, name: str, *, interleaved: bool = False) -> Value:
        """See `TowerOps.turn`."""
        turned = self.angles.setdefault(name, Turned(f"{name}.cos", f"{name}.sin"))
        for table in (turned.cos, turned.sin):
            self._graph.inputs[table] = TensorType(FLOAT, (f"{name}.T", x.width // heads // 2))
        return Value(x.width, lambda: self._turned(x, heads, turned, interleaved=interleaved))

    def look_around(self, q: Value, k: Value, v: Value, spec: Attention, groups: str = "") -> Value:
        """See `TowerOps.look_around`."""
        return Value(q.width, lambda: self._looked_around(q, k, v, spec, groups))

    def fold(self, x: Value, count: int, *, interleaved: bool = False) -> Value:
        """See `TowerOps.fold`."""

        def record() -> str:
            source = x.name
            if interleaved:
                (parted,) = self._graph.add("Reshape", [source, self._whole(-1, count, x.width)])
                (source,) = self._graph.add("Transpose", [parted], perm=[0, 2, 1])
            return self._graph.add("Reshape", [source, self._whole(-1, count * x.width)])[0]

        return Value(count * x.width, record)

    def pool(self, x: Value, count: int) -> Value:
        """See `TowerOps.pool`."""

        def record() -> str:
            (parted,) = self._graph.add("Reshape", [x.name, self._whole(-1, count, x.width)])
            return self._graph.add("ReduceMean", [parted, self._whole(1)], keepdims=0)[0]

        return Value(x.width, record)

    def clip(self, x: Value, least: Vector, most: Vector) -> Value:
        """See `TowerOps.clip`."""

        def record() -> str:
            (raised,) = self._graph.add("Max", [x.name, self.vector(least)])
            return self._graph.add("Min", [raised, self.vector(most)])[0]

        return Value(x.width, record)

    def _turned(self, x: Value, heads: int, turned: Turned, *, interleaved: bool) -> str:
        graph = self._graph
        (row,) = graph.add("Unsqueeze", [x.name, self._whole(0)])
        # The tables have a row for each token, so the first token's position is 0 and the others go on from there.
        inputs = [row, self._whole(0), turned.cos, turned.sin]
        (made,) = graph.add("RotaryEmbedding", inputs, domain=CONTRIB, num_heads=heads, interleaved=int(interleaved))
        return graph.add("Squeeze", [made, self._whole(0)])[0]

    def _looked_around(self, q: Value, k: Value, v: Value, spec: Attention, groups: str) -> str:
        own = [part.own if isinstance(part, Slice) else part for part in (q, k, v)]
        biased = [part for part in own if isinstance(part, Biased)]
        bias = ""
        if len(biased) == len(own) and spec.kv_heads == spec.heads:
            (bias,) = self._graph.add("Concat", [part.bias for part in biased], axis=0)
            own = [part.plain for part in biased]
        names = [own[0].name, *(self._shared(part, spec) for part in own[1:])]
        mask = ""
        if groups:
            parts = self._parts_of(groups)
            rows = [self._graph.add("Gather", [name, parts.pad], axis=0)[0] for name in names]
            rows = [self._graph.add("Reshape", [name, parts.rows])[0] for name in rows]
            mask = parts.visible
        else:
            rows = [self._graph.add("Unsqueeze", [name, self._whole(0)])[0] for name in names]
        inputs = [*rows, *([bias, mask] if mask else [bias] if bias else [])]
        (looked,) = self._graph.add(
            "MultiHeadAttention", inputs, domain=CONTRIB, num_heads=spec.heads, scale=float(spec.scale)
        )
        (flat,) = self._graph.add("Reshape", [looked, self._whole(-1, spec.heads * spec.head_dim)])
        return self._graph.add("Gather", [flat, self._parts_of(groups).unpad], axis=0)[0] if groups else flat

    def _shared(self, x: Value, spec: Attention) -> str:
        """Each head of keys or values as often as heads of queries share it. Shapes: (T, K * d); (T, H * d)."""
        if spec.kv_heads == spec.heads:
            return x.name
        graph = self._graph
        (heads,) = graph.add("Reshape", [x.name, self._whole(-1, spec.kv_heads, spec.head_dim)])
        places = np.repeat(np.arange(spec.kv_heads), spec.heads // spec.kv_heads)
        (spread,) = graph.add("Gather", [heads, graph.constant(places)], axis=1)
        return graph.add("Reshape", [spread, self._whole(-1, spec.heads * spec.head_dim)])[0]

    def _parts_of(self, name: str) -> Grouped:
        if name not in self.groups:
            made = self.groups[name] = Grouped(*(f"{name}.{part}" for part in ("pad", "unpad", "visible", "rows")))
            self._graph.inputs |= {
                made.pad: TensorType(INT64, (f"{name}.G*S",)),
                made.unpad: TensorType(INT64, (f"{name}.T",)),
                made.visible: TensorType(INT32, (f"{name}.G", f"{name}.S")),
                made.rows: TensorType(INT64, (3,)),
            }
        return self.groups[name]

    def _whole(self, *values: int) -> str:
        return self._graph.constant(np.array(values, np.int64))
