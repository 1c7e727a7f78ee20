"""Records an architecture's forward pass into a graph, once: the `Ops` whose values are names.

Values are lazy, so that what the kernels do in one is recorded as one: a sum that is normed next is one node, q, k
and v that go into attention untouched are one product, gate and up that part at once are two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.bidirectional import BidirectionalNodes
from models.executors.onnx.graph import CONTRIB, Graph, TensorType
from models.executors.onnx.products import ProductNodes
from models.ops import Activation, Attention, Embedding, Joined, LayerNorm, Linear, Matrix, Norm

FLOAT = np.dtype(np.float32)


class Value:
    """A value (T, width), recorded when its name is asked for."""

    def __init__(self, width: int, record: Callable[[], str]) -> None:
        self.width = width
        self._record = record
        self._name = ""

    @property
    def name(self) -> str:
        """Its name in the graph."""
        if not self._name:
            self._name = self._record()
        return self._name


class Sum(Value):
    """x + y, which a norm behind it takes over."""

    def __init__(self, graph: Graph, x: Value, y: Value) -> None:
        super().__init__(x.width, lambda: graph.add("Add", [x.name, y.name])[0])
        self.x, self.y = x, y

    @property
    def is_recorded(self) -> bool:
        """It has a name, so there is nothing left to fuse."""
        return bool(self._name)

    def take(self, name: str) -> None:
        """It was computed together with something else."""
        self._name = name


class Biased(Value):
    """A product and its bias, which what comes next may add itself."""

    def __init__(self, graph: Graph, width: int, bias: str, record: Callable[[], str]) -> None:
        super().__init__(width, lambda: graph.add("Add", [self.plain.name, bias])[0])
        self.plain = Value(width, record)
        self.bias = bias


class Projection(Value):
    """The product of one input with several matrices side by side."""

    def __init__(self, parts: Sequence[Value], record: Callable[[], str]) -> None:
        super().__init__(sum(part.width for part in parts), record)
        self.parts = tuple(Slice(self, part) for part in parts)


class Slice(Value):
    """What one of the matrices gives: a product of its own, unless all are wanted as they are."""

    def __init__(self, whole: Projection, own: Value) -> None:
        super().__init__(own.width, lambda: own.name)
        self.whole = whole
        self.own = own


@dataclass(frozen=True, slots=True)
class Lookup:
    """An input of the graph that is looked up on the host: in which table, by the token or by something else."""

    table: Embedding
    first: int | None = None
    """The row of the first position; None: the row is the token's."""
    by_position: bool = True
    """Else all tokens have the first row."""


class Recorder:
    """Implements `Ops[Value]`. The graph's inputs are what `models.executors.onnx.steps` fills. Thread: any."""

    def __init__(self, graph: Graph, products: ProductNodes, attention: AttentionNodes) -> None:
        self._graph = graph
        self._products = products
        self._attention = attention
        self.bidirectional = BidirectionalNodes(graph)
        self.norms: dict[str, Norm | LayerNorm] = {}
        self.lookups: list[Lookup] = []
        self.residuals: dict[int, Value] = {}

    def embed(self, table: Embedding) -> Value:
        """See `Ops.embed`: looked up on the host."""
        return self._looked_up(Lookup(table))

    def embed_positions(self, table: Embedding, first: int = 0) -> Value:
        """See `Ops.embed_positions`: looked up on the host."""
        return self._looked_up(Lookup(table, first))

    def embed_kind(self, table: Embedding) -> Value:
        """See `Ops.embed_kind`: looked up on the host."""
        return self._looked_up(Lookup(table, 0, by_position=False))

    def linear(self, x: Value, matrix: Matrix) -> Value:
        """See `Ops.linear`."""
        if not isinstance(matrix, Joined):
            return self._single(x, matrix)
        precise = matrix.precise
        parts = [self._single(x, part, precise=precise) for part in matrix.parts]

        def record() -> str:
            if self._products.may_join(matrix.parts):
                return self._products.record(x.name, matrix.parts, precise=precise)
            return self._graph.add("Concat", [part.name for part in parts], axis=1)[0]

        return Projection(parts, record)

    def split(self, x: Value, sizes: Sequence[int]) -> tuple[Value, ...]:
        """See `Ops.split`."""
        if isinstance(x, Projection):
            assert tuple(sizes) == tuple(part.width for part in x.parts)
            return x.parts
        lengths = self._graph.constant(np.array(sizes, np.int64))
        names = self._graph.add("Split", [x.name, lengths], outputs=len(sizes), axis=1)
        return tuple(_named(size, name) for size, name in zip(sizes, names, strict=True))

    def rms_norm(self, x: Value, norm: Norm) -> Value:
        """See `Ops.rms_norm`."""
        weight = f"{norm.name}.weight"
        self.norms[weight] = norm
        self._graph.weights[weight] = 4 * norm.width
        if isinstance(x, Sum) and not x.is_recorded:
            normed, total = self._graph.name("norm"), self._graph.name("sum")
            inputs, outputs = (x.x.name, x.y.name, weight), (normed, "", "", total)
            self._graph.append_node("SkipSimplifiedLayerNormalization", inputs, outputs, CONTRIB, {"epsilon": norm.eps})
            x.take(total)
            return _named(x.width, normed)
        return Value(x.width, lambda: self._normed(x, norm, weight))

    def layer_norm(self, x: Value, norm: LayerNorm) -> Value:
        """See `Ops.layer_norm`."""
        names = [name for name, _ in norm.tensors()]
        for name in names:
            self.norms[name] = norm
            self._graph.weights[name] = 4 * norm.width

        def record() -> str:
            return self._graph.add("LayerNormalization", [x.name, *names], axis=-1, epsilon=norm.eps)[0]

        return Value(x.width, record)

    def attention(self, q: Value, k: Value, v: Value, layer: int, spec: Attention) -> Value:
        """See `Ops.attention`."""
        if spec.bidirectional:
            width = spec.heads * spec.head_dim
            return Value(width, lambda: self._looked(q, k, v, spec))

        def record() -> str:
            parts = (q, k, v)
            if isinstance(q, Slice) and q.whole.parts == parts:
                return self._attention.record(q.whole.name, layer, spec)
            together = self._graph.add("Concat", [part.name for part in parts], axis=1)[0]
            return self._attention.record(together, layer, spec)

        return Value(spec.heads * spec.head_dim, record)

    def glu(self, gate: Value, up: Value, activation: Activation) -> Value:
        """See `Ops.glu`."""
        active = self.activate(gate, activation)
        return Value(gate.width, lambda: self._graph.add("Mul", [active.name, up.name])[0])

    def activate(self, x: Value, activation: Activation) -> Value:
        """See `Ops.activate`."""

        def record() -> str:
            match activation:
                case "silu":
                    return self._graph.add("QuickGelu", [x.name], domain=CONTRIB, alpha=1.0)[0]
                case "gelu":
                    return self._graph.add("Gelu", [x.name], domain=CONTRIB)[0]
                case "gelu_tanh":
                    return self._graph.add("FastGelu", [x.name], domain=CONTRIB)[0]

        return Value(x.width, record)

    def add(self, x: Value, y: Value) -> Value:
        """See `Ops.add`."""
        return Sum(self._graph, x, y)

    def residual(self, x: Value, layers: int) -> Value:
        """See `Ops.residual`."""
        self.residuals[layers] = x
        return x

    def pick(self, x: Value, places: str) -> Value:
        """Some of the tokens, by the indices that an input has."""
        return Value(x.width, lambda: self._graph.add("Gather", [x.name, places], axis=0)[0])

    def _looked(self, q: Value, k: Value, v: Value, spec: Attention) -> str:
        """Bidirectional attention, which adds the biases of its inputs itself where nothing comes between."""
        own = [part.own if isinstance(part, Slice) else part for part in (q, k, v)]
        biased = [part for part in own if isinstance(part, Biased)]
        if len(biased) < len(own) or spec.rope is not None:
            return self.bidirectional.record([part.name for part in (q, k, v)], spec)
        (bias,) = self._graph.add("Concat", [part.bias for part in biased], axis=0)
        return self.bidirectional.record([part.plain.name for part in biased], spec, bias)

    def _looked_up(self, lookup: Lookup) -> Value:
        name = f"embed.{len(self.lookups)}"
        self.lookups.append(lookup)
        self._graph.inputs[name] = TensorType(FLOAT, ("T", lookup.table.width))
        return Value(lookup.table.width, lambda: name)

    def _single(self, x: Value, matrix: Linear | Embedding, *, precise: bool = False) -> Value:
        outputs = matrix.rows if isinstance(matrix, Embedding) else matrix.outputs
        if self._products.leaves_bias(matrix):

            def plain() -> str:
                return self._products.record(x.name, (matrix,), precise=precise, without_bias=True)

            return Biased(self._graph, outputs, f"{matrix.name}.bias", plain)
        return Value(outputs, lambda: self._products.record(x.name, (matrix,), precise=precise))

    def _normed(self, x: Value, norm: Norm, weight: str) -> str:
        """RMSNorm of the whole width, or of each group of `norm.width`."""
        graph, source = self._graph, x.name
        if norm.width != x.width:
            groups = graph.constant(np.array([-1, x.width // norm.width, norm.width], np.int64))
            source = graph.add("Reshape", [source, groups])[0]
        (normed,) = graph.add("SimplifiedLayerNormalization", [source, weight], axis=-1, epsilon=norm.eps)
        if norm.width == x.width:
            return normed
        return graph.add("Reshape", [normed, graph.constant(np.array([-1, x.width], np.int64))])[0]


def _named(width: int, name: str) -> Value:
    return Value(width, lambda: name)
