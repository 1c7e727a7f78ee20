"""Records an architecture's forward pass into a graph, once: the `Ops` whose values are names.

Values are lazy, so that what the kernels do in one is recorded as one: a sum that is normed next is one node, q, k
and v that go into attention untouched are one product, gate and up that part at once are two.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.bidirectional import LONG, BidirectionalNodes
from models.executors.onnx.experts import ExpertNodes
from models.executors.onnx.graph import CONTRIB, Graph, TensorType
from models.executors.onnx.latent import LatentNodes, latent_nbytes
from models.executors.onnx.pointwise import PointwiseNodes
from models.executors.onnx.products import ProductNodes
from models.executors.onnx.recurrent import RecurrentNodes
from models.executors.onnx.values import Biased, Lookup, Projection, Slice, Sum, Value, named
from models.ops import (
    Activation,
    Attention,
    DeltaRule,
    Embedding,
    Experts,
    Gate,
    Joined,
    LatentAttention,
    LatentUp,
    LayerNorm,
    Linear,
    Matrix,
    Norm,
    PositionScale,
    RopeConfig,
    Routing,
    ShortConv,
    StateSpace,
    Vector,
    Xielu,
)

FLOAT = np.dtype(np.float32)


def deep_input(layers: int) -> str:
    """The input that is added behind so many layers."""
    return f"deep.{layers}"


class Recorder:
    """Implements `Ops[Value]`. The graph's inputs are what `models.executors.onnx.steps` fills. Thread: any."""

    def __init__(
        self,
        graph: Graph,
        products: ProductNodes,
        attention: AttentionNodes,
        *,
        even: bool = False,
        exact: bool = True,
        context: int = 0,
    ) -> None:
        """Record into `graph`; `even` and `exact`: see `RecurrentNodes`; `context`: tokens that a text may have."""
        self._graph = graph
        self._products = products
        self._attention = attention
        self._pointwise = PointwiseNodes(graph)
        self._experts = ExpertNodes(graph, products, self._pointwise.gated, self._pointwise.activated)
        self._latent = LatentNodes(graph, attention)
        self.bidirectional = BidirectionalNodes(graph, long=context > LONG)
        self.recurrent = RecurrentNodes(graph, self._pointwise, self.vector, even=even, exact=exact)
        self.ups: list[LatentUp] = []
        self.vectors: dict[str, float] = {}
        """What is added to a vector as it is stored, by its tensor's name."""
        self.lookups: list[Lookup] = []
        self._appended: dict[int, tuple[Value, Value]] = {}
        self.residuals: dict[int, Value] = {}
        self.deep: dict[str, int] = {}
        """Inputs (T, D) that pictures add, by the layers behind which they do."""

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
            return self._graph.add("Concat", [part.name for part in parts], axis=-1)[0]

        return Projection(parts, record, (x, matrix.parts))

    def split(self, x: Value, sizes: Sequence[int], heads: int = 1) -> tuple[Value, ...]:
        """See `Ops.split`."""
        if heads > 1:
            parts = self._latent.parts(x.name, sizes, heads)
            return tuple(named(heads * size, name) for size, name in zip(sizes, parts, strict=True))
        if isinstance(x, Projection) and tuple(sizes) == tuple(part.width for part in x.parts):
            return x.parts
        names: list[str] = []

        def piece(number: int) -> str:
            if not names:
                lengths = self._graph.constant(np.array(sizes, np.int64))
                names.extend(self._graph.add("Split", [x.name, lengths], outputs=len(sizes), axis=-1))
            return names[number]

        pieces = [Value(size, partial(piece, number)) for number, size in enumerate(sizes)]
        return Projection(pieces, lambda: x.name).parts

    def rms_norm(self, x: Value, norm: Norm) -> Value:
        """See `Ops.rms_norm`."""
        weight = self._norm_weight(norm)
        if isinstance(x, Sum) and not x.is_recorded:
            normed, total = self._graph.name("norm"), self._graph.name("sum")
            inputs, outputs = (x.x.name, x.y.name, weight), (normed, "", "", total)
            self._graph.append_node("SkipSimplifiedLayerNormalization", inputs, outputs, CONTRIB, {"epsilon": norm.eps})
            x.take(total)
            return named(x.width, normed)
        return Value(x.width, lambda: self._normed(x, norm, weight))

    def layer_norm(self, x: Value, norm: LayerNorm) -> Value:
        """See `Ops.layer_norm`."""
        offsets = (norm.offset, 0.0)
        names = [name for name, _ in norm.tensors()]
        arrays = [self.vector(Vector(name, norm.width), offset) for name, offset in zip(names, offsets, strict=False)]

        def normed(source: str) -> str:
            return self._graph.add("LayerNormalization", [source, *arrays], axis=-1, epsilon=norm.eps)[0]

        return Value(x.width, lambda: self._grouped(x, norm.width, normed))

    def rotate(self, x: Value, heads: int, rope: RopeConfig) -> Value:
        """See `Ops.rotate`."""
        return Value(x.width, lambda: self._attention.rotated(x.name, heads, x.width // heads, rope))

    def position_scale(self, x: Value, scale: PositionScale) -> Value:
        """See `Ops.position_scale`."""
        return Value(x.width, lambda: self._graph.add("Mul", [x.name, self._attention.scaling(scale)])[0])

    def attention(self, q: Value, k: Value, v: Value, layer: int, spec: Attention) -> Value:
        """See `Ops.attention`."""
        if spec.bidirectional:
            return Value(spec.heads * spec.head_dim, lambda: self._looked(q, k, v, spec))
        self._appended[layer] = (k, v)
        sinks = "" if spec.sinks is None else self.vector(spec.sinks)

        def record() -> str:
            parts = (q, k, v)
            if isinstance(q, Slice) and q.whole.parts == parts:
                return self._attention.record(q.whole.name, layer, spec, sinks)
            together = self._graph.add("Concat", [part.name for part in parts], axis=1)[0]
            return self._attention.record(together, layer, spec, sinks)

        return Value(spec.heads * spec.head_dim, record)

    def look_again(self, q: Value, layer: int, spec: Attention) -> Value:
        """See `Ops.look_again`: the node is given the step's keys and values too, and writes them where they are."""
        return self.attention(q, *self._appended[layer], layer, spec)

    def latent_attention(self, q: Value, latent: Value, up: LatentUp, layer: int, spec: LatentAttention) -> Value:
        """See `Ops.latent_attention`."""
        self.ups.append(up)
        for name, nbytes in latent_nbytes(up):
            self._graph.weights[name] = nbytes
        return Value(up.heads * up.value_dim, lambda: self._latent.record(q.name, latent.name, up, layer, spec))

    def short_conv(self, x: Value, conv: ShortConv, layer: int) -> Value:
        """See `Ops.short_conv`."""
        return Value(x.width, lambda: self.recurrent.convolution(x.name, conv, layer))

    def delta_rule(self, q: Value, k: Value, v: Value, a: Value, b: Value, *, layer: int, spec: DeltaRule) -> Value:
        """See `Ops.delta_rule`."""
        return Value(v.width, lambda: self.recurrent.delta_rule([x.name for x in (q, k, v, a, b)], layer, spec))

    def state_space(self, x: Value, b: Value, c: Value, dt: Value, *, layer: int, spec: StateSpace) -> Value:
        """See `Ops.state_space`."""
        return Value(x.width, lambda: self.recurrent.state_space([y.name for y in (x, b, c, dt)], layer, spec))

    def join(self, parts: Sequence[Value], heads: int) -> Value:
        """See `Ops.join`."""
        width = sum(part.width for part in parts)
        return Value(width, lambda: self._latent.joined([part.name for part in parts], heads, width))

    def glu(self, gate: Value, up: Value, activation: Gate) -> Value:
        """See `Ops.glu`."""
        return Value(gate.width, lambda: self._pointwise.gated(gate.name, up.name, activation))

    def route(self, logits: Value, routing: Routing) -> tuple[Value, Value]:
        """See `Ops.route`."""
        bias = "" if routing.bias is None else self.vector(routing.bias)
        scales = "" if routing.expert_scales is None else self.vector(routing.expert_scales)
        picks, weights = self._experts.route(logits.name, logits.width, routing, bias, scales)
        return named(routing.picked, picks), named(routing.picked, weights)

    def experts(
        self, x: Value, picks: Value, weights: Value, experts: Experts, activation: Gate, *, on_input: bool = False
    ) -> Value:
        """See `Ops.experts`."""
        names = (x.name, picks.name, weights.name)
        return Value(x.width, lambda: self._experts.record(*names, experts, activation, on_input=on_input))

    def activate(self, x: Value, activation: Activation) -> Value:
        """See `Ops.activate`."""
        return Value(x.width, lambda: self._pointwise.activated(x.name, activation))

    def mul(self, x: Value, y: Value) -> Value:
        """See `Ops.mul`."""
        if y.width not in (1, x.width):
            return Value(x.width, lambda: self._pointwise.scaled(x.name, y.name, y.width))
        return Value(x.width, lambda: self._graph.add("Mul", [x.name, y.name])[0])

    def xielu(self, x: Value, numbers: Xielu) -> Value:
        """See `Ops.xielu`."""
        names = [self.vector(each) for each in (numbers.above, numbers.below, numbers.slope, numbers.least)]
        return Value(x.width, lambda: self._pointwise.xielu(x.name, *names))

    def mix(self, x: Value, weights: Value, parts: int) -> Value:
        """See `Ops.mix`."""
        made = weights.width // parts
        return Value(x.width // parts * made, lambda: self._pointwise.mixed(x.name, weights.name, parts, made))

    def match_size(self, x: Value, like: Value, floor: float) -> Value:
        """See `Ops.match_size`."""
        return Value(x.width, lambda: self._pointwise.matched(x.name, like.name, floor))

    def rise_above(self, x: Value, deviations: float) -> Value:
        """See `Ops.rise_above`."""
        return Value(x.width, lambda: self._pointwise.risen(x.name, deviations))

    def weigh(self, x: Value, factors: Vector) -> Value:
        """See `Ops.weigh`."""
        stored = self.vector(factors)
        return Value(max(x.width, factors.width), lambda: self._graph.add("Mul", [x.name, stored])[0])

    def scale(self, x: Value, factor: float) -> Value:
        """See `Ops.scale`."""
        return Value(x.width, lambda: self._graph.add("Mul", [x.name, self._number(factor)])[0])

    def softcap(self, x: Value, cap: float) -> Value:
        """See `Ops.softcap`."""

        def record() -> str:
            (small,) = self._graph.add("Mul", [x.name, self._number(1 / cap)])
            (bent,) = self._graph.add("Tanh", [small])
            return self._graph.add("Mul", [bent, self._number(cap)])[0]

        return Value(x.width, record)

    def add(self, x: Value, y: Value) -> Value:
        """See `Ops.add`."""
        return Sum(self._graph, x, y)

    def residual(self, x: Value, layers: int) -> Value:
        """See `Ops.residual`."""
        self.residuals[layers] = x
        return x

    def deepen(self, x: Value, layers: int) -> Value:
        """See `Ops.deepen`."""
        if not self._attention.sees:
            return x
        name = deep_input(layers)
        self.deep[name] = layers
        self._graph.inputs[name] = TensorType(FLOAT, ("T", x.width))
        return self.add(x, named(x.width, name))

    def pick(self, x: Value, places: str) -> Value:
        """Some of the tokens, by the indices that an input has."""
        return Value(x.width, lambda: self._graph.add("Gather", [x.name, places], axis=0)[0])

    def _looked(self, q: Value, k: Value, v: Value, spec: Attention) -> str:
        """Bidirectional attention: with the products before it, or with their biases, where nothing is between."""
        parts = (q, k, v)
        whole = q.whole if isinstance(q, Slice) and q.whole.parts == parts else None
        if whole and whole.product and self.bidirectional.takes_input(spec):
            source, matrices = whole.product
            if dense := self._products.dense(matrices):
                return self.bidirectional.record_of_input(source.name, *dense, spec)
        own = [part.own if isinstance(part, Slice) else part for part in parts]
        biased = [part for part in own if isinstance(part, Biased)]
        if len(biased) < len(own) or spec.rope is not None:
            return self.bidirectional.record([part.name for part in parts], spec)
        (bias,) = self._graph.add("Concat", [part.bias for part in biased], axis=0)
        return self.bidirectional.record([part.plain.name for part in biased], spec, bias)

    def _looked_up(self, lookup: Lookup) -> Value:
        name = f"embed.{len(self.lookups)}"
        self.lookups.append(lookup)
        self._graph.inputs[name] = TensorType(FLOAT, (*self._graph.axes, lookup.table.width))
        return Value(lookup.table.width, lambda: name)

    def _single(self, x: Value, matrix: Linear | Embedding, *, precise: bool = False) -> Value:
        outputs = matrix.rows if isinstance(matrix, Embedding) else matrix.outputs
        if self._products.leaves_bias(matrix):

            def plain() -> str:
                return self._products.record(x.name, (matrix,), precise=precise, without_bias=True)

            return Biased(self._graph, outputs, f"{matrix.name}.bias", plain)
        return Value(outputs, lambda: self._products.record(x.name, (matrix,), precise=precise))

    def vector(self, vector: Vector, offset: float = 0.0) -> str:
        """A vector that is given to the graph, with a number added to all of it; its name."""
        assert self.vectors.setdefault(vector.name, offset) == offset
        self._graph.weights[vector.name] = 4 * vector.width
        return vector.name

    def _norm_weight(self, norm: Norm) -> str:
        if not norm.name:
            return self._graph.constant(np.full(norm.width, 1 + norm.offset, FLOAT))
        return self.vector(Vector(f"{norm.name}.weight", norm.width), norm.offset)

    def _normed(self, x: Value, norm: Norm, weight: str) -> str:
        """RMSNorm of the whole width, or of each group of `norm.width`."""

        def normed(source: str) -> str:
            inputs = [source, weight]
            return self._graph.add("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=norm.eps)[0]

        return self._grouped(x, norm.width, normed)

    def _grouped(self, x: Value, width: int, record: Callable[[str], str]) -> str:
        """What is recorded of the whole of `x`, or of each group of `width` values. Shapes: as `x`."""
        if width == x.width:
            return record(x.name)
        graph = self._graph
        groups = graph.constant(np.array([*graph.lead, x.width // width, width], np.int64))
        made = record(graph.add("Reshape", [x.name, groups])[0])
        return graph.add("Reshape", [made, graph.constant(np.array([*graph.lead, x.width], np.int64))])[0]

    def _number(self, value: float) -> str:
        return self._graph.constant(np.array(value, FLOAT))
