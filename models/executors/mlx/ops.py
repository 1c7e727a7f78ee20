"""The operations on MLX arrays: every row of a part at once, linear layers over all tokens of a step."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from models.executors.mlx.kinds import GROUP
from models.executors.mlx.parts import Part
from models.executors.mlx.slabs import LayerSpec
from models.executors.mlx.weights import Weights
from models.ops import Activation, Attention, Embedding, LayerNorm, Matrix, Norm, RopeConfig


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Shapes: both (T, F); returns (T, F)."""
    return gate * mx.sigmoid(gate) * up


class Compute:
    """Implements `Ops[mx.array]` but for attention. Thread: the executor's."""

    def __init__(
        self, weights: Weights, tokens: mx.array, activate: Callable[[mx.array, mx.array], mx.array] = swiglu
    ) -> None:
        self._weights = weights
        self._tokens = tokens
        self._activate = activate
        self.residuals: dict[int, mx.array] = {}

    def embed(self, table: Embedding) -> mx.array:
        """See `Ops.embed`."""
        return self._weights.table(table).rows(self._tokens)

    def linear(self, x: mx.array, matrix: Matrix) -> mx.array:
        """See `Ops.linear`."""
        return self._weights.matrix(matrix).multiply(x)

    def split(self, x: mx.array, sizes: Sequence[int]) -> tuple[mx.array, ...]:
        """See `Ops.split`."""
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes) - 1)]
        return tuple(mx.split(x, ends, axis=-1))

    def rms_norm(self, x: mx.array, norm: Norm) -> mx.array:
        """See `Ops.rms_norm`."""
        weight = self._weights.norm(norm)
        if norm.width == x.shape[-1]:
            return mx.fast.rms_norm(x, weight, norm.eps)
        return mx.fast.rms_norm(x.reshape(len(x), -1, norm.width), weight, norm.eps).reshape(x.shape)

    def glu(self, gate: mx.array, up: mx.array, activation: Activation) -> mx.array:
        """See `Ops.glu`."""
        return self._activate(gate, up) if activation == "silu" else self.activate(gate, activation) * up

    def add(self, x: mx.array, y: mx.array) -> mx.array:
        """See `Ops.add`."""
        return x + y

    def residual(self, x: mx.array, layers: int) -> mx.array:
        """See `Ops.residual`."""
        self.residuals[layers] = x
        return x

    def embed_positions(self, table: Embedding, first: int = 0) -> mx.array:
        """See `Ops.embed_positions`."""
        raise NotImplementedError(f"{table.name} from {first} on: whole texts alone have learned positions")

    def embed_kind(self, table: Embedding) -> mx.array:
        """See `Ops.embed_kind`: one row, which what it is added to repeats. Shapes: returns (1, width)."""
        return self._weights.table(table).rows(mx.zeros(1, mx.int32))

    def layer_norm(self, x: mx.array, norm: LayerNorm) -> mx.array:
        """See `Ops.layer_norm`."""
        return mx.fast.layer_norm(x, *self._weights.layer_norm(norm), norm.eps)

    def activate(self, x: mx.array, activation: Activation) -> mx.array:
        """See `Ops.activate`."""
        match activation:
            case "silu":
                return x * mx.sigmoid(x)
            case "gelu":
                return x * (1 + mx.erf(x * 0.5**0.5)) * 0.5
            case "gelu_tanh":
                return 0.5 * x * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Wavelengths:
    """What `mx.fast.rope` is given of each rope, made once. Thread: the executor's."""

    def __init__(self) -> None:
        self._made: dict[RopeConfig, mx.array] = {}

    def rotate(self, x: mx.array, rope: RopeConfig, offset: mx.array | int) -> mx.array:
        """Shapes: x (B, H, L, d), offset (B,) or a number; returns (B, H, L, d)."""
        if rope not in self._made:
            self._made[rope] = mx.array(1.0 / rope.frequencies())
        turned = mx.fast.rope(
            x, rope.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._made[rope]
        )
        if rope.magnitude == 1.0:
            return turned
        if rope.dims == x.shape[-1]:
            return turned * rope.magnitude
        return mx.concatenate([turned[..., : rope.dims] * rope.magnitude, turned[..., rope.dims :]], axis=-1)


class StepOps(Compute):
    """The operations of a step with state in slabs."""

    def __init__(
        self,
        weights: Weights,
        tokens: mx.array,
        parts: Sequence[Part],
        specs: Sequence[LayerSpec],
        *,
        wavelengths: Wavelengths,
        activate: Callable[[mx.array, mx.array], mx.array] = swiglu,
    ) -> None:
        super().__init__(weights, tokens, activate)
        self._parts = parts
        self._specs = specs
        self._wavelengths = wavelengths

    def attention(self, q: mx.array, k: mx.array, v: mx.array, layer: int, spec: Attention) -> mx.array:
        """See `Ops.attention`."""
        # All parts write before one looks: a slab that something has yet to read is copied when it is written.
        for part in self._parts:
            self._write(part, k, v, layer, spec)
        outputs = [self._look(part, q, layer, spec) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _write(self, part: Part, k: mx.array, v: mx.array, layer: int, spec: Attention) -> None:
        """Append one part's tokens to the slabs. Shapes: of the whole step, see `attention`."""
        keys, values = self._rows(k, part, spec.kv_heads), self._rows(v, part, spec.kv_heads)
        if spec.rope is not None:
            keys = self._wavelengths.rotate(keys, spec.rope, part.begins)
        held, arrays = self._specs[layer], part.slab.layers[layer]
        news = [keys, values] if held.bits is None else [*_packed(keys, held.bits), *_packed(values, held.bits)]
        cells = part.cells(held.capacity(part.slab.capacity))
        for array, new in zip(arrays, news, strict=True):
            # Indexed by row and position, heads between: the update is (B, L, K, width).
            array[part.indices, :, cells] = new.swapaxes(1, 2)

    def _look(self, part: Part, q: mx.array, layer: int, spec: Attention) -> mx.array:
        """Attention of one part's tokens. Shapes: q of the whole step, see `attention`; returns (B * L, H * d)."""
        queries = self._rows(q, part, spec.heads)
        if spec.rope is not None:
            queries = self._wavelengths.rotate(queries, spec.rope, part.begins)
        held = self._specs[layer]
        seen = part.slab.layers[layer]
        if part.taken is not None:
            seen = [array[part.taken] for array in seen]
        if held.bits is not None:
            seen = [_unpacked(seen[:3], held.bits), _unpacked(seen[3:], held.bits)]
        mask = part.mask(held.capacity(part.slab.capacity), spec.window)
        out = mx.fast.scaled_dot_product_attention(queries, *seen, scale=spec.scale, mask=mask)
        if part.length > 1:
            out = out.swapaxes(1, 2)
        return out.reshape(len(part.rows) * part.length, -1)

    def _rows(self, x: mx.array, part: Part, heads: int) -> mx.array:
        """Shapes: (T, heads * d) of all parts; (B, heads, L, d) of one."""
        own = x if len(self._parts) == 1 else x[part.tokens]
        if part.length == 1:
            return own.reshape(len(part.rows), heads, 1, -1)
        return own.reshape(len(part.rows), part.length, heads, -1).swapaxes(1, 2)


def _packed(values: mx.array, bits: int) -> list[mx.array]:
    return list(mx.quantize(values, group_size=GROUP, bits=bits))


def _unpacked(parts: Sequence[mx.array], bits: int) -> mx.array:
    packed, scales, offsets = parts
    return mx.dequantize(packed, scales, offsets, group_size=GROUP, bits=bits)


class TextOps(Compute):
    """The operations on one text by itself, without state. Keys from `visible` on are seen by nobody."""

    def __init__(self, weights: Weights, tokens: mx.array, wavelengths: Wavelengths, visible: int | None) -> None:
        super().__init__(weights, tokens)
        self._wavelengths = wavelengths
        self._visible = visible

    def attention(self, q: mx.array, k: mx.array, v: mx.array, layer: int, spec: Attention) -> mx.array:  # noqa: ARG002 - there is no state
        """See `Ops.attention`."""
        length = len(q)
        queries, keys, values = (
            x.reshape(1, length, heads, -1).swapaxes(1, 2)
            for x, heads in ((q, spec.heads), (k, spec.kv_heads), (v, spec.kv_heads))
        )
        if spec.rope is not None:
            queries, keys = (self._wavelengths.rotate(x, spec.rope, 0) for x in (queries, keys))
        places = mx.arange(length)
        mask = places[None] <= places[:, None]
        if spec.window is not None:
            mask = mask & (places[None] > places[:, None] - spec.window)
        if self._visible is not None:
            mask = mask & (places[None] < self._visible)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=spec.scale, mask=mask)
        return out[0].swapaxes(0, 1).reshape(length, -1)
