"""A forward pass as plain data: an architecture run once with values that are numbers and widths.

What the executors do with arrays and names, this does with neither, so that somebody can look at all of it before
anything is loaded: which matrix feeds which operation, and which values are alive between two layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    Matrix,
    Norm,
    PositionScale,
    RopeConfig,
    Routing,
    ShortConv,
    StateSpace,
    Vector,
    Weight,
    Xielu,
    weights_in,
)


@dataclass(frozen=True, slots=True)
class Value:
    """What an operation makes. Shape: (T, width)."""

    number: int
    width: int


@dataclass(frozen=True, slots=True)
class Call:
    """One operation: `ops.OP(*inputs, *args, **named)`; `join` takes its inputs as one list."""

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    args: tuple[object, ...] = ()
    named: Mapping[str, object] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The declarations that it computes with."""
        return tuple(weights_in((*self.args, *self.named.values())))


@dataclass(slots=True)
class Recorder:
    """Implements `Ops[Value]`, and keeps what it was told. Thread: any."""

    calls: list[Call] = field(default_factory=list)
    count: int = 0
    """Values there are."""

    def value(self, width: int) -> Value:
        """A new value, which nothing here makes."""
        self.count += 1
        return Value(self.count - 1, width)

    def _call(
        self,
        op: str,
        inputs: Sequence[Value],
        widths: Sequence[int],
        *args: object,
        named: Mapping[str, object] | None = None,
    ) -> tuple[Value, ...]:
        outputs = tuple(self.value(width) for width in widths)
        self.calls.append(Call(op, tuple(inputs), outputs, args, named or {}))
        return outputs

    def _same(self, op: str, x: Value, *args: object, others: Sequence[Value] = ()) -> Value:
        """An operation that makes one value as wide as its first input."""
        return self._call(op, (x, *others), (x.width,), *args)[0]

    def embed(self, table: Embedding) -> Value:
        """See `Ops.embed`."""
        return self._call("embed", (), (table.width,), table)[0]

    def embed_positions(self, table: Embedding, first: int = 0) -> Value:
        """See `Ops.embed_positions`."""
        return self._call("embed_positions", (), (table.width,), table, first)[0]

    def embed_kind(self, table: Embedding) -> Value:
        """See `Ops.embed_kind`."""
        return self._call("embed_kind", (), (table.width,), table)[0]

    def linear(self, x: Value, matrix: Matrix) -> Value:
        """See `Ops.linear`."""
        return self._call("linear", (x,), (outputs_of(matrix),), matrix)[0]

    def split(self, x: Value, sizes: Sequence[int], heads: int = 1) -> tuple[Value, ...]:
        """See `Ops.split`."""
        return self._call("split", (x,), [heads * size for size in sizes], tuple(sizes), heads)

    def join(self, parts: Sequence[Value], heads: int) -> Value:
        """See `Ops.join`."""
        return self._call("join", parts, (sum(part.width for part in parts),), heads)[0]

    def rms_norm(self, x: Value, norm: Norm) -> Value:
        """See `Ops.rms_norm`."""
        return self._same("rms_norm", x, norm)

    def layer_norm(self, x: Value, norm: LayerNorm) -> Value:
        """See `Ops.layer_norm`."""
        return self._same("layer_norm", x, norm)

    def rotate(self, x: Value, heads: int, rope: RopeConfig) -> Value:
        """See `Ops.rotate`."""
        return self._same("rotate", x, heads, rope)

    def position_scale(self, x: Value, scale: PositionScale) -> Value:
        """See `Ops.position_scale`."""
        return self._same("position_scale", x, scale)

    def attention(self, q: Value, k: Value, v: Value, layer: int, spec: Attention) -> Value:
        """See `Ops.attention`."""
        width = spec.heads * (v.width // spec.kv_heads)
        return self._call("attention", (q, k, v), (width,), layer, spec)[0]

    def look_again(self, q: Value, layer: int, spec: Attention) -> Value:
        """See `Ops.look_again`."""
        return self._same("look_again", q, layer, spec)

    def latent_attention(self, q: Value, latent: Value, up: LatentUp, layer: int, spec: LatentAttention) -> Value:
        """See `Ops.latent_attention`."""
        return self._call("latent_attention", (q, latent), (up.heads * up.value_dim,), up, layer, spec)[0]

    def short_conv(self, x: Value, conv: ShortConv, layer: int) -> Value:
        """See `Ops.short_conv`."""
        return self._same("short_conv", x, conv, layer)

    def delta_rule(self, q: Value, k: Value, v: Value, a: Value, b: Value, *, layer: int, spec: DeltaRule) -> Value:
        """See `Ops.delta_rule`."""
        return self._call("delta_rule", (q, k, v, a, b), (v.width,), named={"layer": layer, "spec": spec})[0]

    def state_space(self, x: Value, b: Value, c: Value, dt: Value, *, layer: int, spec: StateSpace) -> Value:
        """See `Ops.state_space`."""
        return self._call("state_space", (x, b, c, dt), (x.width,), named={"layer": layer, "spec": spec})[0]

    def glu(self, gate: Value, up: Value, activation: Gate) -> Value:
        """See `Ops.glu`."""
        return self._same("glu", gate, activation, others=(up,))

    def route(self, logits: Value, routing: Routing) -> tuple[Value, Value]:
        """See `Ops.route`."""
        picks, weights = self._call("route", (logits,), (routing.picked, routing.picked), routing)
        return picks, weights

    def experts(
        self, x: Value, picks: Value, weights: Value, experts: Experts, activation: Gate, *, on_input: bool = False
    ) -> Value:
        """See `Ops.experts`."""
        width = experts.each[0].down.outputs
        return self._call("experts", (x, picks, weights), (width,), experts, activation, named={"on_input": on_input})[
            0
        ]

    def activate(self, x: Value, activation: Activation) -> Value:
        """See `Ops.activate`."""
        return self._same("activate", x, activation)

    def mul(self, x: Value, y: Value) -> Value:
        """See `Ops.mul`."""
        return self._same("mul", x, others=(y,))

    def weigh(self, x: Value, factors: Vector) -> Value:
        """See `Ops.weigh`."""
        return self._same("weigh", x, factors)

    def scale(self, x: Value, factor: float) -> Value:
        """See `Ops.scale`."""
        return self._same("scale", x, factor)

    def xielu(self, x: Value, numbers: Xielu) -> Value:
        """See `Ops.xielu`."""
        return self._same("xielu", x, numbers)

    def mix(self, x: Value, weights: Value, parts: int) -> Value:
        """See `Ops.mix`."""
        width = weights.width // parts * (x.width // parts)
        return self._call("mix", (x, weights), (width,), parts)[0]

    def match_size(self, x: Value, like: Value, floor: float) -> Value:
        """See `Ops.match_size`."""
        return self._same("match_size", x, floor, others=(like,))

    def rise_above(self, x: Value, deviations: float) -> Value:
        """See `Ops.rise_above`."""
        return self._same("rise_above", x, deviations)

    def softcap(self, x: Value, cap: float) -> Value:
        """See `Ops.softcap`."""
        return self._same("softcap", x, cap)

    def add(self, x: Value, y: Value) -> Value:
        """See `Ops.add`."""
        return self._same("add", x, others=(y,))

    def residual(self, x: Value, layers: int) -> Value:
        """See `Ops.residual`."""
        return self._same("residual", x, layers)

    def deepen(self, x: Value, layers: int) -> Value:
        """See `Ops.deepen`."""
        return self._same("deepen", x, layers)


def outputs_of(matrix: Matrix) -> int:
    """The width of a product with it."""
    match matrix:
        case Joined():
            return sum(matrix.sizes)
        case Embedding():
            return matrix.rows
        case _:
            return matrix.outputs
