"""The operations on MLX arrays: every row of a part at once, linear layers over all tokens of a step."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.executors.base import EncodedPicture
from models.executors.mlx import pointwise
from models.executors.mlx.activations import Activations
from models.executors.mlx.experts import route
from models.executors.mlx.kinds import GROUP
from models.executors.mlx.parts import Part
from models.executors.mlx.recurrent import Recurrence, Run
from models.executors.mlx.rotations import Wavelengths, position_factors
from models.executors.mlx.slabs import LayerSpec, StateSpec
from models.executors.mlx.weights import Weights
from models.ops import (
    Activation,
    Attention,
    Embedding,
    Experts,
    Gate,
    LatentAttention,
    LatentUp,
    LayerNorm,
    Matrix,
    Norm,
    PositionScale,
    RopeConfig,
    Routing,
    Vector,
    Xielu,
)


class Compute(Recurrence):
    """Implements `Ops[mx.array]` but for attention. Thread: the executor's."""

    def __init__(self, weights: Weights, tokens: mx.array, activations: Activations, wavelengths: Wavelengths) -> None:
        self._weights = weights
        self._tokens = tokens
        self._activations = activations
        self._wavelengths = wavelengths
        self.residuals: dict[int, mx.array] = {}

    @property
    def tokens(self) -> mx.array:
        """What is run. Shape: int32 (T,)."""
        return self._tokens

    @property
    def weights(self) -> Weights:
        """What it is run with."""
        return self._weights

    def embed(self, table: Embedding) -> mx.array:
        """See `Ops.embed`."""
        tokens = mx.where(self._tokens < table.rows, self._tokens, 0) if table.is_partial else self._tokens
        return self._weights.table(table).rows(tokens)

    def linear(self, x: mx.array, matrix: Matrix) -> mx.array:
        """See `Ops.linear`."""
        return self._weights.matrix(matrix).multiply(x)

    def split(self, x: mx.array, sizes: Sequence[int], heads: int = 1) -> tuple[mx.array, ...]:
        """See `Ops.split`."""
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes) - 1)]
        if heads == 1:
            return tuple(mx.split(x, ends, axis=-1))
        parts = mx.split(x.reshape(len(x), heads, -1), ends, axis=-1)
        return tuple(part.reshape(len(x), -1) for part in parts)

    def join(self, parts: Sequence[mx.array], heads: int) -> mx.array:
        """See `Ops.join`."""
        tokens = len(parts[0])
        return mx.concatenate([part.reshape(tokens, heads, -1) for part in parts], axis=-1).reshape(tokens, -1)

    def rms_norm(self, x: mx.array, norm: Norm) -> mx.array:
        """See `Ops.rms_norm`."""
        weight = self._weights.norm(norm)
        if norm.width == x.shape[-1]:
            return mx.fast.rms_norm(x, weight, norm.eps)
        return mx.fast.rms_norm(x.reshape(len(x), -1, norm.width), weight, norm.eps).reshape(x.shape)

    def layer_norm(self, x: mx.array, norm: LayerNorm) -> mx.array:
        """See `Ops.layer_norm`."""
        weight, bias = self._weights.layer_norm(norm)
        if norm.width == x.shape[-1]:
            return mx.fast.layer_norm(x, weight, bias, norm.eps)
        return mx.fast.layer_norm(x.reshape(len(x), -1, norm.width), weight, bias, norm.eps).reshape(x.shape)

    def route(self, logits: mx.array, routing: Routing) -> tuple[mx.array, mx.array]:
        """See `Ops.route`."""
        picks, weights = route(logits, routing, None if routing.bias is None else self._weights.vector(routing.bias))
        if routing.expert_scales is not None:
            weights = weights * self._weights.vector(routing.expert_scales)[picks].astype(weights.dtype)
        return picks, weights

    def experts(
        self,
        x: mx.array,
        picks: mx.array,
        weights: mx.array,
        experts: Experts,
        activation: Gate,
        *,
        on_input: bool = False,
    ) -> mx.array:
        """See `Ops.experts`."""
        activate = self._activated(experts, activation)
        return self._weights.experts(experts).run(x, picks, weights, activate, on_input=on_input)

    def _activated(self, experts: Experts, activation: Gate) -> Callable[..., mx.array]:
        if experts.gated:
            return self._activations.gated(activation)
        assert isinstance(activation, str)
        return self._activations.unary(activation)

    def glu(self, gate: mx.array, up: mx.array, activation: Gate) -> mx.array:
        """See `Ops.glu`."""
        return self._activations.gated(activation)(gate, up)

    def activate(self, x: mx.array, activation: Activation) -> mx.array:
        """See `Ops.activate`."""
        return self._activations.unary(activation)(x)

    def mul(self, x: mx.array, y: mx.array) -> mx.array:
        """See `Ops.mul`."""
        return x * y if y.shape[-1] in (1, x.shape[-1]) else pointwise.scaled(x, y)

    def xielu(self, x: mx.array, numbers: Xielu) -> mx.array:
        """See `Ops.xielu`."""
        parts = (numbers.above, numbers.below, numbers.slope, numbers.least)
        return pointwise.xielu(x, *[self._weights.vector(each).astype(x.dtype) for each in parts])

    def mix(self, x: mx.array, weights: mx.array, parts: int) -> mx.array:
        """See `Ops.mix`."""
        return pointwise.mixed(x, weights, parts)

    def match_size(self, x: mx.array, like: mx.array, floor: float) -> mx.array:
        """See `Ops.match_size`."""
        return pointwise.matched(x, like, floor)

    def rise_above(self, x: mx.array, deviations: float) -> mx.array:
        """See `Ops.rise_above`."""
        return pointwise.risen(x, deviations)

    def weigh(self, x: mx.array, factors: Vector) -> mx.array:
        """See `Ops.weigh`."""
        return x * self._weights.vector(factors).astype(x.dtype)

    def scale(self, x: mx.array, factor: float) -> mx.array:
        """See `Ops.scale`."""
        return x * factor

    def softcap(self, x: mx.array, cap: float) -> mx.array:
        """See `Ops.softcap`."""
        return mx.tanh(x * (1 / cap)) * cap

    def add(self, x: mx.array, y: mx.array) -> mx.array:
        """See `Ops.add`."""
        return x + y

    @abstractmethod
    def attention(self, q: mx.array, k: mx.array, v: mx.array, layer: int, spec: Attention) -> mx.array:
        """See `Ops.attention`."""

    def latent_attention(
        self, q: mx.array, latent: mx.array, up: LatentUp, layer: int, spec: LatentAttention
    ) -> mx.array:
        """See `Ops.latent_attention`: what makes keys and values is taken to the queries and the outputs."""
        tokens, heads = len(q), spec.heads
        keys, values = self._weights.latent_up(up)
        still, turned = mx.split(q.reshape(tokens, heads, -1), [up.key_dim], axis=-1)
        absorbed = (still.swapaxes(0, 1) @ keys).swapaxes(0, 1)
        queries = mx.concatenate([absorbed, turned], axis=-1).reshape(tokens, -1)
        one = Attention(heads, 1, spec.rank + spec.rope_dim, spec.scale)
        seen = self.attention(queries, latent, latent, layer, one).reshape(tokens, heads, -1)[..., : spec.rank]
        return (seen.swapaxes(0, 1) @ values).swapaxes(0, 1).reshape(tokens, -1)

    def residual(self, x: mx.array, layers: int) -> mx.array:
        """See `Ops.residual`."""
        self.residuals[layers] = x
        return x

    def deepen(self, x: mx.array, layers: int) -> mx.array:  # noqa: ARG002 - where there are pictures
        """See `Ops.deepen`."""
        return x

    def _attended(self, q: mx.array, k: mx.array, v: mx.array, spec: Attention, mask: mx.array | None) -> mx.array:
        """Shapes: q (B, H, L, d), k and v (B, K, S, d), mask bool, (B, 1, L, S) or alike; returns (B, H, L, d)."""
        sinks = None if spec.sinks is None else self._weights.vector(spec.sinks).astype(q.dtype)
        if spec.softcap is None:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=spec.scale, mask=mask, sinks=sinks)
        assert sinks is None
        shape = q.shape
        grouped = q.reshape(shape[0], spec.kv_heads, -1, *shape[2:])
        scores = self.softcap((grouped * spec.scale) @ k[:, :, None].swapaxes(-1, -2), spec.softcap)
        if mask is not None:
            seen = mask[:, :, None] if mask.ndim == 4 else mask
            scores = mx.where(seen, scores, mx.array(-mx.inf, scores.dtype))
        return (mx.softmax(scores, axis=-1, precise=True) @ v[:, :, None]).reshape(shape)

    @abstractmethod
    def embed_positions(self, table: Embedding, first: int = 0) -> mx.array:
        """See `Ops.embed_positions`."""

    def embed_kind(self, table: Embedding) -> mx.array:
        """See `Ops.embed_kind`: one row, which what it is added to repeats. Shapes: returns (1, width)."""
        return self._weights.table(table).rows(mx.zeros(1, mx.int32))


class StepOps(Compute):
    """The operations of a step with state in slabs."""

    def __init__(
        self,
        weights: Weights,
        tokens: mx.array,
        parts: Sequence[Part],
        specs: Sequence[StateSpec],
        *,
        wavelengths: Wavelengths,
        activations: Activations,
    ) -> None:
        super().__init__(weights, tokens, activations, wavelengths)
        self._parts = parts
        self._specs = specs
        self._embeds_first = True

    def embed(self, table: Embedding) -> mx.array:
        """See `Ops.embed`: what is looked up first are the tokens' embeddings, or pictures' rows in their place."""
        return self.with_pictures(super().embed(table))

    @property
    def has_pictures(self) -> bool:
        """Whether some token's embedding is a picture's row."""
        return any(row.spans for part in self._parts for row in part.rows)

    def with_pictures(self, x: mx.array) -> mx.array:
        """What was looked up first with pictures' rows in their place; what is looked up later as it is.

        Shapes: x (T, D); returns the same.
        """
        first, self._embeds_first = self._embeds_first, False
        return self._inserted(x, lambda picture: picture.rows) if first else x

    def deepen(self, x: mx.array, layers: int) -> mx.array:
        """See `Ops.deepen`."""
        if not self.has_pictures:
            return x
        return x + self._inserted(mx.zeros_like(x), lambda picture: picture.deep[layers - 1])

    def _inserted(self, x: mx.array, rows_of: Callable[[EncodedPicture], npt.NDArray[np.float32]]) -> mx.array:
        """`x` with what is taken of pictures at their tokens. Shapes: x (T, D); returns the same."""
        pieces, end = [], 0
        for part in self._parts:
            for index, row in enumerate(part.rows):
                for span in row.spans:
                    begin = part.start + index * part.length + span.at
                    taken = mx.array(rows_of(span.picture)[span.begin : span.end]).astype(x.dtype)
                    pieces += [x[end:begin], taken]
                    end = begin + len(taken)
        return mx.concatenate([*pieces, x[end:]]) if pieces else x

    def rotate(self, x: mx.array, heads: int, rope: RopeConfig) -> mx.array:
        """See `Ops.rotate`."""
        turned = []
        for part in self._parts:
            rows = self._wavelengths.rotate(self._rows(x, part, heads), rope, part.offsets, part.axes)
            turned.append(rows.swapaxes(1, 2).reshape(len(part.rows) * part.length, -1))
        return turned[0] if len(turned) == 1 else mx.concatenate(turned)

    def position_scale(self, x: mx.array, scale: PositionScale) -> mx.array:
        """See `Ops.position_scale`."""
        return x * position_factors(self._places(), scale).astype(x.dtype)

    def embed_positions(self, table: Embedding, first: int = 0) -> mx.array:
        """See `Ops.embed_positions`."""
        return self._weights.table(table).rows(self._places() + first)

    def _places(self) -> mx.array:
        """Of each token in its row. Shapes: int32 (T,)."""
        return mx.concatenate([part.positions.reshape(-1) for part in self._parts])

    def attention(self, q: mx.array, k: mx.array, v: mx.array, layer: int, spec: Attention) -> mx.array:
        """See `Ops.attention`."""
        # All parts write before one looks: a slab that something has yet to read is copied when it is written.
        for part in self._parts:
            self._write(part, k, v, layer, spec)
        return self.look_again(q, layer, spec)

    def look_again(self, q: mx.array, layer: int, spec: Attention) -> mx.array:
        """See `Ops.look_again`."""
        outputs = [self._look(part, q, layer, spec) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _write(self, part: Part, k: mx.array, v: mx.array, layer: int, spec: Attention) -> None:
        """Append one part's tokens to the slabs. Shapes: of the whole step, see `attention`."""
        keys, values = self._rows(k, part, spec.kv_heads), self._rows(v, part, spec.kv_heads)
        if spec.rope is not None:
            keys = self._wavelengths.rotate(keys, spec.rope, part.offsets, part.axes)
        held, arrays = self._kv(layer), part.slab.layers[layer]
        if held.kv.values_in_keys:
            news = [keys]
        else:
            news = [keys, values] if held.bits is None else [*_packed(keys, held.bits), *_packed(values, held.bits)]
        cells = part.cells(held.capacity(part.slab.capacity))
        for array, new in zip(arrays, news, strict=True):
            # Indexed by row and position, heads between: the update is (B, L, K, width).
            array[part.indices, :, cells] = new.swapaxes(1, 2)

    def _look(self, part: Part, q: mx.array, layer: int, spec: Attention) -> mx.array:
        """Attention of one part's tokens. Shapes: q of the whole step, see `attention`; returns (B * L, H * d)."""
        queries = self._rows(q, part, spec.heads)
        if spec.rope is not None:
            queries = self._wavelengths.rotate(queries, spec.rope, part.offsets, part.axes)
        held = self._kv(layer)
        seen = part.slab.layers[layer]
        if part.taken is not None:
            seen = [array[part.taken] for array in seen]
        if held.kv.values_in_keys:
            seen = [seen[0], seen[0][..., : held.kv.value_dim]]
        elif held.bits is not None:
            seen = [_unpacked(seen[:3], held.bits), _unpacked(seen[3:], held.bits)]
        mask = part.mask(held.capacity(part.slab.capacity), spec)
        out = self._attended(queries, seen[0], seen[1], spec, mask)
        if part.length > 1:
            out = out.swapaxes(1, 2)
        return out.reshape(len(part.rows) * part.length, -1)

    def _recur(self, parts: Sequence[mx.array], layer: int, shape: tuple[int, ...], run: Run) -> mx.array:
        """See `Recurrence._recur`; what is left is written to the slabs."""
        outputs = []
        for part in self._parts:
            tokens = (len(part.rows), part.length, -1)
            own = [(x if len(self._parts) == 1 else x[part.tokens]).reshape(tokens) for x in parts]
            arrays, places = part.slab.layers[layer], part.taken
            made, state = run(own, arrays[0] if places is None else arrays[0][places])
            assert state.shape[1:] == shape
            if places is None:
                arrays[0] = state
            else:
                arrays[0][places] = state
            outputs.append(made.reshape(len(part.rows) * part.length, -1))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _kv(self, layer: int) -> LayerSpec:
        spec = self._specs[layer]
        assert isinstance(spec, LayerSpec)
        return spec

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
